"""Quantise the experts of one layer, in parallel and in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import torch

from kt_core.engine.expert_inputs import ExpertInputs
from kt_core.engine.in_order import in_order
from kt_core.engine.loading import read_expert
from kt_core.engine.quantize_expert import Method, quantize_expert
from kt_core.engine.quantize_plan import LayerPlan
from kt_core.engine.quantize_report import LayerReport, Squares
from kt_core.errors import CheckpointError
from kt_core.interfaces.checks import check_finite, check_weights
from kt_core.packed.codec import pack

Inputs: TypeAlias = Callable[[int], ExpertInputs]
"""What an expert was given when the model read a text."""


@dataclass(slots=True)
class LayerWorker:
    """Quantises the experts of one layer in parallel, and gives them out in order.

    In memory are a few experts for each thread: as many as are under way.
    """

    plan: LayerPlan
    method: Method
    threads: int
    inputs: Inputs | None
    on_expert: Callable[[int], None]
    _squares: list[Squares] = field(default_factory=list)

    def packed_experts(self) -> Iterator[torch.Tensor]:
        """Yield the packed bytes of each expert."""
        experts = range(self.plan.site.spec.num_experts)
        jobs = (partial(self._quantize, expert) for expert in experts)
        for done, (packed, squares) in enumerate(in_order(jobs, self.threads), start=1):
            self._squares.append(squares)
            yield packed
            self.on_expert(done)

    def report(self) -> LayerReport:
        """Say how it came out, when all experts were asked for."""
        layer = self.plan.layer
        bits = 8 * layer.size_bytes / self.plan.num_weights
        return LayerReport.of(layer.name, layer.weight_format, bits, self._squares)

    def _quantize(self, expert: int) -> tuple[torch.Tensor, Squares]:
        """Return the packed bytes, and squared errors and squared weights."""
        plan = self.plan
        spec, descriptor = plan.site.spec, plan.weight_format.descriptor
        try:
            weights = read_expert(plan.site, plan.tensors, plan.stored, expert)
            is_dense = isinstance(weights.up, torch.Tensor)
            inputs = self.inputs(expert) if self.inputs and is_dense else None
            quantized, squares = quantize_expert(
                weights, plan.weight_format, self.method, inputs, spec
            )
            check_weights(spec, descriptor, quantized)
            check_finite(quantized)
            return pack(quantized, spec, descriptor), squares
        except ValueError as error:
            names = [n for tensors in plan.tensors.values() for n in tensors.names(expert)]
            msg = f"expert {expert} of {plan.site.module_name}: {error} (from {', '.join(names)})"
            raise CheckpointError(msg) from error
