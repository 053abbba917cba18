"""The contract of ``kt_core.interfaces.PlacementPolicy``, as tests."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pytest

from kt_core.interfaces import (
    ExpertGrid,
    ExpertId,
    OnlinePlacement,
    Placement,
    PlacementPolicy,
    RoutingStatistics,
    Swap,
)
from kt_core.placement.simulate import apply_swaps, mask_of
from kt_core.testing.common import refuses

NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
GRIDS = {
    "even": ExpertGrid(num_experts=(16,) * 4, expert_bytes=(1000,) * 4),
    "uneven": ExpertGrid(num_experts=(8, 3, 12), expert_bytes=(700, 1000, 1300)),
    "single": ExpertGrid(num_experts=(1,), expert_bytes=(5,)),
}
FRACTIONS = (0.0, 0.1, 0.37, 0.5, 0.9, 1.0)


class PlacementPolicyContract:
    """What every placement policy must do. Subclass it in a test file and name the policies::

        class TestMyPolicies(PlacementPolicyContract):
            policies = (MyPolicy(),)

    Attributes:
        policies: The policies under test.
    """

    policies: Sequence[PlacementPolicy] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run each test for each policy, and for each grid where it asks for one."""
        if "policy" in metafunc.fixturenames:
            metafunc.parametrize("policy", self.policies, ids=[p.name for p in self.policies])
        if "grid" in metafunc.fixturenames:
            metafunc.parametrize("grid", GRIDS.values(), ids=list(GRIDS))

    def test_names(self, policy: PlacementPolicy) -> None:
        """A name to type, and a line that says what it does."""
        assert isinstance(policy, PlacementPolicy)
        assert NAME.fullmatch(policy.name), f"{policy.name!r} is no lower-case word"
        assert policy.name not in {"all", "auto"}, f"{policy.name!r} has a meaning of its own"
        assert policy.description.strip()
        assert "\n" not in policy.description

    def test_fits_and_fills_the_budget(self, policy: PlacementPolicy, grid: ExpertGrid) -> None:
        """No byte too many, and no room left for one more expert."""
        for budget, statistics in _cases(grid):
            placement = policy.place(statistics, budget, grid)
            _check_placement(placement, budget, grid)

    def test_is_pure(self, policy: PlacementPolicy, grid: ExpertGrid) -> None:
        """The same arguments give the same placement, also after the policy ran online."""
        for budget, statistics in _cases(grid):
            first = policy.place(statistics, budget, grid)
            online = policy.online(statistics, budget, grid)
            if online is not None:
                _drive(online, first, budget, grid)
            assert policy.place(statistics, budget, grid) == first

    def test_refuses_statistics_of_another_model(
        self, policy: PlacementPolicy, grid: ExpertGrid
    ) -> None:
        """Rather than to place by numbers that mean something else."""
        layers = (*grid.num_experts, 2)
        other = ExpertGrid(num_experts=layers, expert_bytes=(*grid.expert_bytes, 10))
        with refuses("statistics of another grid"):
            policy.place(RoutingStatistics.unknown(other), grid.total_bytes, grid)

    def test_refuses_a_negative_budget(self, policy: PlacementPolicy, grid: ExpertGrid) -> None:
        """It is somebody's mistake, not an empty accelerator."""
        with refuses("a negative budget"):
            policy.place(RoutingStatistics.unknown(grid), -1, grid)

    def test_online_swaps_keep_the_rules(self, policy: PlacementPolicy, grid: ExpertGrid) -> None:
        """Within the link and the budget after each swap; nothing twice; arguments unchanged."""
        for budget, statistics in _cases(grid):
            online = policy.online(statistics, budget, grid)
            if online is not None:
                _drive(online, policy.place(statistics, budget, grid), budget, grid)

    def test_online_moves_nothing_without_link(
        self, policy: PlacementPolicy, grid: ExpertGrid
    ) -> None:
        """Not a byte."""
        for budget, statistics in _cases(grid):
            online = policy.online(statistics, budget, grid)
            if online is None:
                return
            resident = mask_of(policy.place(statistics, budget, grid), grid)
            for counts in _counts(grid, steps=10):
                assert not online.observe(counts, resident, tokens=1, link_bytes=0)

    def test_online_survives_an_engine_that_refuses(
        self, policy: PlacementPolicy, grid: ExpertGrid
    ) -> None:
        """Swaps that were not done, experts that were lost: only ``resident`` counts."""
        budget = grid.total_bytes // 2
        online = policy.online(RoutingStatistics.unknown(grid), budget, grid)
        if online is None:
            return
        resident = mask_of(policy.place(RoutingStatistics.unknown(grid), budget, grid), grid)
        for step, counts in enumerate(_counts(grid, steps=30)):
            swaps = online.observe(counts, resident, tokens=1, link_bytes=grid.total_bytes)
            _check_swaps(swaps, resident, budget, grid.total_bytes, grid)
            if step == 20:
                resident[:] = False

    def test_online_is_deterministic(self, policy: PlacementPolicy, grid: ExpertGrid) -> None:
        """Two of them that see the same do the same; they share no state."""
        budget = grid.total_bytes // 2
        statistics = RoutingStatistics.unknown(grid)
        placement = policy.place(statistics, budget, grid)
        first = policy.online(statistics, budget, grid)
        second = policy.online(statistics, budget, grid)
        if first is None or second is None:
            assert first is second
            return
        assert _drive(first, placement, budget, grid) == _drive(second, placement, budget, grid)


def _cases(grid: ExpertGrid) -> Iterator[tuple[int, RoutingStatistics]]:
    """Budgets, each with statistics that know nothing, something, and one expert only."""
    generator = np.random.default_rng(0)
    known = tuple(tuple(map(float, generator.integers(0, 9, n))) for n in grid.num_experts)
    one = tuple(tuple(float(e == n - 1) for e in range(n)) for n in grid.num_experts)
    for fraction in FRACTIONS:
        for statistics in (
            RoutingStatistics.unknown(grid),
            RoutingStatistics(counts=known, tokens=50),
            RoutingStatistics(counts=one, tokens=1),
        ):
            yield round(fraction * grid.total_bytes), statistics


def _counts(grid: ExpertGrid, steps: int) -> Iterator[npt.NDArray[np.int64]]:
    """Counts of steps; what is popular changes half-way."""
    generator = np.random.default_rng(1)
    layers, width = grid.shape
    for step in range(steps):
        counts = np.zeros((layers, width), dtype=np.int64)
        for layer, number in enumerate(grid.num_experts):
            favourite = 0 if step < steps // 2 else number - 1
            for expert in {favourite, int(generator.integers(number))}:
                counts[layer, expert] += 1
        yield counts


def _drive(
    online: OnlinePlacement, placement: Placement, budget: int, grid: ExpertGrid
) -> list[list[Swap]]:
    """Run some steps, with prefills among them, check every answer, and return them."""
    resident, answers = mask_of(placement, grid), []
    links = (0, min(grid.expert_bytes), grid.total_bytes // 3, grid.total_bytes)
    for step, counts in enumerate(_counts(grid, steps=40)):
        tokens, link = 100 if step % 10 == 0 else 1, links[step % len(links)]
        given, seen = counts * tokens, resident.copy()
        swaps = list(online.observe(given, resident, tokens=tokens, link_bytes=link))
        assert np.array_equal(seen, resident), "observe changed what is resident"
        assert np.array_equal(given, counts * tokens), "observe changed the counts"
        _check_swaps(swaps, resident, budget, link, grid)
        apply_swaps(swaps, resident)
        answers.append(swaps)
    return answers


def _check_placement(placement: Placement, budget: int, grid: ExpertGrid) -> None:
    assert len(placement.resident) == grid.num_layers
    for ids, number in zip(placement.resident, grid.num_experts, strict=True):
        assert all(0 <= expert < number for expert in ids)
    used = placement.size_bytes(grid)
    assert used <= budget, f"{used} bytes of {budget}"
    left = [
        size
        for ids, number, size in zip(
            placement.resident, grid.num_experts, grid.expert_bytes, strict=True
        )
        if len(ids) < number
    ]
    assert not left or used + min(left) > budget, f"{budget - used} bytes are left unused"


def _check_swaps(
    swaps: Sequence[Swap],
    resident: npt.NDArray[np.bool_],
    budget: int,
    link_bytes: int,
    grid: ExpertGrid,
) -> None:
    sizes = np.array(grid.expert_bytes)
    loads = [swap.load for swap in swaps]
    assert len(set(loads)) == len(loads), "an expert is loaded twice"
    loaded = sum(grid.expert_bytes[load.layer] for load in loads)
    assert loaded <= link_bytes, f"{loaded} bytes loaded, the link has {link_bytes}"
    after = resident.copy()
    for swap in swaps:
        assert isinstance(swap.load, ExpertId)
        assert 0 <= swap.load.layer < grid.num_layers
        assert 0 <= swap.load.expert < grid.num_experts[swap.load.layer]
        apply_swaps([swap], after)
        used = int((after.sum(axis=1) * sizes).sum())
        assert used <= budget, f"{swap} makes {used} bytes of {budget}"
