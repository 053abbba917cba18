"""Load a model: the dense part by transformers, the experts into packed buffers.

The order matters. Everything that can be known from config and headers is checked before a weight
is read or memory is taken: experts found, shapes right, format possible, room enough.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from kt_core import hardware
from kt_core.checkpoint import Checkpoint, PackedDirectory
from kt_core.checkpoint.packed_directory import MappedExperts
from kt_core.engine import transformers_hook as hook
from kt_core.engine.accelerators import Accelerators
from kt_core.engine.dense_layers import DenseLayers
from kt_core.engine.expert_formats import candidate_formats, site_tensors
from kt_core.engine.model_files import model_class
from kt_core.engine.one_torch_thread import one_torch_thread
from kt_core.engine.packed_loading import check_packed_sites, packed_formats
from kt_core.engine.shared_experts import run_shared_beside
from kt_core.engine.sites import find_sites, split_tied
from kt_core.engine.stored_experts import RowsByLayout, StoredExperts, find_stored
from kt_core.engine.transformers_tensors import ExpertTensors, find_sources, index_experts
from kt_core.errors import (
    CheckpointError,
    KtError,
    UnsupportedFormatError,
)
from kt_core.interfaces import (
    ExpertDevice,
    ExpertKernel,
    ExpertsSite,
    ExpertWeights,
    ModelAdapter,
    Progress,
)
from kt_core.moe.hybrid_experts import HybridExperts
from kt_core.plan.fitting import check_dense_fits, first_that_fits
from kt_core.plugins import Registry
from kt_core.types import ActivationPrecision, Format

_log = logging.getLogger(__name__)

_FLOAT_DTYPES = frozenset({"BF16", "F16", "F32"})


@dataclass(slots=True)
class LoadedSite:
    """One experts module and where its weights come from.

    Attributes:
        site: The module.
        kernel: What its experts are loaded into.
        tensors: Of each of its parameters.
        stored: Reads experts that stay as they are stored; None where none is quantised.
        mapped: Experts that are packed already, instead of tensors.
    """

    site: ExpertsSite
    kernel: ExpertKernel
    tensors: dict[str, ExpertTensors] = field(default_factory=dict)
    stored: StoredExperts | None = None
    mapped: MappedExperts | None = None

    def load(self, expert: int) -> None:
        """Read and pack one expert, or map it.

        Raises:
            CheckpointError: A number is NaN or infinite.
        """
        if self.mapped is not None:
            self.kernel.map_packed(expert, self.mapped.expert(expert))
            return
        weights = read_expert(self.site, self.tensors, self.stored, expert)
        try:
            self.kernel.load(expert, weights)
        except ValueError as error:
            names = [name for tensors in self.tensors.values() for name in tensors.names(expert)]
            msg = f"expert {expert} of {self.site.module_name}: {error} (from {', '.join(names)})"
            raise CheckpointError(msg) from error


@dataclass(slots=True)
class ExpertLoader:
    """Replaces the experts modules of one model and fills them.

    Attributes:
        checkpoint: Where the weights are.
        adapters: Who to ask where the experts are.
        device: Who computes them.
        registry: For the formats.
        format_name: What the user asked for, ``auto`` included.
        precision: What becomes of the hidden states.
        progress: Told how far it has come.
        formats: What the experts become, by the prefix of their parameters; once chosen.
        dense: Fills dense layers that transformers does not; None where it loads them all.
        packed: Where the experts are packed already; None for a checkpoint.
        accelerators: Hold the hot experts and the dense part; None where the host does it all.
    """

    checkpoint: Checkpoint
    adapters: Sequence[ModelAdapter]
    device: ExpertDevice
    registry: Registry
    format_name: str
    precision: ActivationPrecision
    progress: Progress
    dense: DenseLayers | None = None
    packed: PackedDirectory | None = None
    accelerators: Accelerators | None = None
    formats: dict[str, Format] = field(default_factory=dict)
    sites: list[LoadedSite] = field(default_factory=list)
    dense_shapes: dict[str, torch.Size] = field(default_factory=dict)

    def prepare(self, model: PreTrainedModel) -> None:
        """Find the experts, check that they can be loaded, put HybridExperts in their place.

        Called by transformers with the model on the meta device.
        """
        sites = find_sites(model, self.adapters)
        own, tied = split_tied(model, sites)
        wanted = {} if self.packed else expert_parameters(model, own)
        dense = self.dense.choose(model, sites) if self.dense else ()
        sources = find_sources(self.checkpoint, model, {*wanted, *dense})
        tensors = index_experts(sources, model, wanted)
        if self.packed:
            check_packed_sites(self.packed, own, self.device)
        else:
            check_tensors(self.checkpoint, model, own, tensors)
        if self.dense:
            self.dense.replace(model, sources)
        if self.packed:
            self.formats = packed_formats(self.packed, own)
            check_dense_fits(_dense_bytes(model, sites), hardware.available_memory_bytes())
        else:
            self.formats = self._choose_formats(model, own, tensors)
        self._replace(model, own, tied, tensors)
        self.dense_shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def fill(self) -> None:
        """Fill dense layers, then read and pack every expert, in parallel.

        Raises:
            CheckpointError: A tensor cannot be read, or holds a NaN or an infinity.
        """
        if self.dense:
            with one_torch_thread():
                self._run(self.dense.stage, self.dense.tasks())
        experts = [
            partial(self._load, layer, expert)
            for layer, loaded in enumerate(self.sites)
            for expert in range(loaded.site.spec.num_experts)
        ]
        self._run("experts", experts)

    def _load(self, layer: int, expert: int) -> None:
        self.sites[layer].load(expert)
        if self.accelerators:
            self.accelerators.settle(layer, expert)

    def _run(self, stage: str, tasks: Sequence[Callable[[], None]]) -> None:
        with ThreadPoolExecutor(self.device.threads, thread_name_prefix="kt-pack") as pool:
            pending = {pool.submit(task) for task in tasks}
            try:
                while pending:
                    done, pending = wait(pending, timeout=0.1, return_when=FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                    self.progress(stage, 1 - len(pending) / len(tasks))
            except BaseException:  # Ctrl-C too: start no more, then let it through
                pool.shutdown(cancel_futures=True)
                raise

    def _choose_formats(
        self,
        model: PreTrainedModel,
        sites: list[ExpertsSite],
        tensors: Mapping[str, ExpertTensors],
    ) -> dict[str, Format]:
        """Return the formats asked for, or for ``auto`` the best that fit.

        Raises:
            UnsupportedFormatError: The device cannot compute them.
            NotEnoughMemoryError: They do not fit.
        """
        candidates = candidate_formats(
            self.format_name, self.checkpoint, sites, tensors, self.registry
        )
        possible = [c for c in candidates if c.is_computed_by(self.device.capabilities)]
        if not possible:
            capabilities = self.device.capabilities
            descriptors = [f.descriptor for f in self.registry.formats]
            others = [d.name for d in descriptors if capabilities.computes(d)]
            msg = (
                f"device {self.device.info.name!r} computes no experts of format "
                f"{self.format_name!r}; it computes: {', '.join(sorted(others))}"
            )
            raise UnsupportedFormatError(msg)
        dense_bytes = _dense_bytes(model, sites)
        if self.dense and not self.accelerators:
            dense_bytes += self.dense.packed_bytes
        packed = {c.name: c.packed_bytes(self.device.expert_bytes) for c in possible}
        if possible[0].is_stored:  # nothing larger is better than that
            packed = {n: size for n, size in packed.items() if size <= packed[possible[0].name]}
        available = hardware.available_memory_bytes()
        if self.accelerators:
            available += self.accelerators.room_bytes
        name = first_that_fits(packed, dense_bytes, available, smaller=self._smaller_format())
        chosen = next(candidate for candidate in possible if candidate.name == name)
        chosen.explain(self.format_name)
        return chosen.formats

    def _smaller_format(self) -> str:
        dense = self.accelerators.devices[0] if self.accelerators else self.device
        can_pack = self.dense is None and dense.capabilities.computes_dense
        return "--format int4" + (", --dense-format int8" if can_pack else "")

    def _replace(
        self,
        model: PreTrainedModel,
        own: list[ExpertsSite],
        tied: list[tuple[str, ExpertsSite]],
        tensors: dict[str, ExpertTensors],
    ) -> None:
        kernels: dict[str, ExpertKernel] = {}
        rows: RowsByLayout = {}
        for site in own:
            prefix = site.parameter_prefix
            weight_format = self.formats[prefix]
            kernel = self.device.expert_kernel(site.spec, weight_format, precision=self.precision)
            kernels[prefix] = kernel
            loaded = LoadedSite(site, kernel)
            if self.packed:
                loaded.mapped = self.packed.experts(prefix, self.checkpoint)
            else:
                loaded.tensors = site_tensors(site, tensors)
                loaded.stored = stored_experts(
                    self.checkpoint, site, loaded.tensors, weight_format, rows
                )
            self.sites.append(loaded)
        modules = self._modules(own, kernels)
        for site in own:
            _swap(model, site, modules[site.parameter_prefix])
        for owner, site in tied:
            shared = (
                modules[owner] if self.accelerators else HybridExperts(site.spec, [kernels[owner]])
            )
            _swap(model, site, shared)
        everything = (*own, *(site for _, site in tied))
        hook.forget_experts(
            model,
            modules=[site.module_name for site in everything],
            prefixes=[site.parameter_prefix for site in everything],
        )

    def _modules(
        self, sites: Sequence[ExpertsSite], kernels: Mapping[str, ExpertKernel]
    ) -> dict[str, HybridExperts]:
        """Return what takes the place of each experts module, by the prefix of its parameters."""
        prefixes = [site.parameter_prefix for site in sites]
        if self.accelerators is None:
            return {
                site.parameter_prefix: HybridExperts(site.spec, [kernels[site.parameter_prefix]])
                for site in sites
            }
        accelerators, formats = self.accelerators, [self.formats[prefix] for prefix in prefixes]
        accelerators.choose([(site.spec, f) for site, f in zip(sites, formats, strict=True)])
        return {
            site.parameter_prefix: accelerators.layer(
                site.spec, weight_format, kernels[site.parameter_prefix]
            )
            for site, weight_format in zip(sites, formats, strict=True)
        }


def load_model(
    directory: Path, config: PreTrainedConfig, loader: ExpertLoader, dtype: torch.dtype | str
) -> PreTrainedModel:
    """Load the whole model; afterwards it runs like any transformers model.

    Raises:
        CheckpointError: Weights are missing or do not fit the config.
    """
    loader.progress("dense weights", None)
    cls = model_class(config)
    try:
        model, info = cls.from_pretrained(
            config=config,
            dtype=dtype,
            **_where_weights_are(directory, loader.checkpoint),
            quantization_config=hook.KtLoadingConfig(loader.prepare),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # _check_loaded names them
        )
    except KtError:
        raise
    except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        msg = f"transformers could not load the dense part of {directory}: {reason}"
        raise CheckpointError(msg) from error
    _check_loaded(directory, model, info, loader.dense_shapes)
    loader.fill()
    loader.checkpoint.close()
    model.requires_grad_(False)
    model.config.name_or_path = str(directory)
    result: PreTrainedModel = model.eval()
    if loader.accelerators:
        loader.progress("dense part to the accelerator", None)
        result.to(loader.accelerators.torch_device)  # type: ignore[arg-type]
        result.tie_weights()  # on some devices each got a copy of its own
        loader.accelerators.take_places()
    if loader.dense:
        loader.dense.try_out(result)
    if loader.accelerators:
        loader.accelerators.start(result.dtype)
        loader.accelerators.hybrid.beside = run_shared_beside(
            result, loader.accelerators.torch_device
        )
    return result


def _where_weights_are(directory: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what tells transformers where to find the dense part."""
    if checkpoint.is_as_on_disk:
        return {"pretrained_model_name_or_path": directory}
    return {
        "pretrained_model_name_or_path": None,
        "state_dict": hook.lazy_state(checkpoint),
        "generation_config": hook.generation_config(directory),
    }


def _check_loaded(
    directory: Path,
    model: PreTrainedModel,
    info: dict[str, Any],
    shapes: Mapping[str, torch.Size],
) -> None:
    misshapen = {name for name, *_ in info["mismatched_keys"]}
    # Before 5.23 transformers takes any shape where there is a quantizer.
    misshapen |= {n for n, tensor in model.state_dict().items() if tensor.shape != shapes.get(n)}
    problems = {
        "missing from the files": info["missing_keys"],
        "of another shape than config.json says": misshapen,
    }
    for what, keys in problems.items():
        if keys:
            names = ", ".join(str(key) for key in sorted(keys, key=str)[:5])
            msg = (
                f"{len(keys)} weights of {directory} are {what}, such as {names}. A shard may be "
                "missing from the index, or config.json belongs to another checkpoint."
            )
            raise CheckpointError(msg)


def read_expert(
    site: ExpertsSite,
    tensors: Mapping[str, ExpertTensors],
    stored: StoredExperts | None,
    expert: int,
) -> ExpertWeights:
    """Return an expert's weights: as they are stored where the format is that, else dense."""
    if stored and stored.is_exact(expert):
        return stored.read(expert)
    return site.expert_weights({name: parts.read(expert) for name, parts in tensors.items()})


def stored_experts(
    checkpoint: Checkpoint,
    site: ExpertsSite,
    tensors: Mapping[str, ExpertTensors],
    weight_format: Format,
    rows: RowsByLayout,
) -> StoredExperts | None:
    """Return who reads experts as they are stored; None where none is quantised.

    ``rows`` is kept from layer to layer of a model.
    """
    if checkpoint.is_as_on_disk:
        return None
    return find_stored(checkpoint, site, tensors, weight_format, rows)


def expert_parameters(model: PreTrainedModel, sites: Iterable[ExpertsSite]) -> dict[str, int]:
    """How many experts each parameter holds: more than compute, in models with identity experts."""
    names = [f"{site.parameter_prefix}.{name}" for site in sites for name in site.parameters]
    return {name: int(model.get_parameter(name).shape[0]) for name in names}


def check_tensors(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    sites: list[ExpertsSite],
    tensors: dict[str, ExpertTensors],
) -> None:
    """Check types and shapes of every expert from the headers, before anything is read."""
    for site in sites:
        for name in site.parameters:
            parameter = f"{site.parameter_prefix}.{name}"
            wanted = tuple(model.get_parameter(parameter).shape[1:])
            seen: set[tuple[tuple[int, ...], ...]] = set()
            for expert in range(site.spec.num_experts):
                infos = {n: checkpoint.tensors[n] for n in tensors[parameter].names(expert)}
                shapes = tuple(info.shape for info in infos.values())
                for stored_name, info in infos.items():
                    if info.dtype not in _FLOAT_DTYPES:
                        msg = (
                            f"{stored_name} is stored as {info.dtype}; this version reads BF16, "
                            "F16 and F32 experts"
                        )
                        raise UnsupportedFormatError(msg)
                if shapes in seen:
                    continue
                seen.add(shapes)
                found = tensors[parameter].shape(expert)
                if found != wanted:
                    names = ", ".join(tensors[parameter].names(expert))
                    msg = (
                        f"expert {expert} of {site.module_name} is {list(found)} on disk ({names}),"
                        f" config.json asks for {list(wanted)}. They belong to different models."
                    )
                    raise CheckpointError(msg)


def _dense_bytes(model: PreTrainedModel, sites: list[ExpertsSite]) -> int:
    """Bytes of everything but the experts, in the type it is loaded as."""
    prefixes = tuple(f"{site.parameter_prefix}." for site in sites)
    return sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in model.named_parameters()
        if not name.startswith(prefixes)
    )


def _swap(model: PreTrainedModel, site: ExpertsSite, experts: HybridExperts) -> None:
    replaced = model.get_submodule(site.module_name)
    replacement = site.build(replaced, experts)
    parent, _, leaf = site.module_name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, replacement)
