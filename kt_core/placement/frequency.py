"""The most used experts, wherever they are."""

from __future__ import annotations

from kt_core.interfaces import ExpertGrid, ExpertId, Placement, PlacementPolicy, RoutingStatistics
from kt_core.placement.order import fill, spread


class Frequency(PlacementPolicy):
    """The most used experts per byte, over all layers together.

    The best placement that never changes, as far as the statistics foretell what will be used.
    """

    name = "frequency"
    description = "the most used experts of the whole model"

    def place(
        self, statistics: RoutingStatistics, budget_bytes: int, grid: ExpertGrid
    ) -> Placement:
        """Take the experts by use per byte; evenly spread ones where they are used alike."""
        statistics.check_fits(grid)

        def rank(expert_id: ExpertId) -> tuple[float, float]:
            uses = statistics.counts[expert_id.layer][expert_id.expert]
            return -uses / grid.expert_bytes[expert_id.layer], spread(expert_id)

        return fill(sorted(grid.expert_ids(), key=rank), budget_bytes, grid)
