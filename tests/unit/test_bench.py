"""The numbers of ``kt bench``, with clocks of our own: nothing depends on how fast it is here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch

from kt_core import hardware
from kt_core.bench.experts import (
    Request,
    Timing,
    fraction_of_limit,
    measure_experts,
    median_limits,
    result,
    time_layers,
)
from kt_core.bench.layers import PackedLayers, choose_layers
from kt_core.bench.routing import Routing
from kt_core.bench.timing import FEWEST_CALLS, repeat
from kt_core.errors import NotEnoughMemoryError
from kt_core.hardware import SystemFileError
from kt_core.interfaces import ExpertWeights
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.testing import ReferenceBackend
from kt_core.types import ActivationPrecision, Limits, MoeSpec
from kt_cpu import CpuBackend, _kernels
from kt_cpu.backend import CpuDevice

SPEC = MoeSpec(num_experts=8, hidden_size=64, intermediate_size=32)
FORMATS = {f.descriptor.name: f for f in BUILT_IN_FORMATS}
LIMITS = Limits(read_bytes_per_s=10e9, int8_ops_per_s=1000e9, bf16_ops_per_s=500e9)
TIMING = Timing(
    weight_format="int8",
    tokens=4,
    layer_s=2e-3,
    weight_bytes=10e6,
    operations=500_000_000,
    rel_error=0.0123456,
    is_int8=True,
)


class Clock:
    """Each look at it takes one second, or what is given."""

    def __init__(self, *steps: float) -> None:
        self.now = 0.0
        self.steps: Iterator[float] = iter(steps)

    def __call__(self) -> float:
        self.now += next(self.steps, 1.0)
        return self.now


# ---------------------------------------------------------------- time


def test_preparing_is_not_timed() -> None:
    clock, numbers = Clock(), count()

    def prepare() -> int:
        clock.now += 1000
        return next(numbers)

    seen: list[int] = []

    def run(number: int) -> None:
        clock.now += 10 * (number + 1)
        seen.append(number)

    assert repeat(prepare, run, seconds=0, clock=clock) == [11.0, 21.0, 31.0]
    assert seen == [0, 1, 2]


def test_repeats_until_the_time_is_over() -> None:
    clock = Clock()
    times = repeat(lambda: None, lambda _: None, seconds=30, clock=clock)
    # It ends at 31. The first three calls look at the clock twice, those after it three times.
    assert len(times) == 3 + (31 - 7) // 3
    assert len(repeat(lambda: None, lambda _: None, seconds=0)) == FEWEST_CALLS


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("change", "fraction"),
    [
        ({}, 0.5),  # 10 MB at 10 GB/s: 1 ms of 2
        ({"operations": 1_500_000_000}, 0.75),  # 1.5 ms at 1000 GOP/s
        ({"operations": 1_500_000_000, "is_int8": False}, 1.5),
        ({"is_int8": None}, None),
    ],
)
def test_fraction_of_limit(change: dict[str, object], fraction: float | None) -> None:
    timing = replace(TIMING, **change)  # type: ignore[arg-type]
    assert fraction_of_limit(timing, LIMITS) == (fraction and pytest.approx(fraction))
    assert fraction_of_limit(timing, None) is None


def test_result_divides_by_the_time() -> None:
    row = result(TIMING, LIMITS, isa="avx2", threads=3)
    assert (row.format, row.isa, row.threads, row.tokens) == ("int8", "avx2", 3, 4)
    assert (row.us_per_layer, row.gb_per_s, row.gflop_per_s) == (2000.0, 5.0, 250.0)
    assert (row.rel_error, row.fraction_of_limit) == (0.0123, 0.5)


def test_limits_are_medians() -> None:
    samples = [replace(LIMITS, read_bytes_per_s=rate) for rate in (9e9, 60e9, 11e9)]
    assert median_limits(samples) == replace(LIMITS, read_bytes_per_s=11e9)
    assert median_limits([*samples, None]) is None
    assert median_limits([]) is None


@pytest.mark.parametrize("isa", [name for name, is_here in _kernels.isas() if is_here])
def test_every_instruction_set_has_limits(isa: str) -> None:
    threads = 2
    read, int8, bf16 = _kernels.measure_limits(isa, threads, 16 << 20)
    # No processor does a product of 16 lanes in less than 1/8 cycle of 10 GHz: a loop that the
    # compiler saw through would be faster than that.
    fastest = threads * 8 * 10e9 * 16 * 8
    assert 1e6 < read < 1e13
    assert 1e6 < int8 < fastest
    assert 1e6 < bf16 < fastest


def test_limits_refuse_no_threads() -> None:
    with pytest.raises(ValueError, match="at least 1 thread"):
        _kernels.measure_limits("", 0, 16 << 20)


# ---------------------------------------------------------------- routing


def test_experts_come_round_as_late_as_possible() -> None:
    routing = Routing(12, 4, layers=2)
    calls = [routing.next_call(1) for _ in range(6)]
    assert [call.layer for call in calls] == [0, 1] * 3
    for layer in (0, 1):
        experts = [e for call in calls[layer::2] for e in call.expert_ids.flatten().tolist()]
        assert sorted(experts) == list(range(12))
    again = routing.next_call(1)
    assert set(again.expert_ids.flatten().tolist()) == set(calls[0].expert_ids.flatten().tolist())


def test_tokens_choose_at_random() -> None:
    routing = Routing(32, 3, layers=1)
    active = []
    for _ in range(200):
        call = routing.next_call(8)
        assert call.expert_ids.shape == call.weights.shape == (8, 3)
        assert all(len(set(row)) == 3 for row in call.expert_ids.tolist())
        assert torch.allclose(call.weights.sum(1), torch.ones(8))
        assert call.num_active == len(set(call.expert_ids.flatten().tolist()))
        active.append(call.num_active)
    # Each expert is missed by all 8 tokens with probability (29/32)^8; the deviation of one call's
    # number is below 3, so that of the mean of 200 below 0.2.
    expected = 32 * (1 - (29 / 32) ** 8)
    assert abs(sum(active) / len(active) - expected) < 1


def test_all_experts_at_once() -> None:
    call = Routing(4, 4, layers=1).next_call(3)
    assert call.num_active == 4
    assert [sorted(row) for row in call.expert_ids.tolist()] == [[0, 1, 2, 3]] * 3


# ---------------------------------------------------------------- layers


def test_layers_are_enough_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "last_level_cache_bytes", lambda: 1000)
    sizes = choose_layers(SPEC, 100, None, available_bytes=1 << 40)
    assert (sizes.layers, sizes.weight_bytes, sizes.is_cold) == (5, 4000, True)
    few = choose_layers(SPEC, 100, 2, available_bytes=1 << 40)
    assert (few.layers, few.is_cold) == (2, False)


def test_layers_are_bounded_by_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "last_level_cache_bytes", lambda: 1 << 30)
    free = 4 << 30
    sizes = choose_layers(SPEC, 100 << 20, None, available_bytes=free)
    assert (sizes.layers, sizes.is_cold) == (3, False)
    for layers in (4, 100):
        with pytest.raises(NotEnoughMemoryError, match=rf"{layers} layers .* 4\.3 GB are free"):
            choose_layers(SPEC, 100 << 20, layers, available_bytes=free)
    with pytest.raises(NotEnoughMemoryError, match=r"1 layer of 8 experts need .* GB"):
        choose_layers(SPEC, 1 << 30, None, available_bytes=free)


@pytest.mark.parametrize("name", ["bf16", "int8", "int4-g32"])
def test_error_is_that_of_the_activations(name: str) -> None:
    """In float32 what is left is the rounding of the output to bf16: at most 2^-8 of each number.

    Int8 activations add more than bf16 can hide: 1/254 of the largest of a group, to each.
    """
    with CpuBackend().open("cpu", threads=1) as device:
        errors = {}
        for precision in (ActivationPrecision.FLOAT32, ActivationPrecision.AUTO):
            layers = PackedLayers(
                device, FORMATS[name], SPEC, top_k=2, layers=1, precision=precision
            )
            hidden = layers.hidden(9)
            errors[precision] = layers.relative_error(layers.next_call(9), hidden)
        is_int8 = layers.kernels[0].precision_for(torch.bfloat16) is ActivationPrecision.INT8
    assert is_int8 == (name != "bf16")
    assert 0 < errors[ActivationPrecision.FLOAT32] < 2**-8
    if is_int8:
        assert 2**-8 < errors[ActivationPrecision.AUTO] < 0.05


def test_wrong_results_show() -> None:
    with CpuBackend().open("cpu", threads=1) as device:
        layers = PackedLayers(device, FORMATS["bf16"], SPEC, top_k=2, layers=1)
        layers.kernels[0].load(0, _zeros())
        call = layers.next_call(64)
        hidden = layers.hidden(64)
        is_met = (call.expert_ids[:4] == 0).any(1)
        while not bool(is_met.any()):
            call = layers.next_call(64)
            is_met = (call.expert_ids[:4] == 0).any(1)
        assert layers.relative_error(call, hidden) > 0.1


def _zeros() -> ExpertWeights:
    shape = SPEC.intermediate_size, SPEC.hidden_size
    return ExpertWeights(gate=torch.zeros(shape), up=torch.zeros(shape), down=torch.zeros(shape).T)


def test_time_layers_counts_what_was_active() -> None:
    with CpuBackend().open("cpu", threads=1) as device:
        layers = PackedLayers(device, FORMATS["int8"], SPEC, top_k=2, layers=2)
        timing = time_layers(layers, 1, seconds=0, clock=Clock())
        assert timing.layer_s == 1.0
        assert timing.weight_bytes == 2 * layers.bytes_per_expert
        assert timing.operations == 2 * 2 * 3 * 64 * 32  # pairs, multiply and add, matrices
        assert timing.is_int8 is True


def test_one_row_for_each_format_and_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuDevice, "measure_limits", lambda device: LIMITS)
    request = Request(
        spec=SPEC,
        top_k=2,
        formats=[FORMATS["bf16"], FORMATS["int8"]],
        tokens=[1, 3],
        layers=1,
        seconds=0,
    )
    stages: list[str] = []
    report = measure_experts(
        CpuBackend(), "cpu", 1, request, progress=lambda stage, _: stages.append(stage)
    )
    rows = [(row.format, row.tokens, row.threads) for row in report.results]
    assert rows == [("bf16", 1, 1), ("bf16", 3, 1), ("int8", 1, 1), ("int8", 3, 1)]
    assert report.limits == LIMITS
    assert all(row.fraction_of_limit and row.fraction_of_limit > 0 for row in report.results)
    assert "packing" in stages
    assert "int8, 1 threads, 3 tokens" in stages


def test_the_device_measures_with_its_threads() -> None:
    with CpuBackend().open("cpu", threads=2) as device:
        limits = device.measure_limits()
    assert limits is not None
    assert min(limits.read_bytes_per_s, limits.int8_ops_per_s, limits.bf16_ops_per_s) > 1e6


def test_a_backend_that_knows_no_limits() -> None:
    """The interface's defaults."""
    request = Request(
        spec=SPEC, top_k=2, formats=[FORMATS["bf16"]], tokens=[1], layers=1, seconds=0
    )
    report = measure_experts(ReferenceBackend(), "reference", None, request)
    assert report.limits is None
    assert report.results[0].fraction_of_limit is None
    assert report.results[0].isa is None


# ---------------------------------------------------------------- cache


def _cache(root: Path, cpu: int, index: int, **files: str) -> None:
    folder = root / f"sys/devices/system/cpu/cpu{cpu}/cache/index{index}"
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")


def test_last_level_caches_are_added_up(tmp_path: Path) -> None:
    assert hardware.last_level_cache_bytes(root=tmp_path) is None
    for cpu, group in ((0, "0-1"), (1, "0-1"), (2, "2-3"), (3, "2-3")):
        _cache(tmp_path, cpu, 0, level="1", size="32K", type="Data", shared_cpu_list=str(cpu))
        _cache(tmp_path, cpu, 3, level="3", size="32M", type="Unified", shared_cpu_list=group)
    assert hardware.last_level_cache_bytes(root=tmp_path) == 64 << 20


def test_a_cache_of_unknown_size_is_an_error(tmp_path: Path) -> None:
    _cache(tmp_path, 0, 0, level="1", size="big", type="Data", shared_cpu_list="0")
    with pytest.raises(SystemFileError, match=r"size.*'big'"):
        hardware.last_level_cache_bytes(root=tmp_path)
