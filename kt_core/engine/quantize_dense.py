"""Quantise dense layers: some rows at a time, in parallel and in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from transformers import PreTrainedModel

from kt_core.checkpoint import Checkpoint
from kt_core.checkpoint.packed_config import PackedDense
from kt_core.engine.dense_choice import choose_dense
from kt_core.engine.dense_loading import dense_tensors, parameters_of
from kt_core.engine.in_order import in_order
from kt_core.engine.quantize_expert import Method, quantize_matrix
from kt_core.engine.quantize_overrides import format_for
from kt_core.engine.quantize_report import LayerReport, Squares
from kt_core.engine.transformers_tensors import DenseTensor, find_sources
from kt_core.errors import CheckpointError
from kt_core.interfaces import ExpertsSite, WeightFormat
from kt_core.packed import LinearLayout, MatrixLayout
from kt_core.packed.codec import pack_matrix, padded_bias
from kt_core.packed.layout import PANEL
from kt_core.types import Format, LinearSpec

# Numbers that a thread works on at once: whole panels of about so many.
_PIECE_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class DensePlan:
    """One dense layer: where it comes from and what it becomes."""

    weight: DenseTensor
    bias: DenseTensor | None
    weight_format: WeightFormat
    layer: PackedDense


@dataclass(frozen=True, slots=True)
class DenseChoice:
    """All dense layers that are packed.

    Attributes:
        plans: The layers, in the order of the model.
        tensors: Names in the checkpoint of tensors that nobody else needs.
        names: Paths of all layers that could be packed.
    """

    plans: Sequence[DensePlan] = ()
    tensors: frozenset[str] = frozenset()
    names: Sequence[str] = ()

    def files(self, file_bytes: int) -> dict[str, list[DensePlan]]:
        """Give the layers to files of about so many bytes."""
        groups: list[list[DensePlan]] = []
        size = file_bytes
        for plan in self.plans:
            if size >= file_bytes:
                groups.append([])
                size = 0
            groups[-1].append(plan)
            size += plan.layer.size_bytes
        named = {}
        for number, plans in enumerate(groups, start=1):
            file = f"packed-dense-{number:05}-of-{len(groups):05}.safetensors"
            named[file] = [replace(p, layer=replace(p.layer, file=file)) for p in plans]
        return named


def plan_dense(
    model: PreTrainedModel,
    sites: Sequence[ExpertsSite],
    checkpoint: Checkpoint,
    weight_format: WeightFormat,
    overrides: Mapping[str, WeightFormat | None],
) -> DenseChoice:
    """Choose the layers, as ``kt_core.load`` does for the same ``dense_format``.

    Args:
        model: On the meta device, in the type that it is loaded as.
        sites: Its routed experts.
        checkpoint: Its tensors.
        weight_format: What the layers become.
        overrides: Other formats, by patterns of the layers' paths, the first that matches counts;
            None leaves a layer as it is.

    Raises:
        KtError: A tensor is missing or of another shape.
    """
    chosen = choose_dense(model, sites, _linear_bytes, weight_format.descriptor)
    sources = find_sources(checkpoint, model, parameters_of(chosen))
    readable, tensors = dense_tensors(model, sources, chosen)
    plans = []
    own: set[str] = set()
    for site in readable:
        become = format_for(site.names, weight_format, overrides)
        if become is None:
            continue
        layer = PackedDense(
            name=site.names[0], file="", weight_format=become.descriptor, spec=site.spec
        )
        bias = None if site.bias is None else tensors[site.bias]
        plans.append(DensePlan(tensors[site.weight], bias, become, layer))
        own.update(site.own_parameters)
    # A tied weight stays for its owner.
    gone = {name for parameter in own & set(tensors) for name in tensors[parameter].names()}
    names = [name for site in readable for name in site.names]
    return DenseChoice(plans, frozenset(gone), names)


def _linear_bytes(spec: LinearSpec, weight_format: Format) -> int:
    return LinearLayout.of(spec, weight_format).size_bytes


@dataclass(slots=True)
class DenseWorker:
    """Quantises one dense layer in parallel, and gives its bytes out in order."""

    plan: DensePlan
    method: Method
    threads: int
    on_done: Callable[[], None]
    _squares: list[Squares] = field(default_factory=list)

    def pieces(self) -> Iterator[torch.Tensor]:
        """Yield the packed bytes, some panels at a time; then the bias.

        Raises:
            CheckpointError: A number is NaN or infinite.
        """
        weight = self.plan.weight.read()
        rows = max(PANEL, _PIECE_ELEMENTS // weight.shape[1] // PANEL * PANEL)
        jobs = (partial(self._pack, part) for part in torch.split(weight, rows))
        for packed, squares in in_order(jobs, self.threads):
            self._squares.append(squares)
            yield packed
        if self.plan.bias is not None:
            bias, spec = self.plan.bias.read().float(), self.plan.layer.spec
            if not torch.isfinite(bias).all():
                names = ", ".join(self.plan.bias.names())
                msg = f"the bias of {self.plan.layer.name} holds a NaN or an infinity ({names})"
                raise CheckpointError(msg)
            whole = MatrixLayout.of(
                self.plan.layer.weight_format, spec.out_features, spec.in_features
            )
            yield padded_bias(bias, whole)
        self.on_done()

    def report(self) -> LayerReport:
        """Say how it came out, when everything was asked for."""
        spec = self.plan.layer.spec
        return LayerReport.of(
            self.plan.layer.name,
            self.plan.layer.weight_format,
            8 * self.plan.layer.size_bytes / (spec.in_features * spec.out_features),
            self._squares,
        )

    def _pack(self, rows: torch.Tensor) -> tuple[torch.Tensor, Squares]:
        try:
            quantized, squares = quantize_matrix(rows, self.plan.weight_format, self.method)
        except ValueError as error:
            names = ", ".join(self.plan.weight.names())
            msg = f"{self.plan.layer.name}: {error} (from {names})"
            raise CheckpointError(msg) from error
        layout = MatrixLayout.of(self.plan.layer.weight_format, *rows.shape)
        return pack_matrix(quantized, layout).flatten(), squares
