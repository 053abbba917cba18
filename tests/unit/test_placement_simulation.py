"""Traces and their files, the machine model, the simulator, statistics, predictions.

Longer than most files: the small trace at its top serves every test.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kt_core.errors import TraceError
from kt_core.interfaces import (
    ExpertGrid,
    ExpertId,
    OnlinePlacement,
    PlacementPolicy,
    RoutingStatistics,
    Swap,
)
from kt_core.paths import replacing
from kt_core.placement import Frequency, Random
from kt_core.placement.machine import LinkBudget, Machine
from kt_core.placement.prediction import (
    chance_recall,
    prediction_recall,
    prefetch_pays,
    prefetch_terms,
)
from kt_core.placement.simulate import mask_of, simulate
from kt_core.placement.statistics import (
    load_statistics,
    merge,
    save_statistics,
    statistics_file,
)
from kt_core.placement.synthetic import zipf_trace
from kt_core.placement.trace import NO_EXPERT, RoutingTrace, load_trace, save_trace

GRID = ExpertGrid(num_experts=(6, 4), expert_bytes=(100, 200))
UNIT = Machine(
    link_bytes_per_s=50,
    link_share=0.5,
    accelerator_bytes_per_s=1000,
    accelerator_ops_per_s=1000,
    cpu_bytes_per_s=100,
    cpu_ops_per_s=100,
)


def small_trace() -> RoutingTrace:
    """Two prompts: a prefill of 3 tokens and 2 decode steps, a prefill of 2 and 1 step."""
    generator = np.random.default_rng(0)
    ids = np.stack(
        [[generator.permutation(n)[:2] for n in GRID.num_experts] for _ in range(8)]
    ).astype(np.uint16)
    ids[0, 1, 1] = NO_EXPERT
    return RoutingTrace(
        model="small",
        grid=GRID,
        expert_weights=(7, 9),
        dense_bytes=500,
        expert_ids=ids,
        weights=generator.random(ids.shape).astype(np.float16),
        predicted_ids=np.where(np.arange(2)[:, None] == 0, NO_EXPERT, ids).astype(np.uint16),
        step_tokens=np.array([3, 1, 1, 2, 1]),
        step_is_decode=np.array([0, 1, 1, 0, 1], dtype=np.uint8),
        prompt_steps=np.array([0, 3]),
    )


# ---------------------------------------------------------------- traces


def test_file_holds_the_whole_trace(tmp_path: Path) -> None:
    trace = small_trace()
    save_trace(trace, tmp_path / "a.safetensors")
    found = load_trace(tmp_path / "a.safetensors")
    for name in RoutingTrace.__slots__:
        want, got = getattr(trace, name), getattr(found, name)
        assert np.array_equal(want, got) if isinstance(want, np.ndarray) else want == got
    save_trace(replace(trace, weights=None, predicted_ids=None), tmp_path / "b.safetensors")
    assert load_trace(tmp_path / "b.safetensors").weights is None
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["a.safetensors", "b.safetensors"]


def test_counts_are_those_of_a_loop() -> None:
    trace = small_trace()
    want = np.zeros((2, 6), dtype=int)
    for token in trace.expert_ids[2:7]:
        for layer, ids in enumerate(token):
            for expert in ids:
                want[layer, expert] += expert != NO_EXPERT
    assert np.array_equal(trace.counts(2, 7), want)
    statistics = trace.statistics()
    assert statistics.tokens == 8
    assert sum(map(sum, statistics.counts)) == 8 * 4 - 1
    statistics.check_fits(GRID)


def test_split_cuts_between_prompts() -> None:
    trace = small_trace()
    first, second = trace.split(0.01)
    assert [part.num_tokens for part in (first, second)] == [5, 3]
    assert np.array_equal(np.concatenate([first.expert_ids, second.expert_ids]), trace.expert_ids)
    assert second.step_tokens.tolist() == [2, 1]
    assert second.prompt_steps.tolist() == [0]
    with pytest.raises(ValueError, match="one prompt"):
        second.split(0.5)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"expert_ids": np.zeros((8, 2, 2), dtype=np.int64)}, "int64"),
        ({"expert_ids": np.full((8, 2, 2), 4, dtype=np.uint16)}, "beyond the experts"),
        ({"expert_ids": np.zeros((8, 3, 2), dtype=np.uint16)}, "2 layers"),
        ({"step_tokens": np.array([3, 1, 1, 2, 2])}, "add up"),
        ({"step_tokens": np.array([3, 1, 1, 3, 0])}, "add up"),
        ({"prompt_steps": np.array([1, 3])}, "prompt_steps"),
        ({"prompt_steps": np.array([0, 5])}, "prompt_steps"),
        ({"step_is_decode": np.zeros(4, dtype=np.uint8)}, "differ in length"),
        ({"weights": np.zeros((8, 2, 1), dtype=np.float16)}, "weights is"),
        ({"expert_weights": (1,)}, "expert_weights"),
    ],
)
def test_a_trace_that_does_not_fit_together_is_refused(
    change: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        replace(small_trace(), **change)


def test_files_that_are_no_trace(tmp_path: Path) -> None:
    file = tmp_path / "t.safetensors"
    with pytest.raises(TraceError, match="there is no trace"):
        load_trace(file)
    file.write_bytes(b"no trace")
    with pytest.raises(TraceError, match="no routing trace or a damaged one"):
        load_trace(file)
    save_file({"x": np.zeros(1)}, file)
    with pytest.raises(TraceError, match="lack format=kt-routing-trace"):
        load_trace(file)
    save_trace(small_trace(), file)
    whole, tensors = file.read_bytes(), load_file(file)
    file.write_bytes(whole[:-10])
    with pytest.raises(TraceError, match="damaged"):
        load_trace(file)
    save_file(tensors, file, {"format": "kt-routing-trace", "version": "2"})
    with pytest.raises(TraceError, match="of version '2', this kt reads version '1'"):
        load_trace(file)
    save_file(tensors, file, {"format": "kt-routing-trace", "version": "1"})
    with pytest.raises(TraceError, match="KeyError: 'model'"):
        load_trace(file)
    with pytest.raises(TraceError, match="cannot write the trace"):
        save_trace(small_trace(), tmp_path / "absent" / "t.safetensors")


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "f.txt"
    file.write_text("old")

    def fail_half_way() -> None:
        with replacing(file) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_half_way()
    assert [path.name for path in tmp_path.iterdir()] == ["f.txt"]
    assert file.read_text() == "old"
    with replacing(file) as temporary:
        temporary.write_text("new")
    assert file.read_text() == "new"


def test_zipf_popularity_and_shifts() -> None:
    grid = ExpertGrid(num_experts=(20, 20), expert_bytes=(1, 1))
    trace = zipf_trace(grid, top_k=2, tokens=6000, exponent=1.0, seed=1, shifts=1, prompt_tokens=9)
    assert (trace.expert_ids[..., 0] != trace.expert_ids[..., 1]).all()
    assert trace.prompt_steps.tolist() == [0, 1 + 3000 - 9]
    halves = [trace.counts(0, 3000), trace.counts(3000)]
    for counts in halves:
        ranked = np.sort(counts, axis=1)[:, ::-1] / 6000
        # Without replacement the first is a little below, the others above, their weights.
        weights = 1 / np.arange(1, 21)
        assert np.allclose(ranked, weights / weights.sum(), atol=0.06)
    assert (halves[0].argmax(axis=1) != halves[1].argmax(axis=1)).any()


# ---------------------------------------------------------------- the machine


def test_step_time_is_the_formula() -> None:
    counts = np.array([[3, 0, 1], [1, 1, 0]])
    resident = np.array([[True, True, False], [False, False, True]])
    # Layer 0: hot 100 bytes, 30 ops; cold 100 bytes, 10 ops. Layer 1: cold 2 x 200 bytes, 40 ops.
    want = 500 / 1000 + max(100 / 1000, 30 / 1000, 100 / 100, 10 / 100) + max(400 / 100, 40 / 100)
    seconds = UNIT.step_s(
        counts,
        resident,
        expert_bytes=np.array([100, 200]),
        expert_ops=np.array([10, 20]),
        dense_bytes=500,
    )
    assert seconds == pytest.approx(want, rel=1e-12)


def test_a_machine_has_rates() -> None:
    with pytest.raises(ValueError, match="cpu_bytes_per_s must be > 0"):
        Machine(cpu_bytes_per_s=0)
    with pytest.raises(ValueError, match="a part of 1"):
        Machine(link_share=1.5)


def test_unused_link_time_is_gone_but_for_one_expert() -> None:
    link = LinkBudget(100, largest_expert_bytes=30)
    assert link.grant(0.1) == 10
    assert link.grant(0.1) == 20
    assert link.grant(1.0) == 100  # a long step earns more than what may be saved
    link.spend(80)
    assert link.grant(0) == 20
    assert link.grant(0.5) == 50  # 20 + 50, but no more than this step earned
    with pytest.raises(ValueError, match="51 bytes were loaded, 50 were granted"):
        link.spend(51)


# ---------------------------------------------------------------- the simulator


def test_static_policies_hit_what_they_placed() -> None:
    trace = small_trace()
    run = simulate(
        Frequency(), trace, hot_fraction=0.5, statistics=trace.statistics(), machine=UNIT
    )
    placement = Frequency().place(trace.statistics(), 700, GRID)
    mask = mask_of(placement, GRID)
    want = [
        sum(
            bool(mask[layer, expert])
            for token in trace.expert_ids[step.start : step.stop]
            for layer, ids in enumerate(token)
            for expert in ids
            if expert != NO_EXPERT
        )
        for step in run.steps
    ]
    assert run.budget_bytes == 700
    assert run.hits.tolist() == want
    assert run.pairs.tolist() == [11, 4, 4, 8, 4]
    assert run.hit_rate() == pytest.approx(sum(want) / 31)
    assert run.hit_rate(is_decode=True) == pytest.approx((want[1] + want[2] + want[4]) / 12)
    assert run.hit_rate(first=5) == pytest.approx((want[3] + want[4]) / 12)
    assert run.tokens_per_s(is_decode=True) == pytest.approx(3 / run.seconds[[1, 2, 4]].sum())
    assert run.moved_bytes.sum() == 0


def test_everything_or_nothing_resident() -> None:
    for hot, rate in ((0.0, 0.0), (1.0, 1.0)):
        assert simulate(Random(), small_trace(), hot_fraction=hot).hit_rate() == rate


def test_prefills_are_cut_into_chunks() -> None:
    run = simulate(Random(), small_trace(), hot_fraction=0.5, prefill_chunk=2)
    assert [step.stop - step.start for step in run.steps] == [2, 1, 1, 1, 2, 1]
    assert [step.is_decode for step in run.steps] == [False, False, True, True, False, True]


class Moves(PlacementPolicy, OnlinePlacement):
    """Begins with expert 0 of layer 0, and swaps it for another after the first step."""

    name, description = "moves", "once"

    def __init__(self, *swaps: Swap) -> None:
        self.swaps = list(swaps)
        self.seen: list[tuple[int, list[int]]] = []

    def place(self, *arguments: Any) -> Any:
        from kt_core.interfaces import Placement

        return Placement(resident=((0,), ()))

    def online(self, *arguments: Any) -> OnlinePlacement:
        return self

    def observe(self, counts: Any, resident: Any, *, tokens: int, link_bytes: int) -> list[Swap]:
        self.seen.append((link_bytes, np.flatnonzero(resident).tolist()))
        swaps, self.swaps = self.swaps, []
        return swaps


def one_expert_trace(*experts: int) -> RoutingTrace:
    ids = np.array([[[expert], [0]] for expert in experts], dtype=np.uint16)
    return replace(
        small_trace(),
        expert_ids=ids,
        weights=None,
        predicted_ids=None,
        step_tokens=np.ones(len(ids), dtype=np.int64),
        step_is_decode=np.ones(len(ids), dtype=np.uint8),
        prompt_steps=np.array([0]),
    )


def test_a_copy_takes_a_step_in_which_neither_expert_is_there() -> None:
    policy = Moves(Swap(ExpertId(0, 1), (ExpertId(0, 0),)))
    trace = one_expert_trace(0, 0, 1, 1, 0)
    run = simulate(policy, trace, hot_fraction=0.1, machine=replace(UNIT, link_bytes_per_s=1e6))
    assert run.hits.tolist() == [1, 0, 1, 1, 0]
    policy = Moves(Swap(ExpertId(0, 1), (ExpertId(0, 0),)))
    run = simulate(
        policy,
        one_expert_trace(0, 1),
        hot_fraction=0.1,
        machine=replace(UNIT, link_bytes_per_s=1e6),
    )
    assert run.hits.tolist() == [1, 0]
    assert run.moved_bytes.tolist() == [100, 0]
    assert [resident for _, resident in policy.seen] == [[0], [1]]


def test_what_is_granted_is_the_share_of_the_link() -> None:
    policy = Moves()
    run = simulate(policy, one_expert_trace(0, 3), hot_fraction=0.1, machine=UNIT)
    # 0.5 s dense, 0.1 s hot; cold expert of layer 1: 200 bytes at 100/s. 25 bytes/s for swaps.
    assert run.seconds[0] == pytest.approx(0.5 + 0.1 + 2.0)
    assert run.granted_bytes[0] == int(25 * 2.6)
    assert policy.seen[0][0] == int(25 * 2.6)


def test_a_policy_that_breaks_the_rules_is_stopped() -> None:
    fast = replace(UNIT, link_bytes_per_s=1e6)
    cases = {
        "uses 200 bytes of 140": (Swap(ExpertId(0, 1), ()), fast),
        "is to be loaded, but is resident": (Swap(ExpertId(0, 0), ()), fast),
        "is to be evicted, but is not": (Swap(ExpertId(0, 1), (ExpertId(0, 2),)), fast),
        "100 bytes were loaded, 65 were granted": (
            Swap(ExpertId(0, 1), (ExpertId(0, 0),)),
            UNIT,
        ),
    }
    for message, (swap, machine) in cases.items():
        with pytest.raises(ValueError, match=message):
            simulate(Moves(swap), one_expert_trace(0, 0), hot_fraction=0.1, machine=machine)


# ---------------------------------------------------------------- statistics


def test_statistics_on_disk(tmp_path: Path) -> None:
    file, statistics = tmp_path / "a" / "s.json", small_trace().statistics()
    assert load_statistics(file) is None
    save_statistics(statistics, file)
    assert load_statistics(file) == statistics
    both = merge(statistics, statistics)
    assert both.tokens == 16
    assert both.counts[1][2] == 2 * statistics.counts[1][2]
    with pytest.raises(ValueError, match="other layers"):
        merge(statistics, RoutingStatistics(counts=((1.0,),), tokens=1))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": "kt-routing-statistics", "version": 2}']
    + [
        json.dumps({"format": "kt-routing-statistics", "version": 1, "tokens": 1, "counts": counts})
        for counts in ([[-1]], [["x"]], 7)
    ],
)
def test_damaged_statistics(tmp_path: Path, text: str) -> None:
    file = tmp_path / "s.json"
    file.write_text(text)
    with pytest.raises(TraceError, match=r"holds no routing statistics .* delete it"):
        load_statistics(file)


def test_models_have_statistics_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tmp_path / "model"
    model.mkdir()
    names = []
    for change in ("config.json", "model.safetensors", "other.safetensors"):
        (model / change).write_text(change)
        names.append(statistics_file(model))
    assert len(set(names)) == 3
    assert statistics_file(model) == names[-1]
    assert names[0].parent == tmp_path / "cache" / "kt" / "statistics"
    assert names[0].name.startswith("model-")


# ---------------------------------------------------------------- predictions


def test_recall_of_predictions() -> None:
    trace = small_trace()
    assert np.array_equal(prediction_recall(trace), [np.nan, 1.0], equal_nan=True)
    assert trace.predicted_ids is not None
    foretold = trace.predicted_ids.copy()
    foretold[:4, 1] = NO_EXPERT  # 7 of the 15 pairs of layer 1
    half = replace(trace, predicted_ids=foretold)
    assert prediction_recall(half)[1] == pytest.approx(8 / 15)
    counts = sorted(trace.counts()[1], reverse=True)
    assert chance_recall(trace)[1] == pytest.approx(sum(counts[:2]) / 15)
    with pytest.raises(ValueError, match="holds no predictions"):
        prediction_recall(replace(trace, predicted_ids=None))


def test_prefetch_pays_where_more_is_saved_than_lost() -> None:
    assert prefetch_pays(recall=0.8, saved_s=1.0, cost_s=0.7)
    assert not prefetch_pays(recall=0.6, saved_s=1.0, cost_s=0.7)
    assert not prefetch_pays(recall=0.0, saved_s=1.0, cost_s=0.0)
    assert prefetch_pays(recall=0.01, saved_s=1.0, cost_s=0.0)


def test_prefetch_terms() -> None:
    saved_s, cost_s = prefetch_terms(UNIT, 100, window_s=1.5)
    assert (saved_s, cost_s) == (1.0, 100 / 25 - 1.5)
    assert prefetch_terms(UNIT, 100, window_s=9.0)[1] == 0.0
