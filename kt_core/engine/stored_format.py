"""What a model's weights are on disk, from its headers: what ``--format auto`` starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from kt_core.engine.expert_formats import site_tensors
from kt_core.engine.loading import expert_parameters
from kt_core.engine.model_files import adapters_for, kind_of, model_class, model_config
from kt_core.engine.packed_loading import find_packed
from kt_core.engine.sites import find_sites, split_tied
from kt_core.engine.stored_checkpoint import open_model
from kt_core.engine.stored_experts import layer_format, stored_formats
from kt_core.engine.transformers_tensors import find_sources, index_experts
from kt_core.paths import cache_dir
from kt_core.plugins import Registry
from kt_core.types import Format


@dataclass(frozen=True, slots=True)
class StoredFormats:
    """Formats of what is quantised on disk; those of a layer, all layers together.

    Attributes:
        experts: Of routed experts; empty where they are not quantised.
        dense: Of packed dense layers; empty where they are tensors.
        is_packed: Whether kt packed them, so that they have no other.
    """

    experts: frozenset[Format] = frozenset()
    dense: frozenset[Format] = frozenset()
    is_packed: bool = False


def weights_of(model: str, registry: Registry) -> Path:
    """Return where a model's weights would be, by what the user calls it: nothing is fetched."""
    path = Path(model).expanduser()
    if path.exists():
        return path.parent if path.name == "config.json" else path
    if model in registry.sources:
        return registry.sources.get(model).resolve(cache_dir())
    return path


def formats_on_disk(path: Path, registry: Registry) -> StoredFormats:
    """Return what is stored at a path; nothing where there are no weights, only a config.

    Raises:
        KtError: The weights cannot be opened.
    """
    is_of_a_kind = path.exists() and kind_of(path, registry) is not None
    if not is_of_a_kind and not (path.is_dir() and any(path.glob("*.safetensors"))):
        return StoredFormats()
    if (packed := find_packed(path, registry)) is not None:
        return StoredFormats(
            frozenset(layer.weight_format for layer in packed.config.layers.values()),
            frozenset(layer.weight_format for layer in packed.config.dense.values()),
            is_packed=True,
        )
    opened = open_model(path, registry)
    if opened.checkpoint.is_as_on_disk:
        return StoredFormats()
    config_dict = dict(opened.config)
    config = model_config(path, config_dict, registry)
    with torch.device("meta"):
        model: PreTrainedModel = model_class(config)(config).eval()
    own, _ = split_tied(model, find_sites(model, adapters_for(config_dict["model_type"], registry)))
    wanted = expert_parameters(model, own)
    tensors = index_experts(find_sources(opened.checkpoint, model, wanted), model, wanted)
    found = set()
    for site in own:
        formats = stored_formats(opened.checkpoint, site, site_tensors(site, tensors))
        if formats:
            found.add(layer_format(formats, site))
    return StoredFormats(frozenset(found))
