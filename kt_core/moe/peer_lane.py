"""The way of a layer's pairs to a second accelerator and back."""

from __future__ import annotations

import torch

from kt_core.interfaces import ExpertKernel, ExpertWeights, Ticket


class PeerLane(ExpertKernel):
    """A kernel of one accelerator that takes and returns tensors of another one.

    Copies between devices are ordered with the current streams of both, as torch does it.
    """

    def __init__(self, kernel: ExpertKernel, device: torch.device) -> None:
        """Stand for ``kernel``, which computes on ``device``, wherever hidden states come from."""
        self.spec = kernel.spec
        self.weight_format = kernel.weight_format
        self.moves_packed = kernel.moves_packed
        self.kernel = kernel
        self._device = device

    @property
    def bytes_per_expert(self) -> int:
        """See ``ExpertKernel.bytes_per_expert``."""
        return self.kernel.bytes_per_expert

    def load(self, expert: int, weights: ExpertWeights) -> None:
        """See ``ExpertKernel.load``."""
        self.kernel.load(expert, weights)

    def packed(self, expert: int) -> torch.Tensor:
        """See ``ExpertKernel.packed``."""
        return self.kernel.packed(expert)

    def load_packed(self, expert: int, packed: torch.Tensor) -> None:
        """See ``ExpertKernel.load_packed``."""
        self.kernel.load_packed(expert, packed)

    def unload(self, expert: int) -> None:
        """See ``ExpertKernel.unload``."""
        self.kernel.unload(expert)

    def resident(self) -> frozenset[int]:
        """See ``ExpertKernel.resident``."""
        return self.kernel.resident()

    def submit(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> Ticket:
        """See ``ExpertKernel.submit``."""
        there = (
            tensor.to(self._device, non_blocking=True) for tensor in (hidden, expert_ids, weights)
        )
        return _Back(self.kernel.submit(*there), hidden.device)


class _Back(Ticket):
    """An output on its way back."""

    def __init__(self, ticket: Ticket, device: torch.device) -> None:
        self._ticket = ticket
        self._device = device

    def wait(self) -> torch.Tensor:
        return self._ticket.wait().to(self._device, non_blocking=True)
