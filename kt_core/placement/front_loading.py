"""Whole layers, from the first on."""

from __future__ import annotations

from kt_core.interfaces import ExpertGrid, Placement, PlacementPolicy, RoutingStatistics
from kt_core.placement.order import by_use, fill


class FrontLoading(PlacementPolicy):
    """Whole layers from the first on, so that most layers need one device only.

    Fewer crossings of the link per token, at the price of experts that are hardly used. Of the
    layer where the budget ends, the most used.
    """

    name = "front-loading"
    description = "whole layers from the first on"

    def place(
        self, statistics: RoutingStatistics, budget_bytes: int, grid: ExpertGrid
    ) -> Placement:
        """Take one layer after the other."""
        layers = by_use(statistics, grid)
        return fill((expert_id for layer in layers for expert_id in layer), budget_bytes, grid)
