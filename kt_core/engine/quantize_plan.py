"""What `kt quant` will do: which experts become what, what is copied, how much room it takes."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kt_core.checkpoint import Checkpoint
from kt_core.checkpoint.packed_config import PackedConfig, PackedLayer
from kt_core.checkpoint.packed_directory import DIGEST_BYTES
from kt_core.checkpoint.safetensors_files import INDEX_NAME
from kt_core.checkpoint.safetensors_writer import ALIGNMENT
from kt_core.engine.loading import check_tensors, expert_parameters, stored_experts
from kt_core.engine.model_files import (
    adapters_for,
    kind_of,
    model_class,
    model_config,
    model_dtype,
)
from kt_core.engine.packed_loading import find_packed
from kt_core.engine.quantize_dense import DenseChoice, DensePlan, plan_dense
from kt_core.engine.quantize_overrides import NO_FORMAT, check_overrides, format_for
from kt_core.engine.sites import find_sites, split_tied
from kt_core.engine.stored_checkpoint import open_model
from kt_core.engine.stored_experts import RowsByLayout, StoredExperts
from kt_core.engine.transformers_tensors import ExpertTensors, find_sources, index_experts
from kt_core.errors import InvalidRequestError, NotEnoughDiskError, UnsupportedFormatError
from kt_core.interfaces import ExpertsSite, WeightFormat
from kt_core.plugins import Registry

# Dense tensors are written in files of about this size.
_SHARD_BYTES = 2 << 30
# Weights in files of other kinds are not copied, and what we write ourselves is not either.
_NOT_COPIED = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", INDEX_NAME,
    "*.index.json", "config.json", "hf_quant_config.json", ".*",
)  # fmt: skip
_SAMPLES, _SAMPLE_BYTES = 16, 4096
_WORDS = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One experts module: where it comes from and what it becomes.

    Attributes:
        site: The module.
        tensors: Of each of its parameters.
        weight_format: What its experts become.
        layer: The file they go to.
        stored: Reads experts that stay as they are stored; None where none is quantised.
    """

    site: ExpertsSite
    tensors: Mapping[str, ExpertTensors]
    weight_format: WeightFormat
    layer: PackedLayer
    stored: StoredExperts | None = None

    @property
    def num_weights(self) -> int:
        """Weights of all experts."""
        return self.site.spec.num_experts * self.site.spec.weights_per_expert


@dataclass(frozen=True, slots=True)
class QuantPlan:
    """Everything that is decided before anything is written.

    Attributes:
        source: The model directory.
        config_dict: Its config.json, without what is said there of quantisation.
        checkpoint: Its tensors.
        layers: Its experts, in order.
        shards: Names of dense tensors, by the file they go to.
        copied: Other files that are copied as they are.
        tokenizer: Of a model in files of another kind: is saved; None where its files are copied.
        config: The ``quantization_config`` of what is written.
        dtype: Of the model: what dense tensors become that the source has quantised.
        dense_files: Dense layers that are packed, by the file they go to.
    """

    source: Path
    config_dict: Mapping[str, Any]
    checkpoint: Checkpoint
    layers: Sequence[LayerPlan]
    shards: Mapping[str, Sequence[str]]
    copied: Sequence[Path]
    tokenizer: PreTrainedTokenizerBase | None
    config: PackedConfig
    dtype: torch.dtype
    dense_files: Mapping[str, Sequence[DensePlan]] = field(default_factory=dict)

    def decoded_type(self, name: str) -> torch.dtype | None:
        """Return what a dense tensor becomes; None where it stays as it is."""
        return None if self.checkpoint.stored(name) is None else self.dtype

    def dense_word(self, name: str) -> str:
        """Return the type of a dense tensor in the words of safetensors."""
        decoded = self.decoded_type(name)
        return self.checkpoint.tensors[name].dtype if decoded is None else _WORDS[decoded]

    def dense_size(self, name: str) -> int:
        """Return the bytes of a dense tensor."""
        info, decoded = self.checkpoint.tensors[name], self.decoded_type(name)
        return info.size_bytes if decoded is None else math.prod(info.shape) * decoded.itemsize

    @property
    def dense_bytes(self) -> int:
        """Bytes of dense tensors and packed dense layers."""
        tensors = sum(self.dense_size(name) for shard in self.shards.values() for name in shard)
        return tensors + sum(layer.size_bytes for layer in self.config.dense.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of everything that is written."""
        experts = sum(p.layer.size_bytes + p.layer.num_experts * DIGEST_BYTES for p in self.layers)
        files = len(self.layers) + len(self.shards) + len(self.dense_files)
        headers = 2 * ALIGNMENT * (files + 1)
        return experts + self.dense_bytes + headers + sum(f.stat().st_size for f in self.copied)

    def fingerprint(self) -> str:
        """Return a digest of the source and of what it becomes; see ``fingerprint``."""
        made = {
            "config": self.config.to_dict(),
            "shards": {n: list(s) for n, s in self.shards.items()},
        }
        made["config"]["source"] = ""  # the same bytes, wherever they lie
        made["model"] = dict(self.config_dict)
        return fingerprint(self.checkpoint, json.dumps(made, sort_keys=True, default=str))


def plan_quantization(
    source: Path,
    registry: Registry,
    *,
    weight_format: str,
    method: str,
    overrides: Mapping[str, str] | None = None,
    dense_format: str = "none",
) -> QuantPlan:
    """Decide everything, from config and headers alone.

    Args:
        source: A model directory.
        registry: The plug-ins.
        weight_format: Name of the format of the experts.
        method: How they are quantised: is written down.
        overrides: Formats of single modules, by a pattern of the path of the experts module, or
            dense layer, with ``*`` and ``?``; the first that matches counts. ``none`` leaves a
            dense layer as it is.
        dense_format: What dense layers become; ``none`` leaves them as they are.

    Raises:
        KtError: The model cannot be loaded, or an override matches nothing.
    """
    everywhere = registry.formats.get(weight_format)
    special = {
        pattern: None if name == NO_FORMAT else registry.formats.get(name)
        for pattern, name in (overrides or {}).items()
    }
    if find_packed(source, registry) is not None:
        msg = (
            f"{source} is packed by kt already: what was rounded once should not be rounded again. "
            "Give the original model."
        )
        raise UnsupportedFormatError(msg)
    opened = open_model(source, registry)
    config_dict, checkpoint = dict(opened.config), opened.checkpoint
    config = model_config(source, config_dict, registry)
    with torch.device("meta"):
        model: PreTrainedModel = model_class(config)(config).to(model_dtype(config)).eval()
    own, _ = split_tied(model, find_sites(model, adapters_for(config_dict["model_type"], registry)))
    wanted = expert_parameters(model, own)
    tensors = index_experts(find_sources(checkpoint, model, wanted), model, wanted)
    check_tensors(checkpoint, model, own, tensors)
    layers = []
    rows: RowsByLayout = {}
    for number, site in enumerate(own, start=1):
        chosen = format_for((site.module_name,), everywhere, special)
        if chosen is None:
            msg = f"experts cannot stay as they are: {site.module_name} needs a format of its own"
            raise InvalidRequestError(msg)
        name = f"experts-{number:05}-of-{len(own):05}.safetensors"
        layer = PackedLayer.of(site.parameter_prefix, name, site.spec, chosen.descriptor)
        parts = {n: tensors[f"{site.parameter_prefix}.{n}"] for n in site.parameters}
        stored = stored_experts(checkpoint, site, parts, chosen.descriptor, rows)
        layers.append(LayerPlan(site, parts, chosen, layer, stored))
    dense = DenseChoice()
    if dense_format != NO_FORMAT:
        dense = plan_dense(model, own, checkpoint, registry.formats.get(dense_format), special)
    check_overrides(special, own, dense.names)
    shards = _shards(checkpoint, layers, dense.tensors)
    dense_files = dense.files(_SHARD_BYTES)
    is_foreign = kind_of(source, registry) is not None
    return QuantPlan(
        source=source,
        config_dict=config_dict,
        checkpoint=checkpoint,
        layers=layers,
        shards=shards,
        copied=[] if is_foreign else [f for f in sorted(source.iterdir()) if _is_copied(f)],
        tokenizer=opened.tokenizer(config) if is_foreign else None,
        config=PackedConfig(
            layers={plan.layer.name: plan.layer for plan in layers},
            source=source.name,
            method=method,
            dense={p.layer.name: p.layer for plans in dense_files.values() for p in plans},
        ),
        dense_files=dense_files,
        dtype=model_dtype(config),
    )


def new_config(plan: QuantPlan) -> dict[str, Any]:
    """Return the config.json of what is written."""
    return {**plan.config_dict, "quantization_config": plan.config.to_dict()}


def check_room(folder: Path, needed_bytes: int, have_bytes: int = 0) -> None:
    """Check that there is room on the disk of a folder that exists.

    Args:
        folder: Where it will be written.
        needed_bytes: All of it.
        have_bytes: Of that, what is there already.

    Raises:
        NotEnoughDiskError: There is not.
    """
    free, missing = shutil.disk_usage(folder).free, needed_bytes - have_bytes
    if missing > free:
        msg = (
            f"{folder} has room for {free / 1e9:.2f} GB, {missing / 1e9:.2f} GB are needed. Make "
            "room, choose another folder, or a smaller format."
        )
        raise NotEnoughDiskError(msg)


def fingerprint(checkpoint: Checkpoint, made: str) -> str:
    """Return a digest that changes when the source or what is made of it does.

    Of each file of the source: its size, when it was changed, its header, and pages from all over
    it. A checkpoint is not read whole for it: that would take as long as packing it.
    """
    digest = hashlib.sha256(made.encode())
    described = sorted(
        (n, i.file.name, i.dtype, i.shape, i.offset) for n, i in checkpoint.tensors.items()
    )
    digest.update(json.dumps(described).encode())
    for file in sorted({info.file for info in checkpoint.tensors.values()}):
        stat = file.stat()
        digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
        with file.open("rb") as stream:
            for sample in range(_SAMPLES):
                stream.seek(max(0, stat.st_size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _shards(
    checkpoint: Checkpoint, layers: Sequence[LayerPlan], packed: Collection[str]
) -> dict[str, list[str]]:
    """Give every tensor that is not packed to a file, in the order of their names."""
    taken = {
        name
        for plan in layers
        for tensors in plan.tensors.values()
        for expert in range(plan.site.spec.num_experts)
        for name in tensors.names(expert)
    }
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(set(checkpoint.tensors) - taken - set(packed)):
        if size > 0 and size + checkpoint.tensors[name].size_bytes > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += checkpoint.tensors[name].size_bytes
    count = len(shards)
    return {f"dense-{n:05}-of-{count:05}.safetensors": s for n, s in enumerate(shards, 1) if s}


def _is_copied(file: Path) -> bool:
    return file.is_file() and not any(fnmatch.fnmatch(file.name, p) for p in _NOT_COPIED)
