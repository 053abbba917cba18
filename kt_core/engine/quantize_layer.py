"""Quantise the experts of one layer, in parallel and in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from kt_core.engine.loading import read_expert
from kt_core.engine.quantize_expert import Method, quantize_expert
from kt_core.engine.quantize_plan import LayerPlan
from kt_core.errors import CheckpointError
from kt_core.interfaces import ExpertWeights
from kt_core.interfaces.checks import check_finite, check_weights
from kt_core.packed.codec import pack


@dataclass(frozen=True, slots=True)
class LayerReport:
    """How one layer came out.

    Attributes:
        name: Path of the experts module.
        format: What its experts became.
        bits_per_weight: Bits of a packed expert by its weights, padding and biases included.
        relative_error: Root of the squared errors of all weights by the squared weights.
    """

    name: str
    format: str
    bits_per_weight: float
    relative_error: float


Importance: TypeAlias = Callable[[int, ExpertWeights], Mapping[str, torch.Tensor]]
"""What the inputs of each projection of an expert are worth, by the projection's name."""


@dataclass(slots=True)
class LayerWorker:
    """Quantises the experts of one layer in parallel, and gives them out in order.

    In memory are a few experts for each thread: as many as are under way.
    """

    plan: LayerPlan
    method: Method
    threads: int
    importance: Importance | None
    on_expert: Callable[[int], None]
    _squares: list[tuple[float, float]] = field(default_factory=list)

    def packed_experts(self) -> Iterator[torch.Tensor]:
        """Yield the packed bytes of each expert."""
        waiting: deque[Future[tuple[torch.Tensor, tuple[float, float]]]] = deque()
        count = self.plan.site.spec.num_experts
        submitted = 0
        with ThreadPoolExecutor(self.threads, thread_name_prefix="kt-quant") as pool:
            try:
                for expert in range(count):
                    while submitted < min(count, expert + 2 * self.threads):
                        waiting.append(pool.submit(self._quantize, submitted))
                        submitted += 1
                    packed, squares = waiting.popleft().result()
                    self._squares.append(squares)
                    yield packed
                    self.on_expert(expert + 1)
            except BaseException:  # Ctrl-C too: start no more, then let it through
                pool.shutdown(cancel_futures=True)
                raise

    def report(self) -> LayerReport:
        """Say how it came out, when all experts were asked for."""
        errors, weights = (sum(column) for column in zip(*self._squares, strict=True))
        bits = 8 * self.plan.layer.size_bytes / self.plan.num_weights
        return LayerReport(
            name=self.plan.layer.name,
            format=self.plan.weight_format.descriptor.name,
            bits_per_weight=bits,
            relative_error=(errors / weights) ** 0.5 if weights else 0.0,
        )

    def _quantize(self, expert: int) -> tuple[torch.Tensor, tuple[float, float]]:
        """Return the packed bytes, and squared errors and squared weights."""
        plan = self.plan
        spec, descriptor = plan.site.spec, plan.weight_format.descriptor
        try:
            weights = read_expert(plan.site, plan.tensors, plan.stored, expert)
            is_dense = isinstance(weights.up, torch.Tensor)
            worth = self.importance(expert, weights) if self.importance and is_dense else None
            quantized, squares = quantize_expert(weights, plan.weight_format, self.method, worth)
            check_weights(spec, descriptor, quantized)
            check_finite(quantized)
            return pack(quantized, spec, descriptor), squares
        except ValueError as error:
            names = [n for tensors in plan.tensors.values() for n in tensors.names(expert)]
            msg = f"expert {expert} of {plan.site.module_name}: {error} (from {', '.join(names)})"
            raise CheckpointError(msg) from error
