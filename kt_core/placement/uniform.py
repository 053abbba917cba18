"""The same part of every layer."""

from __future__ import annotations

from kt_core.interfaces import ExpertGrid, ExpertId, Placement, PlacementPolicy, RoutingStatistics
from kt_core.placement.order import by_use, fill, spread


class Uniform(PlacementPolicy):
    """Every layer gets the same part of its experts, the most used of each first.

    Both devices then have the same share of work in every layer. Where nothing is known about use,
    the experts are evenly spread over the ids of a layer, shifted from layer to layer.
    """

    name = "uniform"
    description = "the same part of every layer, its most used experts"

    def place(
        self, statistics: RoutingStatistics, budget_bytes: int, grid: ExpertGrid
    ) -> Placement:
        """Take the best of each layer, then the second best of each, and so on."""
        ranked: list[tuple[float, float, ExpertId]] = []
        for layer, experts in enumerate(by_use(statistics, grid)):
            # Where the budget ends within a rank, no end of the model is favoured.
            turn = spread(ExpertId(0, layer))
            for rank, expert_id in enumerate(experts):
                ranked.append(((rank + 0.5) / len(experts), turn, expert_id))
        return fill((expert_id for _, _, expert_id in sorted(ranked)), budget_bytes, grid)
