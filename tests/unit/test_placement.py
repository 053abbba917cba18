"""The placement policies: what each is for, in numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kt_core.interfaces import ExpertGrid, ExpertId, Placement, RoutingStatistics
from kt_core.placement import Adaptive, Frequency, FrontLoading, Random, Uniform
from kt_core.placement.adaptive import AdaptivePlacement
from kt_core.placement.machine import Machine
from kt_core.placement.simulate import Simulation, apply_swaps, mask_of, simulate
from kt_core.placement.synthetic import zipf_trace
from kt_core.placement.trace import RoutingTrace

GRID = ExpertGrid(num_experts=(32,) * 6, expert_bytes=(2_800_000,) * 6)
SMALL = ExpertGrid(num_experts=(4, 4), expert_bytes=(10, 10))
COUNTS = RoutingStatistics(counts=((9, 1, 8, 2), (3, 7, 0, 6)), tokens=18)


def parts(trace: RoutingTrace, cut: int) -> tuple[RoutingStatistics, RoutingTrace]:
    """Statistics of the first tokens, and the rest; every step has one token."""

    def part(span: slice) -> RoutingTrace:
        return replace(
            trace,
            expert_ids=trace.expert_ids[span],
            step_tokens=trace.step_tokens[span],
            step_is_decode=trace.step_is_decode[span],
            prompt_steps=trace.prompt_steps[:1],
        )

    return part(slice(0, cut)).statistics(), part(slice(cut, None))


# ---------------------------------------------------------------- static policies


def test_frequency_takes_the_most_used_of_all_layers() -> None:
    assert Frequency().place(COUNTS, 40, SMALL).resident == ((0, 2), (1, 3))
    assert Frequency().place(COUNTS, 20, SMALL).resident == ((0, 2), ())


def test_frequency_counts_use_per_byte() -> None:
    grid = ExpertGrid(num_experts=(4, 4), expert_bytes=(10, 30))
    assert Frequency().place(COUNTS, 30, grid).resident == ((0, 2, 3), ())


def test_uniform_takes_the_most_used_of_each_layer() -> None:
    assert Uniform().place(COUNTS, 40, SMALL).resident == ((0, 2), (1, 3))
    assert Uniform().place(COUNTS, 20, SMALL).resident == ((0,), (1,))


def test_front_loading_takes_whole_layers() -> None:
    assert FrontLoading().place(COUNTS, 50, SMALL).resident == ((0, 1, 2, 3), (1,))


def test_random_is_the_same_each_time_and_another_for_another_seed() -> None:
    unknown = RoutingStatistics.unknown(GRID)
    placements = [Random(seed).place(unknown, GRID.total_bytes // 2, GRID) for seed in (0, 0, 1)]
    assert placements[0] == placements[1] != placements[2]


@pytest.mark.parametrize("policy", [Uniform(), Frequency(), Adaptive()])
def test_without_knowledge_no_end_of_the_ids_is_favoured(policy: Uniform) -> None:
    """Of 64 experts a quarter: some in every eighth of the ids, and others in other layers."""
    grid = ExpertGrid(num_experts=(64,) * 8, expert_bytes=(1,) * 8)
    placement = policy.place(RoutingStatistics.unknown(grid), grid.total_bytes // 4, grid)
    mask = mask_of(placement, grid)
    if isinstance(policy, Uniform):
        assert (mask.sum(axis=1) == 16).all()
    assert (mask.reshape(8, 8, 8).sum(axis=2) >= 1).all()
    assert len({ids[:4] for ids in placement.resident}) == 8


def test_uniform_gives_layers_of_any_width_the_same_part() -> None:
    grid = ExpertGrid(num_experts=(8, 64), expert_bytes=(8, 1))
    placement = Uniform().place(RoutingStatistics.unknown(grid), grid.total_bytes // 2, grid)
    assert [len(ids) for ids in placement.resident] == [4, 32]


# ---------------------------------------------------------------- values


def test_values_are_checked() -> None:
    with pytest.raises(ValueError, match="one value for each layer"):
        ExpertGrid(num_experts=(1, 2), expert_bytes=(1,))
    with pytest.raises(ValueError, match="at least a byte"):
        ExpertGrid(num_experts=(1, 0), expert_bytes=(1, 1))
    with pytest.raises(ValueError, match="must ascend"):
        Placement(resident=((1, 0),))
    with pytest.raises(ValueError, match="must ascend"):
        Placement(resident=((0, 0),))
    for count in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=">= 0"):
            RoutingStatistics(counts=((count,),), tokens=1)


def test_swaps_that_cannot_be_are_refused() -> None:
    from kt_core.interfaces import Swap

    mask = np.array([[True, False]])
    with pytest.raises(ValueError, match="not resident"):
        apply_swaps([Swap(ExpertId(0, 0), (ExpertId(0, 1),))], mask)
    with pytest.raises(ValueError, match="is resident"):
        apply_swaps([Swap(ExpertId(0, 0), ())], mask)


# ---------------------------------------------------------------- adaptive


@pytest.mark.parametrize("hot", [0.1, 0.25, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("exponent", [0.4, 0.8, 1.2])
def test_adaptive_keeps_up_with_frequency_while_nothing_changes(
    hot: float, exponent: float
) -> None:
    trace = zipf_trace(GRID, top_k=4, tokens=1800, exponent=exponent, seed=3)
    known, rest = parts(trace, 800)
    rates = [
        simulate(policy, rest, hot_fraction=hot, statistics=known).hit_rate()
        for policy in (Adaptive(), Frequency())
    ]
    assert rates[0] >= rates[1] - 0.005


def shifted(hot: float) -> dict[str, Simulation]:
    """All of the popularity changes after 400 tokens; then 200 to learn, and 400 more."""
    trace = zipf_trace(GRID, top_k=4, tokens=2000, exponent=0.8, seed=4, shifts=1)
    known, rest = parts(trace, 600)
    return {
        policy.name: simulate(policy, rest, hot_fraction=hot, statistics=known)
        for policy in (Adaptive(), Frequency())
    }


@pytest.mark.parametrize("hot", [0.1, 0.25, 0.5])
def test_adaptive_is_ten_points_above_frequency_200_tokens_after_a_shift(hot: float) -> None:
    """At higher residency even the best placement gains less: docs/placement.md."""
    runs = shifted(hot)
    rates = {name: run.hit_rate(first=600, last=1000) for name, run in runs.items()}
    assert rates["adaptive"] >= rates["frequency"] + 0.10
    before = {name: run.hit_rate(last=400) for name, run in runs.items()}
    assert before["adaptive"] >= before["frequency"] - 0.005


@pytest.mark.parametrize("hot", [0.1, 0.5])
def test_adaptive_stays_within_the_link(hot: float) -> None:
    """And hardly moves anything until something changes."""
    run = shifted(hot)["adaptive"]
    assert (run.moved_bytes <= run.granted_bytes).all()
    assert run.moved_bytes[:400].sum() < run.moved_bytes[400:800].sum() / 4
    assert run.moved_bytes[400:].sum() > 0


def test_adaptive_makes_do_with_a_narrow_link() -> None:
    """An expert every 25 steps or so: never more than granted, and still better than standing."""
    trace = zipf_trace(GRID, top_k=4, tokens=2000, exponent=0.8, seed=4, shifts=1)
    known, rest = parts(trace, 600)
    narrow = Machine(link_bytes_per_s=0.2e9)
    runs = [
        simulate(policy, rest, hot_fraction=0.25, statistics=known, machine=narrow)
        for policy in (Adaptive(), Frequency())
    ]
    moved, granted = runs[0].moved_bytes, runs[0].granted_bytes
    assert (moved <= granted).all()
    assert granted.max() == 2_800_000
    assert np.count_nonzero(granted < 2_800_000) > 500
    assert runs[0].hit_rate(first=1000) > runs[1].hit_rate(first=1000) + 0.05


def test_adaptive_learns_in_prefill_too() -> None:
    """One chunk of 512 tokens says as much as 512 decode steps."""
    trace = zipf_trace(GRID, top_k=4, tokens=800, exponent=1.0, seed=5, prompt_tokens=512)
    run = simulate(Adaptive(), trace, hot_fraction=0.25)
    first = simulate(Frequency(), trace, hot_fraction=0.25)
    assert run.hit_rate(is_decode=True, first=600) > first.hit_rate(is_decode=True) + 0.2


def test_adaptive_starts_without_statistics() -> None:
    trace = zipf_trace(GRID, top_k=4, tokens=600, exponent=1.0, seed=6)
    oracle = simulate(Frequency(), trace, hot_fraction=0.25, statistics=trace.statistics())
    run = simulate(Adaptive(), trace, hot_fraction=0.25)
    assert run.hit_rate(first=300) >= oracle.hit_rate(first=300) - 0.03


def test_adaptive_evicts_several_small_experts_for_a_large_one() -> None:
    grid = ExpertGrid(num_experts=(4, 2), expert_bytes=(10, 30))
    known = RoutingStatistics(counts=((100, 100, 100, 0), (0, 0)), tokens=100)
    policy, budget = Adaptive(), 30
    resident = mask_of(policy.place(known, budget, grid), grid)
    assert resident.tolist() == [[True, True, True, False], [False] * 4]
    online = policy.online(known, budget, grid)
    counts = np.array([[0, 0, 0, 0], [0, 1, 0, 0]])
    for _ in range(300):
        apply_swaps(online.observe(counts, resident, tokens=1, link_bytes=30), resident)
    assert resident.tolist() == [[False] * 4, [False, True, False, False]]


def test_experts_of_like_use_do_not_change_places_for_ever() -> None:
    """The hysteresis: what is moved dies down although every expert is drawn alike."""
    trace = zipf_trace(GRID, top_k=4, tokens=2000, exponent=0.0, seed=7)
    run = simulate(Adaptive(), trace, hot_fraction=0.5)
    assert run.moved_bytes[1000:].sum() < run.moved_bytes[:500].sum()


def test_adaptive_fills_an_accelerator_that_was_left_empty() -> None:
    online = AdaptivePlacement(RoutingStatistics.unknown(SMALL), 40, SMALL)
    resident = np.zeros((2, 4), dtype=bool)
    counts = np.array([[1, 0, 1, 0], [0, 1, 1, 0]])
    apply_swaps(online.observe(counts, resident, tokens=2, link_bytes=80), resident)
    assert (resident == (counts > 0)).all()
