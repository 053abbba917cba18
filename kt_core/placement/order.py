"""In which order to load experts: what the static policies are made of."""

from __future__ import annotations

from collections.abc import Iterable

from kt_core.interfaces import ExpertGrid, ExpertId, Placement, RoutingStatistics

# Multiples of the golden ratio fill the unit interval evenly, however many there are
# (three-distance theorem, Sos 1958); those of the root of two shift it from layer to layer.
_GOLDEN, _ROOT = 0.6180339887498949, 0.4142135623730951


def spread(expert_id: ExpertId) -> float:
    """Return a number in 0..1 such that the n lowest of a layer are evenly spread over its ids.

    For ties. Checkpoints order experts by nothing in particular, but not at random either: ids in a
    row may be copies of one another (upcycled models) or one group of the router.
    """
    return (expert_id.expert * _GOLDEN + expert_id.layer * _ROOT) % 1.0


def by_use(statistics: RoutingStatistics, grid: ExpertGrid) -> list[list[ExpertId]]:
    """Return the experts of each layer, the most used first; evenly spread where nothing is known.

    Raises:
        ValueError: The statistics are of another grid.
    """
    statistics.check_fits(grid)

    def rank(expert_id: ExpertId) -> tuple[float, float]:
        return -statistics.counts[expert_id.layer][expert_id.expert], spread(expert_id)

    layers: list[list[ExpertId]] = [[] for _ in range(grid.num_layers)]
    for expert_id in sorted(grid.expert_ids(), key=rank):
        layers[expert_id.layer].append(expert_id)
    return layers


def fill(order: Iterable[ExpertId], budget_bytes: int, grid: ExpertGrid) -> Placement:
    """Load in this order whatever still fits.

    Raises:
        ValueError: The budget is negative.
    """
    if budget_bytes < 0:
        msg = f"budget_bytes must be >= 0, got {budget_bytes}"
        raise ValueError(msg)
    chosen = []
    for expert_id in order:
        size = grid.expert_bytes[expert_id.layer]
        if size <= budget_bytes:
            budget_bytes -= size
            chosen.append(expert_id)
    return Placement.of(chosen, grid)
