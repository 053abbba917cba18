"""Follows the routing while the engine runs: a cache over all layers and experts.

What is estimated is the rate of each expert, in pairs per token, twice: *slowly*, over some 700
tokens and with the statistics of earlier runs as a start, which is precise, and *fast*, over some
46 tokens, which is recent. Where the two differ more than chance explains (Pearson's chi-squared
test of one layer, after each step), the layer has begun to be used otherwise: its slow estimate is
dropped for the fast one, and grows precise again from there. So popularity that stays is known as
if by counting for ever, and popularity that changes is noticed within tens of tokens; a single
average is precise or quick, never both.

An expert is loaded in place of another when its rate is higher by more than one standard error of
the difference: this is the hysteresis that keeps experts of like use from changing places for ever.
It needs no size: what few tokens have shown must differ by much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kt_core.interfaces import (
    ExpertGrid,
    ExpertId,
    OnlinePlacement,
    Placement,
    PlacementPolicy,
    RoutingStatistics,
    Swap,
)
from kt_core.placement.frequency import Frequency

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from kt_core.interfaces.placement_policy import Counts, Mask

# Chosen among others on synthetic traces and those of a small model: docs/placement.md.
SLOW_HALF_LIFE, FAST_HALF_LIFE = 512.0, 32.0  # tokens
CHANGE_SIGMAS, SWAP_SIGMAS = 4.0, 1.0
# Swaps are listed one by one, in Python: a bound on the time of one step, not on the link.
MOST_SWAPS = 256


class Adaptive(PlacementPolicy):
    """Starts as ``frequency`` does, then follows what is used. See the module."""

    name = "adaptive"
    description = "starts as frequency, then follows what is used, within a share of the link"

    def place(
        self, statistics: RoutingStatistics, budget_bytes: int, grid: ExpertGrid
    ) -> Placement:
        """Take the most used experts, as ``frequency`` does."""
        return Frequency().place(statistics, budget_bytes, grid)

    def online(
        self, statistics: RoutingStatistics, budget_bytes: int, grid: ExpertGrid
    ) -> AdaptivePlacement:
        """Return what follows the routing of one engine."""
        return AdaptivePlacement(statistics, budget_bytes, grid)


class AdaptivePlacement(OnlinePlacement):
    """The estimates of one engine.

    All arrays are ``[layers, experts]``; experts that a narrower layer lacks have rate 0 and are
    never asked for, so they never move.
    """

    def __init__(self, statistics: RoutingStatistics, budget_bytes: int, grid: ExpertGrid) -> None:
        """Begin with the statistics, as if the latest tokens had been like them."""
        import numpy as np

        statistics.check_fits(grid)
        self._grid, self._budget_bytes = grid, budget_bytes
        self._sizes = np.array(grid.expert_bytes, dtype=np.int64)
        self._num_experts = np.array(grid.num_experts)
        rate = np.zeros(grid.shape, dtype=np.float32)
        for layer, counts in enumerate(statistics.counts):
            rate[layer, : len(counts)] = counts
        rate /= max(statistics.tokens, 1)
        # Tokens that an average over all past ones amounts to, as decay leaves them.
        slow = min(statistics.tokens, SLOW_HALF_LIFE / math.log(2))
        fast = min(statistics.tokens, FAST_HALF_LIFE / math.log(2))
        self._slow, self._slow_tokens = rate * slow, np.full((grid.num_layers, 1), slow, "float32")
        self._fast, self._fast_tokens = rate * fast, fast

    def observe(
        self, counts: Counts, resident: Mask, *, tokens: int, link_bytes: int
    ) -> Sequence[Swap]:
        """Take note of a step; load what is used more than what it replaces."""
        self._learn(counts, tokens)
        if link_bytes < self._sizes.min():
            return []
        rate = self._slow / self._slow_tokens
        # Variance of a Poisson count over n tokens, as a rate: rate / n.
        return self._swaps(rate, rate / self._slow_tokens, resident, link_bytes)

    def _learn(self, counts: Counts, tokens: int) -> None:
        import numpy as np

        slow_part = 0.5 ** (tokens / SLOW_HALF_LIFE)  # of the past that is left
        self._slow *= slow_part
        self._slow += counts
        self._slow_tokens *= slow_part
        self._slow_tokens += tokens
        fast_part = 0.5 ** (tokens / FAST_HALF_LIFE)
        self._fast *= fast_part
        self._fast += counts
        self._fast_tokens = self._fast_tokens * fast_part + tokens
        expected = self._slow * (self._fast_tokens / self._slow_tokens)
        # A sum of Poisson counts that fade with d has variance mean / (1 + d), about mean / 2. The
        # half added keeps experts that are hardly ever used from deciding the test.
        surprise = np.square(self._fast - expected) / (0.5 * expected + 0.5)
        excess = surprise.sum(axis=1) - self._num_experts
        is_changed = excess > CHANGE_SIGMAS * np.sqrt(2.0 * self._num_experts)
        if is_changed.any():
            self._slow[is_changed] = self._fast[is_changed]
            self._slow_tokens[is_changed] = self._fast_tokens

    def _swaps(
        self,
        rate: NDArray[np.float32],
        variance: NDArray[np.float32],
        resident: Mask,
        link_bytes: int,
    ) -> list[Swap]:
        """Pair the most used of the others with the least used residents, per byte."""
        import numpy as np

        width = self._grid.shape[1]
        worth = (rate / self._sizes[:, None]).ravel()
        is_resident = resident.ravel()
        free = self._budget_bytes - int((resident.sum(axis=1) * self._sizes).sum())
        floor = 0.0 if free >= self._sizes.min() else worth[is_resident].min(initial=np.inf)
        wanted = np.flatnonzero(~is_resident & (worth > floor))
        most = min(link_bytes // int(self._sizes.min()), MOST_SWAPS)
        wanted = _best(wanted, -worth, most)
        if not len(wanted):
            return []
        victims = np.flatnonzero(is_resident & (worth < worth[wanted[0]]))
        victims = _best(victims, worth, 4 * len(wanted))
        leaving = self._of_cells(victims, rate, variance)
        swaps: list[Swap] = []
        first = 0  # of the victims that are left, the least used first
        for cell, size, cell_rate, cell_variance in self._of_cells(wanted, rate, variance):
            last, room, gain, noise = first, free, cell_rate, cell_variance
            while room < size and last < len(leaving):
                _, victim_size, victim_rate, victim_variance = leaving[last]
                room, last = room + victim_size, last + 1
                gain, noise = gain - victim_rate, noise + victim_variance
            evict = [victim for victim, *_ in leaving[first:last]]
            is_better = not evict or gain > SWAP_SIGMAS * math.sqrt(noise)
            if room < size or size > link_bytes or not is_better:
                continue
            first, free, link_bytes = last, room - size, link_bytes - size
            ids = [ExpertId(*divmod(victim, width)) for victim in evict]
            swaps.append(Swap(ExpertId(*divmod(cell, width)), tuple(ids)))
        return swaps

    def _of_cells(
        self, cells: NDArray[np.int64], rate: NDArray[np.float32], variance: NDArray[np.float32]
    ) -> list[tuple[int, int, float, float]]:
        """Return each cell with its bytes, rate and variance, as Python's numbers."""
        sizes = self._sizes[cells // self._grid.shape[1]]
        columns = (cells, sizes, rate.ravel()[cells], variance.ravel()[cells])
        return list(zip(*(column.tolist() for column in columns), strict=True))


def _best(cells: NDArray[np.int64], key: NDArray[Any], most: int) -> NDArray[np.int64]:
    """Return the ``most`` cells of the lowest keys, in order of the keys."""
    import numpy as np

    if 0 < most < len(cells):
        cells = cells[np.argpartition(key[cells], most - 1)[:most]]
    return cells[np.argsort(key[cells], kind="stable")][:most]
