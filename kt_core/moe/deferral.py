"""Expert deferral: the least of a token's cold pairs may come one layer late.

The host computes them while the accelerator is at the next layer's attention already, and their sum
is added to the next layer's output. The answer is another one than without, if little: so it is off
unless asked for, and never happens in the last layer, which has no next one. (Chen et al.,
KTransformers, SOSP 2025, where the idea is from.)
"""

from __future__ import annotations

import torch

from kt_core.interfaces import ExpertKernel, ExpertWeights, Ticket
from kt_core.moe.host_lane import HostLane
from kt_core.types import ActivationPrecision


class Deferral:
    """What the layers of one engine have put off.

    Attributes:
        per_token: Pairs that each token may put off in a layer; 0 turns it off. May be changed
            between forward passes.
    """

    def __init__(self, per_token: int = 0) -> None:
        """Begin with nothing put off."""
        self.per_token = per_token
        self._pending: Ticket | None = None

    def choose(self, cold: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Return which pairs are put off, ``[tokens, k]`` bool: cold ones of the lowest weight.

        At least one pair of a token is not.

        Args:
            cold: ``[tokens, k]`` bool: pairs that the host computes.
            weights: ``[tokens, k]`` routing weights.
        """
        count = min(self.per_token, weights.shape[1] - 1)
        lowest = weights.masked_fill(~cold, torch.inf).argsort(dim=1, stable=True)[:, :count]
        return torch.zeros_like(cold).scatter(1, lowest, value=True) & cold

    def put_off(self, ticket: Ticket) -> None:
        """Leave work for the next layer."""
        self._pending = ticket

    def take(self) -> Ticket | None:
        """Return what the layer before has put off; None if that was nothing."""
        pending, self._pending = self._pending, None
        return pending


class DeferringLane(ExpertKernel):
    """A host lane whose layer may put pairs off, and adds what the layer before has put off."""

    def __init__(self, lane: HostLane, late: HostLane | None, deferral: Deferral) -> None:
        """Take the lanes of one kernel.

        Args:
            lane: For what is wanted at once.
            late: For what is put off, with buffers that no layer next to this one has; None in
                the last layer.
            deferral: Shared by all layers.
        """
        self.spec = lane.spec
        self.weight_format = lane.weight_format
        self.moves_packed = lane.moves_packed
        self._lane, self._late = lane, late
        self._deferral = deferral

    @property
    def bytes_per_expert(self) -> int:
        """See ``HostLane.bytes_per_expert``."""
        return self._lane.bytes_per_expert

    def precision_for(self, hidden_type: torch.dtype) -> ActivationPrecision | None:
        """See ``ExpertKernel.precision_for``."""
        return self._lane.precision_for(hidden_type)

    def load(self, expert: int, weights: ExpertWeights) -> None:
        """See ``ExpertKernel.load``."""
        self._lane.load(expert, weights)

    def packed(self, expert: int) -> torch.Tensor:
        """See ``HostLane.packed``."""
        return self._lane.packed(expert)

    def load_packed(self, expert: int, packed: torch.Tensor) -> None:
        """See ``HostLane.load_packed``."""
        self._lane.load_packed(expert, packed)

    def unload(self, expert: int) -> None:
        """See ``HostLane.unload``."""
        self._lane.unload(expert)

    def resident(self) -> frozenset[int]:
        """See ``ExpertKernel.resident``."""
        return self._lane.resident()

    def submit(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> Ticket:
        """See ``ExpertKernel.submit``."""
        before = self._deferral.take()
        if self._late is None or self._deferral.per_token == 0 or not expert_ids.shape[0]:
            return _Sum(self._lane.submit(hidden, expert_ids, weights), before)
        put_off = self._deferral.choose(expert_ids >= 0, weights)
        now = self._lane.submit(hidden, torch.where(put_off, -1, expert_ids), weights)
        self._deferral.put_off(
            self._late.submit(hidden, torch.where(put_off, expert_ids, -1), weights)
        )
        return _Sum(now, before)

    def raise_error(self) -> None:
        """See ``HostLane.raise_error``."""
        for lane in (self._lane, self._late):
            if lane is not None:
                lane.raise_error()


class _Sum(Ticket):
    """What is wanted now, and what the layer before has put off."""

    def __init__(self, now: Ticket, before: Ticket | None) -> None:
        self._now, self._before = now, before

    def wait(self) -> torch.Tensor:
        out = self._now.wait()
        return out if self._before is None else out + self._before.wait()
