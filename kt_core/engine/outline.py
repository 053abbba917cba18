"""Measure a model that is not there: sizes, cache and work, on the meta device, in seconds.

The model is built by transformers without memory for its weights, its experts modules are replaced
as for loading, by ones that compute nothing, and some tokens are sent through. So a plan knows what
transformers *does*, for every family, and there is no formula here for any kind of attention: cache
tensors are looked at, operators are counted as they are dispatched.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from kt_core.checkpoint.packed_config import METHOD, PackedConfig
from kt_core.engine import transformers_hook as hook
from kt_core.engine.dense_choice import packable
from kt_core.engine.forward_passes import context_length
from kt_core.engine.meta_passes import Passes
from kt_core.engine.model_files import (
    adapters_for,
    config_from_dict,
    first_line,
    kind_of,
    model_class,
    model_dtype,
    parse_config,
)
from kt_core.engine.sites import find_sites, split_tied
from kt_core.engine.stored_checkpoint import without_quantization
from kt_core.errors import ModelSourceError, UnsupportedModelError
from kt_core.interfaces import ExpertsSite, Progress, no_progress
from kt_core.moe.hybrid_experts import HybridExperts
from kt_core.paths import cache_dir
from kt_core.plan import ExpertLayer, LinearLayers, ModelOutline
from kt_core.plugins import Registry
from kt_core.types import MoeSpec

_PARTS = (
    "embeddings", "output_head", "attention_and_dense_layers", "routers_and_shared_experts", "rest",
)  # fmt: skip


def outline_model(
    model: str | Path, registry: Registry, progress: Progress = no_progress
) -> ModelOutline:
    """Return what a plan must know about a model.

    Args:
        model: A directory, a config.json, a GGUF file, a name that a plug-in registered, or a hub
            id, of which config.json alone is fetched.
        registry: The plug-ins.
        progress: Told what is being done.

    Raises:
        KtError: There is no such model, or it cannot be run by kt.
    """
    file = Path(model).expanduser()
    packed: Collection[str] = ()
    kind = kind_of(file, registry) if file.exists() else None
    if kind is not None:
        config_dict = dict(kind.config(file))
    else:
        file = find_config(model, registry, progress)
        # sizes are those of what kt makes of it
        stored = parse_config(file)
        config_dict, packed = without_quantization(stored), _packed_dense(stored, file)
    config = config_from_dict(config_dict, registry, file)
    progress("reading the model's structure", None)
    return outline_config(
        config, registry, model_type=config_dict["model_type"], packed_dense=packed
    )


def _packed_dense(config_dict: Mapping[str, Any], file: Path) -> Collection[str]:
    """Return the paths of dense layers that are packed on disk."""
    stored = config_dict.get("quantization_config")
    if not isinstance(stored, Mapping) or stored.get("quant_method") != METHOD:
        return ()
    return PackedConfig.from_dict(stored, str(file)).dense.keys()


def find_config(model: str | Path, registry: Registry, progress: Progress = no_progress) -> Path:
    """Return the config.json of a model; arguments and errors as for ``outline_model``."""
    path, name = Path(model).expanduser(), str(model)
    if path.is_dir():
        return path / "config.json"
    if path.is_file():
        return path
    if name in registry.configs:
        return registry.configs.get(name).file
    if name in registry.sources:
        return registry.sources.get(name).resolve(cache_dir(), progress) / "config.json"
    if name.count("/") == 1:
        return _fetch_config(name, progress)
    known = ", ".join((*registry.configs.names(), *registry.sources.names())) or "none"
    msg = (
        f"model {name!r} is neither a directory nor a config.json nor a known name (known: {known})"
        " nor a hub id of the form owner/name"
    )
    raise ModelSourceError(msg)


def _fetch_config(hub_id: str, progress: Progress) -> Path:
    from huggingface_hub import hf_hub_download

    progress(f"config.json of {hub_id}", None)
    try:
        return Path(hf_hub_download(hub_id, "config.json"))
    except Exception as error:  # huggingface_hub's, httpx's, the file system's
        reason = first_line(error)
        msg = (
            f"{hub_id!r} is no file here and its config.json could not be downloaded: {reason}. "
            "Check the name and the network, or give the path of a config.json."
        )
        raise ModelSourceError(msg) from error


def outline_config(
    config: PreTrainedConfig,
    registry: Registry,
    *,
    model_type: str | None = None,
    packed_dense: Collection[str] = (),
) -> ModelOutline:
    """Return the outline of the model that this config describes; errors as ``outline_model``.

    Args:
        config: The config.
        registry: The plug-ins.
        model_type: What its config.json says.
        packed_dense: Paths of dense layers that are packed on disk.
    """
    dtype = model_dtype(config)
    with torch.device("meta"):
        model: PreTrainedModel = model_class(config)(config).to(dtype).eval()
    sites = find_sites(model, adapters_for(model_type or config.model_type, registry))
    own, _ = split_tied(model, sites)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    _untie(model, packed_dense)
    dense_bytes = _dense_parts(model, sites)
    linears = _linears(model, sites)
    recorders = {site.module_name: _Recorder(site.spec) for site in sites}
    for site in sites:
        _swap(model, site, recorders[site.module_name])
    passes = Passes(model)
    try:
        measured = passes.run()
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError,
            KeyError) as error:  # fmt: skip
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        msg = (
            f"{type(model).__name__} cannot be planned for: transformers does not run it on the "
            f"meta device ({reason}). It may still load: try `kt run`."
        )
        raise UnsupportedModelError(msg) from error
    text = config.get_text_config(decoder=True)
    return ModelOutline(
        model_type=config.model_type,
        parameters=parameters,
        dense_dtype=str(dtype).removeprefix("torch."),
        dense_bytes=dense_bytes,
        linears=linears,
        expert_layers=tuple(
            ExpertLayer(spec=site.spec, top_k=recorders[site.module_name].top_k) for site in own
        ),
        max_context=context_length(model),
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        **measured,
    )


def _untie(model: PreTrainedModel, packed: Collection[str]) -> None:
    """Give packed layers parameters of their own, as they have on disk."""
    own = []
    for name, module in model.named_modules():
        if name in packed:
            for leaf, parameter in list(module.named_parameters()):
                setattr(module, leaf, nn.Parameter(torch.empty_like(parameter)))
                own.append(f"{name}.{leaf}")
    hook.forget_dense(model, own, [])


def _dense_parts(model: PreTrainedModel, sites: list[ExpertsSite]) -> dict[str, int]:
    """Bytes by part of everything but the routed experts; a shared tensor counts once."""
    experts = tuple(f"{site.parameter_prefix}." for site in sites)
    blocks = tuple(f"{site.parameter_prefix.rpartition('.')[0]}." for site in sites)
    layers = _layer_lists(sites)
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    heads = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    parts = dict.fromkeys(
        (
            "embeddings",
            "output_head",
            "attention_and_dense_layers",
            "routers_and_shared_experts",
            "rest",
        ),
        0,
    )
    for name, parameter in model.named_parameters():
        if name.startswith(experts):
            continue
        if id(parameter) in embeddings:
            part = "embeddings"
        elif id(parameter) in heads:
            part = "output_head"
        elif name.startswith(blocks):
            part = "routers_and_shared_experts"
        else:
            part = "attention_and_dense_layers" if name.startswith(layers) else "rest"
        parts[part] += parameter.numel() * parameter.element_size()
    return {part: size for part, size in parts.items() if size}


def _layer_lists(sites: list[ExpertsSite]) -> tuple[str, ...]:
    """Prefixes of the lists of decoder layers: up to the number in an experts module's path."""
    return tuple({re.split(r"\.\d+\.", site.parameter_prefix)[0] + "." for site in sites})


def _linears(model: PreTrainedModel, sites: list[ExpertsSite]) -> tuple[LinearLayers, ...]:
    """Layers that loading would pack, if asked to; those that share a weight are one."""
    layers = packable(model, sites)
    packed = {name for site in layers for name in site.own_parameters}
    distinct = {(site.weight, site.bias): site for site in layers}
    alike = Counter(
        (site.spec, site.module.weight.element_size(), site.weight not in packed)
        for site in distinct.values()
    )
    return tuple(
        LinearLayers(spec=spec, count=count, element_bytes=element_bytes, is_shared=is_shared)
        for (spec, element_bytes, is_shared), count in alike.items()
    )


class _Recorder(HybridExperts):
    """Computes nothing, and remembers how many experts a token has."""

    def __init__(self, spec: MoeSpec) -> None:
        nn.Module.__init__(self)
        self.spec = spec
        self.kernels = ()
        self.top_k = 0

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return an empty output; on a pass of one token every pair is that token's."""
        del top_k_weights
        self.top_k = self.top_k or top_k_index.numel()
        return torch.empty_like(hidden_states)

    def extra_repr(self) -> str:
        return f"{self.spec.num_experts} experts"


def _swap(model: PreTrainedModel, site: ExpertsSite, recorder: _Recorder) -> None:
    replacement = site.build(model.get_submodule(site.module_name), recorder)
    parent, _, leaf = site.module_name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, replacement)
