"""Which accelerator gets an expert: each holds what it has room for, and layers are spread."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kt_core.interfaces import ExpertGrid, ExpertId, Placement, Swap
from kt_core.placement.devices import HOST, DeviceLoad, direct, spread

# Layers of two sizes, as where formats differ.
GRID = ExpertGrid(num_experts=(8, 8, 4), expert_bytes=(10, 10, 25))
ALL = Placement(resident=tuple(tuple(range(count)) for count in GRID.num_experts))


def held_bytes(homes: dict[ExpertId, int], device: int) -> int:
    return sum(GRID.expert_bytes[e.layer] for e, home in homes.items() if home == device)


def test_layers_are_spread_evenly() -> None:
    homes = spread(ALL, GRID, [1000, 1000])
    for layer, count in enumerate(GRID.num_experts):
        on_first = sum(home == 1 for expert, home in homes.items() if expert.layer == layer)
        assert on_first == count / 2
    assert homes == spread(ALL, GRID, [1000, 1000])


def test_a_single_hot_expert_of_each_layer_does_not_always_go_to_the_first() -> None:
    placement = Placement(resident=((3,), (5,), (0,)))
    homes = spread(placement, GRID, [1000, 1000])
    assert set(homes.values()) == {1, 2}


@pytest.mark.parametrize("rooms", [[60, 200], [0, 260], [130, 130], [24, 9, 300]])
def test_nobody_gets_more_than_fits(rooms: list[int]) -> None:
    homes = spread(ALL, GRID, rooms)
    for device, room in enumerate(rooms, start=1):
        assert held_bytes(homes, device) <= room
    left = [room - held_bytes(homes, n) for n, room in enumerate(rooms, start=1)]
    missing = set(GRID.expert_ids()) - set(homes)
    assert all(max(left) < GRID.expert_bytes[expert.layer] for expert in missing)


def mask(homes: dict[ExpertId, int]) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    found = np.full(GRID.shape, HOST, dtype=np.int64)
    for expert, home in homes.items():
        found[expert] = home
    return found


def test_what_becomes_hot_goes_where_room_was_made() -> None:
    homes = {ExpertId(0, 0): 1, ExpertId(0, 1): 2, ExpertId(1, 0): 1, ExpertId(1, 1): 2}
    swaps = [
        Swap(ExpertId(0, 5), (ExpertId(1, 1),)),
        Swap(ExpertId(0, 6), (ExpertId(0, 0),)),
    ]
    assert direct(swaps, mask(homes), GRID, [20, 20]) == [(swaps[0], 2), (swaps[1], 1)]


def test_with_room_everywhere_it_goes_where_the_layer_has_fewest() -> None:
    homes = {ExpertId(0, 0): 1, ExpertId(0, 1): 1, ExpertId(1, 0): 2}
    swap = Swap(ExpertId(0, 5), (ExpertId(1, 0),))
    assert direct([swap], mask(homes), GRID, [1000, 1000]) == [(swap, 2)]


def test_a_swap_that_fits_no_single_device_is_left_out_and_leaves_its_victims() -> None:
    """Two victims on two devices make room for 25 bytes together, and on none."""
    homes = {ExpertId(0, n): 1 + n % 2 for n in range(4)}
    bad = Swap(ExpertId(2, 0), (ExpertId(0, 0), ExpertId(0, 1), ExpertId(0, 2)))
    good = Swap(ExpertId(1, 3), (ExpertId(0, 3),))
    assert direct([bad, good], mask(homes), GRID, [20, 20]) == [(good, 2)]


def test_random_swaps_never_exceed_any_device() -> None:
    dice, rooms = random.Random(0), [45, 70, 30]
    homes = spread(ALL, GRID, rooms)
    for _ in range(300):
        cold = sorted(set(GRID.expert_ids()) - set(homes))
        victims = dice.sample(sorted(homes), min(len(homes), dice.randrange(3)))
        swap = Swap(dice.choice(cold), tuple(victims))
        for (load, evict), device in direct([swap], mask(homes), GRID, rooms):
            for victim in evict:
                del homes[victim]
            homes[load] = device
        for device, room in enumerate(rooms, start=1):
            assert held_bytes(homes, device) <= room
        assert DeviceLoad.of(mask(homes), GRID, rooms).free_bytes == [
            room - held_bytes(homes, n) for n, room in enumerate(rooms, start=1)
        ]
