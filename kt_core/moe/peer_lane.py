"""The way of a layer's pairs to a second accelerator and back."""

from __future__ import annotations

import torch

from kt_core.interfaces import ExpertKernel, Ticket
from kt_core.moe.lane import Lane


class PeerLane(Lane):
    """A kernel of one accelerator that takes and returns tensors of another one.

    Copies between devices are ordered with the current streams of both, as torch does it.

    Attributes:
        device: Where the kernel computes.
    """

    def __init__(self, kernel: ExpertKernel, device: torch.device) -> None:
        """Stand for ``kernel``, which computes on ``device``, wherever hidden states come from."""
        super().__init__(kernel)
        self.device = device

    def submit(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> Ticket:
        """See ``ExpertKernel.submit``."""
        there = (
            tensor.to(self.device, non_blocking=True) for tensor in (hidden, expert_ids, weights)
        )
        return _Back(self.kernel.submit(*there), hidden.device)


class _Back(Ticket):
    """An output on its way back."""

    def __init__(self, ticket: Ticket, device: torch.device) -> None:
        self._ticket = ticket
        self._device = device

    def wait(self) -> torch.Tensor:
        return self._ticket.wait().to(self._device, non_blocking=True)
