"""Expert deferral: the least of a token's cold pairs may come one layer late.

The host computes them while the accelerator is at the next layer's attention already, and their sum
is added to the next layer's output. The answer is another one than without, if little: so it is off
unless asked for, and never happens in the last layer, which has no next one. (Chen et al.,
KTransformers, SOSP 2025, where the idea is from.)
"""

from __future__ import annotations

import torch

from kt_core.interfaces import HostCall, HostCallTimes, Ticket
from kt_core.moe.host_lane import HostLane
from kt_core.moe.lane import Lane
from kt_core.moe.timeline import Timeline


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


class DeferringLane(Lane):
    """A host lane whose layer may put pairs off, and adds what the layer before has put off."""

    def __init__(self, lane: HostLane, late: HostLane | None, deferral: Deferral) -> None:
        """Take the lanes of one kernel.

        Args:
            lane: For what is wanted at once.
            late: For what is put off, with buffers that no layer next to this one has; None in
                the last layer.
            deferral: Shared by all layers.
        """
        super().__init__(lane)
        self._late = late
        self._deferral = deferral

    def submit(
        self, hidden: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor
    ) -> Ticket:
        """See ``ExpertKernel.submit``."""
        before = self._deferral.take()
        if self._late is None or self._deferral.per_token == 0 or not expert_ids.shape[0]:
            return Sum(self.kernel.submit(hidden, expert_ids, weights), before)
        put_off = self._deferral.choose(expert_ids >= 0, weights)
        now = self.kernel.submit(hidden, torch.where(put_off, -1, expert_ids), weights)
        self._deferral.put_off(
            self._late.submit(hidden, torch.where(put_off, expert_ids, -1), weights)
        )
        return Sum(now, before)

    def record(self, is_on: bool, timeline: Timeline | None = None) -> None:
        """See ``Lane.record``."""
        super().record(is_on, timeline)
        if self._late is not None:
            self._late.record(is_on, timeline)

    def take_times(self) -> list[HostCallTimes]:
        """See ``Lane.take_times``."""
        late = [] if self._late is None else self._late.take_times()
        return sorted(super().take_times() + late)

    def take_captured(self) -> list[HostCall]:
        """See ``Lane.take_captured``."""
        late = [] if self._late is None else self._late.take_captured()
        return [*super().take_captured(), *late]


class Sum(Ticket):
    """What is wanted now, and what the layer before has put off."""

    def __init__(self, now: Ticket, before: Ticket | None) -> None:
        """Take both; ``before`` may be nothing."""
        self._now, self._before = now, before

    def wait(self) -> torch.Tensor:
        """Return their sum."""
        out = self._now.wait()
        return out if self._before is None else out + self._before.wait()
