"""Any experts: what the other policies must beat."""

from __future__ import annotations

import random

from kt_core.interfaces import ExpertGrid, Placement, PlacementPolicy, RoutingStatistics
from kt_core.placement.order import fill


class Random(PlacementPolicy):
    """Any experts, always the same ones: the dice have a fixed seed."""

    name = "random"
    description = "any experts, whatever their use"

    def __init__(self, seed: int = 0) -> None:
        """Take the seed of the dice."""
        self._seed = seed

    def place(
        self, statistics: RoutingStatistics, budget_bytes: int, grid: ExpertGrid
    ) -> Placement:
        """Take the experts in random order."""
        statistics.check_fits(grid)
        order = grid.expert_ids()
        random.Random(self._seed).shuffle(order)
        return fill(order, budget_bytes, grid)
