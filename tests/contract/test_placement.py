"""Every registered placement policy keeps the contract; and every test of it can fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from kt_core import plugins
from kt_core.interfaces import (
    ExpertGrid,
    ExpertId,
    OnlinePlacement,
    Placement,
    PlacementPolicy,
    RoutingStatistics,
    Swap,
)
from kt_core.placement import Adaptive, Frequency
from kt_core.testing import PlacementPolicyContract
from kt_core.testing.placement import GRIDS


class TestRegisteredPolicies(PlacementPolicyContract):
    policies = tuple(plugins.load().policies)


def test_the_built_in_policies_are_registered() -> None:
    """Else the suite above would test nothing."""
    names = {"adaptive", "frequency", "front-loading", "random", "uniform"}
    assert names <= set(plugins.load().policies.names())


# From here on: policies that are broken on purpose, each in one way.


class Broken(PlacementPolicy):
    name = "broken"
    description = "in one way"

    def place(
        self, statistics: RoutingStatistics, budget_bytes: int, grid: ExpertGrid
    ) -> Placement:
        return Frequency().place(statistics, budget_bytes, grid)


class HasAStrangeName(Broken):
    name = "All Of It"


class ForgetsAnExpert(Broken):
    def place(self, *arguments: Any) -> Placement:
        resident = super().place(*arguments).resident
        return Placement(resident=(resident[0][1:], *resident[1:]))


class LoadsOneTooMany(Broken):
    def place(
        self, statistics: RoutingStatistics, budget_bytes: int, grid: ExpertGrid
    ) -> Placement:
        return super().place(statistics, budget_bytes + min(grid.expert_bytes), grid)


class Remembers(Broken):
    def __init__(self) -> None:
        self.calls = 0

    def place(
        self, statistics: RoutingStatistics, budget_bytes: int, grid: ExpertGrid
    ) -> Placement:
        self.calls += 1
        order = grid.expert_ids()[:: 1 if self.calls % 2 else -1]
        statistics.check_fits(grid)
        return Placement.of(order[: budget_bytes // max(grid.expert_bytes)], grid)


class TakesAnyStatistics(Broken):
    def place(
        self, statistics: RoutingStatistics, budget_bytes: int, grid: ExpertGrid
    ) -> Placement:
        return super().place(RoutingStatistics.unknown(grid), budget_bytes, grid)


class TakesAnyBudget(Broken):
    def place(
        self, statistics: RoutingStatistics, budget_bytes: int, grid: ExpertGrid
    ) -> Placement:
        return super().place(statistics, max(budget_bytes, 0), grid)


class Wrapped(OnlinePlacement):
    """An online placement whose answers are spoilt."""

    def __init__(self, inner: OnlinePlacement, spoil: Callable[..., Sequence[Swap]]) -> None:
        self.inner = inner
        self.spoil = spoil

    def observe(
        self, counts: Any, resident: Any, *, tokens: int, link_bytes: int
    ) -> Sequence[Swap]:
        swaps = self.inner.observe(counts, resident, tokens=tokens, link_bytes=link_bytes)
        return self.spoil(list(swaps), counts, resident)


def online(spoil: Callable[..., Sequence[Swap]]) -> type[Broken]:
    """A policy class whose online placement is spoilt."""

    class SpoiltOnline(Broken):
        def online(self, *arguments: Any) -> OnlinePlacement:
            return Wrapped(Adaptive().online(*arguments), spoil)

    return SpoiltOnline


def _evicts_nothing(swaps: list[Swap], *_: Any) -> list[Swap]:
    return [Swap(swap.load, ()) for swap in swaps]


def _loads_twice(swaps: list[Swap], *_: Any) -> list[Swap]:
    return swaps + swaps[:1]


def _evicts_what_is_not_there(swaps: list[Swap], *_: Any) -> list[Swap]:
    return [Swap(swap.load, (swap.load,)) for swap in swaps]


def _changes_residency(swaps: list[Swap], counts: Any, resident: Any) -> list[Swap]:
    resident[0, 0] = not resident[0, 0]
    return swaps


def _changes_counts(swaps: list[Swap], counts: Any, resident: Any) -> list[Swap]:
    counts += 1
    return swaps


def _ignores_the_link(swaps: list[Swap], counts: Any, resident: Any) -> list[Swap]:
    hot = ExpertId(0, int(resident[0].argmax()))
    return [Swap(hot, (hot,))] if resident[hot] else []


SUITE = PlacementPolicyContract()


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (HasAStrangeName(), SUITE.test_names),
        (ForgetsAnExpert(), SUITE.test_fits_and_fills_the_budget),
        (LoadsOneTooMany(), SUITE.test_fits_and_fills_the_budget),
        (Remembers(), SUITE.test_is_pure),
        (TakesAnyStatistics(), SUITE.test_refuses_statistics_of_another_model),
        (TakesAnyBudget(), SUITE.test_refuses_a_negative_budget),
        (online(_evicts_nothing)(), SUITE.test_online_swaps_keep_the_rules),
        (online(_loads_twice)(), SUITE.test_online_swaps_keep_the_rules),
        (online(_evicts_what_is_not_there)(), SUITE.test_online_swaps_keep_the_rules),
        (online(_changes_residency)(), SUITE.test_online_swaps_keep_the_rules),
        (online(_changes_counts)(), SUITE.test_online_swaps_keep_the_rules),
        (online(_ignores_the_link)(), SUITE.test_online_moves_nothing_without_link),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_the_suite_notices(broken: PlacementPolicy, test: Callable[..., None]) -> None:
    grids = () if test == SUITE.test_names else (GRIDS["even"],)
    with pytest.raises((AssertionError, ValueError)):
        test(broken, *grids)
    test(Adaptive(), *grids)  # what is right passes


class RemembersItsFirstResidents(OnlinePlacement):
    """Keeps its own idea of what is resident, which an engine that refuses makes wrong."""

    def __init__(self, inner: OnlinePlacement) -> None:
        self.inner = inner
        self.resident: Any = None

    def observe(
        self, counts: Any, resident: Any, *, tokens: int, link_bytes: int
    ) -> Sequence[Swap]:
        from kt_core.placement.simulate import apply_swaps

        if self.resident is None:
            self.resident = resident.copy()
        swaps = self.inner.observe(counts, self.resident, tokens=tokens, link_bytes=link_bytes)
        apply_swaps(swaps, self.resident)
        return swaps


class KeepsItsOwnBooks(Broken):
    def online(self, *arguments: Any) -> OnlinePlacement:
        return RemembersItsFirstResidents(Adaptive().online(*arguments))


class SharesState(Broken):
    def __init__(self) -> None:
        self.only: OnlinePlacement | None = None

    def online(self, *arguments: Any) -> OnlinePlacement:
        self.only = self.only or Adaptive().online(*arguments)
        return self.only


def test_the_suite_notices_books_of_its_own_and_shared_state() -> None:
    with pytest.raises((AssertionError, ValueError)):
        SUITE.test_online_survives_an_engine_that_refuses(KeepsItsOwnBooks(), GRIDS["even"])
    with pytest.raises((AssertionError, ValueError)):
        SUITE.test_online_is_deterministic(SharesState(), GRIDS["even"])
