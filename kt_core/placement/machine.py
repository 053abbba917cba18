"""How long a step takes on a machine described by a few numbers: a model, not a measurement.

For each layer, the two devices work at the same time, each bound by memory or by arithmetic::

    accelerator = max(hot bytes  / accelerator_bytes_per_s, hot ops  / accelerator_ops_per_s)
    cpu         = max(cold bytes / cpu_bytes_per_s,         cold ops / cpu_ops_per_s)
    layer       = max(accelerator, cpu)
    step        = dense_bytes / accelerator_bytes_per_s + the sum over the layers

Bytes are those of the experts with at least one token (each is read once per step), ops are two for
each weight of each pair. Left out: attention, launches, activations over the link. So it compares
placements; it does not replace a benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

# Part of the link's time that swaps may use, if nobody says otherwise.
LINK_SHARE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """An accelerator, a CPU, and the link between them.

    Attributes:
        link_bytes_per_s: From host memory to the accelerator.
        link_share: Part of the link's time that swaps may use.
        accelerator_bytes_per_s: Reading its own memory.
        accelerator_ops_per_s: Products in the format's arithmetic; a multiply-add is two.
        cpu_bytes_per_s: Reading host memory, all threads together.
        cpu_ops_per_s: As the accelerator's.
    """

    # 32 GB/s is PCIe 4.0 x16 in one direction (PCI-SIG); 25 of them are what issue 4 assumes.
    link_bytes_per_s: float = 25e9
    link_share: float = LINK_SHARE
    # NVIDIA Ada whitepaper, GeForce RTX 4090: 1008 GB/s; 165.2 TFLOPS dense bf16, float32 sums.
    accelerator_bytes_per_s: float = 1008e9
    accelerator_ops_per_s: float = 165.2e12
    # Two channels of DDR5-5600 (JEDEC): 2 x 8 bytes x 5.6e9. The ops are a guess for 16 cores.
    cpu_bytes_per_s: float = 89.6e9
    cpu_ops_per_s: float = 2e12

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                msg = f"{field.name} must be > 0, got {getattr(self, field.name)}"
                raise ValueError(msg)
        if self.link_share > 1:
            msg = f"link_share is a part of 1, got {self.link_share}"
            raise ValueError(msg)

    def step_s(
        self,
        counts: npt.NDArray[np.int64],
        resident: npt.NDArray[np.bool_],
        *,
        expert_bytes: npt.NDArray[Any],
        expert_ops: npt.NDArray[Any],
        dense_bytes: float,
    ) -> float:
        """Return the seconds of one step.

        Args:
            counts: ``[layers, experts]`` pairs.
            resident: ``[layers, experts]``.
            expert_bytes: ``[layers]``.
            expert_ops: ``[layers]``, of one pair.
            dense_bytes: Of everything but the experts.
        """
        hot = np.where(resident, counts, 0)
        cold = counts - hot
        accelerator = np.maximum(
            np.count_nonzero(hot, axis=1) * expert_bytes / self.accelerator_bytes_per_s,
            hot.sum(axis=1) * expert_ops / self.accelerator_ops_per_s,
        )
        cpu = np.maximum(
            np.count_nonzero(cold, axis=1) * expert_bytes / self.cpu_bytes_per_s,
            cold.sum(axis=1) * expert_ops / self.cpu_ops_per_s,
        )
        layers = float(np.maximum(accelerator, cpu).sum())
        return dense_bytes / self.accelerator_bytes_per_s + layers


class LinkBudget:
    """The bytes that swaps may load: what the link carries while steps run, and no savings.

    A share of the link that nobody used is gone. Only as much is kept as one expert needs, so that
    experts larger than a step's share can move at all.
    """

    def __init__(self, bytes_per_s: float, *, largest_expert_bytes: int) -> None:
        """Start with nothing.

        Args:
            bytes_per_s: The share of the link that swaps may use.
            largest_expert_bytes: What may be saved up.
        """
        self._bytes_per_s = bytes_per_s
        self._most_saved = largest_expert_bytes
        self._saved = 0.0

    def grant(self, step_s: float) -> int:
        """Return what may be loaded, after a step that took so long."""
        earned = self._bytes_per_s * step_s
        self._saved = min(self._saved + earned, max(earned, self._most_saved))
        return int(self._saved)

    def spend(self, size_bytes: int) -> None:
        """Take off what was loaded, at most what was granted."""
        if size_bytes > self._saved:
            msg = f"{size_bytes} bytes were loaded, {self._saved:.0f} were granted"
            raise ValueError(msg)
        self._saved -= size_bytes
