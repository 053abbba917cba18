"""Run a placement policy over a routing trace: what it hits, what it moves, how fast that would be.

Prefills are cut into chunks; a chunk and a decode step are one step each. A pair of token and
expert is a *hit* if the expert is resident when the step runs. Swaps are decided after a step and
their copies run beside the next one: while it runs, the evicted expert is gone already and the
loaded one not there yet. A swap costs bytes, never time: it gets no more of the link than
``link_share`` of the time the steps take (see ``machine.LinkBudget``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kt_core.interfaces import ExpertGrid, Placement, PlacementPolicy, RoutingStatistics, Swap
from kt_core.placement.machine import LinkBudget, Machine
from kt_core.placement.trace import RoutingTrace

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Tokens that go through the model together.

    Attributes:
        start: Number of the first token.
        stop: Number after the last.
        is_decode: Whether it continues an answer.
    """

    start: int
    stop: int
    is_decode: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Simulation:
    """What one policy did on one trace with one budget.

    Attributes:
        policy: Its name.
        hot_fraction: Budget over the bytes of all experts.
        budget_bytes: Bytes for experts on the accelerator.
        steps: What was run.
        pairs: ``[steps]`` pairs of token and expert.
        hits: ``[steps]`` those whose expert was resident.
        seconds: ``[steps]`` predicted.
        granted_bytes: ``[steps]`` what might have been loaded after each step.
        moved_bytes: ``[steps]`` what was loaded after each step. What it replaced goes back over
            the link too, the other way, unless the host kept a copy.
    """

    policy: str
    hot_fraction: float
    budget_bytes: int
    steps: tuple[Step, ...]
    pairs: npt.NDArray[np.int64]
    hits: npt.NDArray[np.int64]
    seconds: npt.NDArray[np.float64]
    granted_bytes: npt.NDArray[np.int64]
    moved_bytes: npt.NDArray[np.int64]

    def hit_rate(
        self, *, is_decode: bool | None = None, first: int = 0, last: int = 2**62
    ) -> float:
        """Return hits over pairs; NaN where there are none.

        Args:
            is_decode: Count decode steps only, or prefills only; None for both.
            first: Count steps that begin at this token or later.
            last: And before this one.
        """
        chosen = self._chosen(is_decode) & np.array([first <= s.start < last for s in self.steps])
        pairs = int(self.pairs[chosen].sum())
        return float(self.hits[chosen].sum()) / pairs if pairs else float("nan")

    def tokens_per_s(self, *, is_decode: bool) -> float:
        """Return the predicted speed of decode or of prefill; NaN where there is none."""
        chosen = self._chosen(is_decode)
        seconds = float(self.seconds[chosen].sum())
        tokens = sum(s.stop - s.start for s in self.steps if s.is_decode == is_decode)
        return tokens / seconds if seconds else float("nan")

    def _chosen(self, is_decode: bool | None) -> Mask:
        return np.array([is_decode is None or step.is_decode == is_decode for step in self.steps])


def steps_of(trace: RoutingTrace, prefill_chunk: int) -> Iterator[Step]:
    """Yield the steps of a trace, passes longer than ``prefill_chunk`` tokens in pieces."""
    at = 0
    for tokens, is_decode in zip(trace.step_tokens, trace.step_is_decode, strict=True):
        end = at + int(tokens)
        for start in range(at, end, prefill_chunk):
            stop = min(start + prefill_chunk, end)
            yield Step(start=start, stop=stop, is_decode=bool(is_decode))
        at = end


def mask_of(placement: Placement, grid: ExpertGrid) -> Mask:
    """Return ``grid.shape``, True where an expert is resident."""
    mask = np.zeros(grid.shape, dtype=np.bool_)
    for layer, ids in enumerate(placement.resident):
        mask[layer, list(ids)] = True
    return mask


def apply_swaps(swaps: Sequence[Swap], resident: Mask) -> None:
    """Change what is resident; the rules of ``OnlinePlacement.observe`` are checked.

    Raises:
        ValueError: An expert is evicted that is not resident, or loaded that is.
    """
    for load, evict in swaps:
        for victim in evict:
            if not resident[victim]:
                msg = f"{victim} is to be evicted, but is not resident"
                raise ValueError(msg)
            resident[victim] = False
        if resident[load]:
            msg = f"{load} is to be loaded, but is resident"
            raise ValueError(msg)
        resident[load] = True


def simulate(
    policy: PlacementPolicy,
    trace: RoutingTrace,
    *,
    hot_fraction: float,
    statistics: RoutingStatistics | None = None,
    machine: Machine | None = None,
    prefill_chunk: int = 512,
) -> Simulation:
    """Run ``policy`` over ``trace``.

    Args:
        policy: Whom to run.
        trace: What is routed where.
        hot_fraction: Budget over the bytes of all experts, 0 to 1.
        statistics: What the policy knows at start; None for nothing.
        machine: How fast the devices are; None for the defaults.
        prefill_chunk: Tokens of a prefill that go through together.

    Raises:
        ValueError: The policy broke its contract: over budget, or a swap that cannot be.
    """
    grid = trace.grid
    machine = machine or Machine()
    known = statistics or RoutingStatistics.unknown(grid)
    run = _Run(policy, trace, machine, round(hot_fraction * grid.total_bytes), known)
    steps = tuple(steps_of(trace, prefill_chunk))
    rows = [run.step(step) for step in steps]
    pairs, hits, seconds, granted, moved = (np.array(column) for column in zip(*rows, strict=True))
    return Simulation(
        policy=policy.name,
        hot_fraction=hot_fraction,
        budget_bytes=run.budget_bytes,
        steps=steps,
        pairs=pairs,
        hits=hits,
        seconds=seconds,
        granted_bytes=granted,
        moved_bytes=moved,
    )


class _Run:
    """The state of one simulation."""

    def __init__(
        self,
        policy: PlacementPolicy,
        trace: RoutingTrace,
        machine: Machine,
        budget_bytes: int,
        statistics: RoutingStatistics,
    ) -> None:
        grid = trace.grid
        self.budget_bytes = budget_bytes
        self._policy = policy.name
        self._trace = trace
        self._machine = machine
        self._sizes = np.array(grid.expert_bytes, dtype=np.int64)
        self._ops = 2.0 * np.array(trace.expert_weights)
        self._online = policy.online(statistics, budget_bytes, grid)
        self._resident = mask_of(policy.place(statistics, budget_bytes, grid), grid)
        self._check(self._resident)
        self._link = LinkBudget(
            machine.link_bytes_per_s * machine.link_share,
            largest_expert_bytes=int(self._sizes.max()),
        )
        self._next = self._resident  # when the copies under way are done

    def step(self, step: Step) -> tuple[int, int, float, int, int]:
        """Return pairs, hits, seconds, bytes granted and bytes moved."""
        counts = self._trace.counts(step.start, step.stop)
        present = self._resident & self._next  # what is evicted is gone, what is loaded not here
        seconds = self._machine.step_s(
            counts,
            present,
            expert_bytes=self._sizes,
            expert_ops=self._ops,
            dense_bytes=self._trace.dense_bytes,
        )
        hits = int(counts[present].sum())
        self._resident = self._next  # the copies are done
        granted = moved = 0
        if self._online is not None:
            granted, moved = self._link.grant(seconds), self._observe(counts, step, seconds)
        return int(counts.sum()), hits, seconds, granted, moved

    def _observe(self, counts: npt.NDArray[np.int64], step: Step, seconds: float) -> int:
        assert self._online is not None
        granted = self._link.grant(0)
        swaps = self._online.observe(
            counts, self._resident, tokens=step.stop - step.start, link_bytes=granted
        )
        if not swaps:
            return 0
        after = self._resident.copy()
        apply_swaps(swaps, after)
        self._check(after)
        moved = sum(int(self._sizes[swap.load.layer]) for swap in swaps)
        self._link.spend(moved)
        self._next = after
        return moved

    def _check(self, resident: Mask) -> None:
        used: Any = (resident.sum(axis=1) * self._sizes).sum()
        if used > self.budget_bytes:
            msg = f"policy {self._policy!r} uses {used} bytes of {self.budget_bytes}"
            raise ValueError(msg)
