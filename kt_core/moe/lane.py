"""A kernel that stands for another one and computes in another way: base of the lanes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kt_core.interfaces import ExpertKernel, ExpertWeights, HostCall, HostCallTimes
from kt_core.moe.timeline import Timeline
from kt_core.types import ActivationPrecision


class Lane(ExpertKernel):
    """Holds no experts of its own: everything but ``submit`` is asked of ``kernel``.

    Attributes:
        kernel: Holds the experts.
    """

    def __init__(self, kernel: ExpertKernel) -> None:
        """Stand for ``kernel``."""
        self.spec = kernel.spec
        self.weight_format = kernel.weight_format
        self.moves_packed = kernel.moves_packed
        self.kernel = kernel

    @property
    def bytes_per_expert(self) -> int:
        """See ``ExpertKernel.bytes_per_expert``: bytes where the kernel is."""
        return self.kernel.bytes_per_expert

    @property
    def capture_version(self) -> int:
        """See ``ExpertKernel.capture_version``."""
        return self.kernel.capture_version

    def precision_for(self, hidden_type: torch.dtype) -> ActivationPrecision | None:
        """See ``ExpertKernel.precision_for``."""
        return self.kernel.precision_for(hidden_type)

    def load(self, expert: int, weights: ExpertWeights) -> None:
        """See ``ExpertKernel.load``."""
        self.kernel.load(expert, weights)

    def packed(self, expert: int) -> torch.Tensor:
        """See ``ExpertKernel.packed``."""
        return self.kernel.packed(expert)

    def load_packed(self, expert: int, packed: torch.Tensor) -> None:
        """See ``ExpertKernel.load_packed``."""
        self.kernel.load_packed(expert, packed)

    def gather_packed(self, experts: Sequence[int], out: torch.Tensor) -> None:
        """See ``ExpertKernel.gather_packed``."""
        self.kernel.gather_packed(experts, out)

    def load_packed_together(self, experts: Sequence[int], packed: torch.Tensor) -> None:
        """See ``ExpertKernel.load_packed_together``."""
        self.kernel.load_packed_together(experts, packed)

    def unload(self, expert: int) -> None:
        """See ``ExpertKernel.unload``."""
        self.kernel.unload(expert)

    def unload_all(self) -> None:
        """See ``ExpertKernel.unload_all``."""
        self.kernel.unload_all()

    def resident(self) -> frozenset[int]:
        """See ``ExpertKernel.resident``."""
        return self.kernel.resident()

    def record(self, is_on: bool, timeline: Timeline | None = None) -> None:
        """Keep the times of calls of the host from now on, or do not.

        Args:
            is_on: Whether to.
            timeline: Gets the copies to the host and back; None for nobody.
        """
        if isinstance(self.kernel, Lane):
            self.kernel.record(is_on, timeline)

    def take_times(self) -> list[HostCallTimes]:
        """Return the times of calls that the stream has passed, in the order of their starts."""
        return self.kernel.take_times() if isinstance(self.kernel, Lane) else []

    def take_captured(self) -> list[HostCall]:
        """Hand over the calls that were captured: whoever takes them keeps them while graphs live.

        What nobody takes, the lane keeps.
        """
        return self.kernel.take_captured() if isinstance(self.kernel, Lane) else []
