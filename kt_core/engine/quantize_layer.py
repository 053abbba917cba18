"""Quantise the experts of one layer, in parallel and in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from kt_core.engine.quantize_expert import Method, quantize_expert
from kt_core.engine.quantize_plan import LayerPlan
from kt_core.errors import CheckpointError
from kt_core.interfaces import ExpertKernel


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


@dataclass(slots=True)
class LayerWorker:
    """Quantises the experts of one layer in parallel, and gives them out in order.

    In memory are a few experts for each thread: as many as are under way.
    """

    plan: LayerPlan
    kernel: ExpertKernel
    method: Method
    threads: int
    on_expert: Callable[[int], None]
    _squares: list[tuple[float, float]] = field(default_factory=list)

    def packed_experts(self) -> Iterator[torch.Tensor]:
        """Yield the packed bytes of each expert."""
        waiting: deque[Future[tuple[float, float]]] = deque()
        count = self.plan.site.spec.num_experts
        submitted = 0
        with ThreadPoolExecutor(self.threads, thread_name_prefix="kt-quant") as pool:
            try:
                for expert in range(count):
                    while submitted < min(count, expert + 2 * self.threads):
                        waiting.append(pool.submit(self._quantize, submitted))
                        submitted += 1
                    self._squares.append(waiting.popleft().result())
                    yield self.kernel.packed(expert).cpu()
                    self.kernel.unload(expert)
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

    def _quantize(self, expert: int) -> tuple[float, float]:
        site = self.plan.site
        rows = {name: tensors.read(expert) for name, tensors in self.plan.tensors.items()}
        try:
            weights = site.expert_weights(rows)
            quantized, squares = quantize_expert(weights, self.plan.weight_format, self.method)
            self.kernel.load(expert, quantized)
        except ValueError as error:
            names = [n for tensors in self.plan.tensors.values() for n in tensors.names(expert)]
            msg = f"expert {expert} of {site.module_name}: {error} (from {', '.join(names)})"
            raise CheckpointError(msg) from error
        return squares
