"""Which of several accelerators an expert goes to.

Policies know one budget, of all together; memory is each one's own. The experts of a
layer are spread: accelerators compute at the same time, and the layer is done when the last one is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kt_core.interfaces import ExpertGrid, ExpertId, Placement, Swap

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Who has an expert, where accelerators are numbered from 1.
HOST = 0


@dataclass(slots=True)
class DeviceLoad:
    """What accelerators hold, the first one at index 0.

    Attributes:
        free_bytes: What each has left for experts.
        experts: For each layer and each of them, how many experts it has.
    """

    free_bytes: list[int]
    experts: list[list[int]]

    @classmethod
    def empty(cls, grid: ExpertGrid, room_bytes: Sequence[int]) -> DeviceLoad:
        """Return accelerators with so much room for experts, and none there."""
        return cls(list(room_bytes), [[0] * len(room_bytes) for _ in range(grid.num_layers)])

    @classmethod
    def of(
        cls, homes: NDArray[np.int64], grid: ExpertGrid, room_bytes: Sequence[int]
    ) -> DeviceLoad:
        """Return what they hold if experts are there: ``homes`` is ``grid.shape``, who has each."""
        import numpy as np

        load = cls.empty(grid, room_bytes)
        for layer, size in enumerate(grid.expert_bytes):
            held = np.bincount(homes[layer], minlength=len(room_bytes) + 1)[HOST + 1 :].tolist()
            load.experts[layer] = held
            for device, count in enumerate(held):
                load.free_bytes[device] -= count * size
        return load

    def move(self, layer: int, size_bytes: int, device: int, count: int) -> None:
        """Let ``count`` experts come to a device, numbered from 1; negative: go."""
        if device == HOST:
            return
        self.free_bytes[device - 1] -= count * size_bytes
        self.experts[layer][device - 1] += count

    def best(self, layer: int, size_bytes: int, preferred: Sequence[int] = ()) -> int | None:
        """Return who takes one more expert of a layer; None where nobody has room for it.

        That is whoever has the fewest experts of the layer; of these, one that is preferred; of
        these, the one with the most room.
        """
        able = [n for n, free in enumerate(self.free_bytes, start=1) if free >= size_bytes]
        if not able:
            return None
        held = self.experts[layer]
        return min(
            able, key=lambda n: (held[n - 1], n not in preferred, -self.free_bytes[n - 1], n)
        )


def spread(
    placement: Placement, grid: ExpertGrid, room_bytes: Sequence[int]
) -> dict[ExpertId, int]:
    """Return the accelerator of each resident expert, numbered from 1.

    Experts that none of them has room for are left out: together they may have room for what is in
    no single one.
    """
    load, homes = DeviceLoad.empty(grid, room_bytes), {}
    for layer, ids in enumerate(placement.resident):
        size = grid.expert_bytes[layer]
        for expert in ids:
            if (device := load.best(layer, size)) is not None:
                load.move(layer, size, device, 1)
                homes[ExpertId(layer, expert)] = device
    return homes


def direct(
    swaps: Sequence[Swap], homes: NDArray[np.int64], grid: ExpertGrid, room_bytes: Sequence[int]
) -> list[tuple[Swap, int]]:
    """Return each swap with the accelerator that gets its expert, numbered from 1.

    Args:
        swaps: In the order in which they are done.
        homes: ``grid.shape``: who has each expert before them, ``HOST`` or a number from 1.
        grid: All experts.
        room_bytes: What each accelerator has for experts.

    A swap is left out where no single accelerator has room for its expert even then.
    """
    load, directed = DeviceLoad.of(homes, grid, room_bytes), []
    for swap in swaps:
        layer, size = swap.load.layer, grid.expert_bytes[swap.load.layer]
        leaving = [(victim, int(homes[victim])) for victim in swap.evict]
        for victim, home in leaving:
            load.move(victim.layer, grid.expert_bytes[victim.layer], home, -1)
        device = load.best(layer, size, [home for _, home in leaving])
        if device is None:
            for victim, home in leaving:  # nothing moves
                load.move(victim.layer, grid.expert_bytes[victim.layer], home, 1)
            continue
        load.move(layer, size, device, 1)
        directed.append((swap, device))
    return directed
