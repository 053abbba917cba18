"""What goes wrong while a model answers: a clear error, and an engine that goes on or is closed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kt_core
from kt_core.engine import Engine
from kt_core.errors import DeviceError
from kt_core.interfaces import ExpertKernel, RoutingStatistics
from kt_core.placement.statistics import load_statistics, save_statistics
from kt_sim.native import NativeDevice
from sim.stories import EXACT, PROMPT, STORIES, kept
from sim.target import only_sim

pytestmark = [pytest.mark.sim, only_sim]
__all__ = ["kept"]

GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 60, "raw": True}


@pytest.fixture(scope="module")
def want() -> tuple[int, ...]:
    """What the host alone answers."""
    with kt_core.load(STORIES, device="cpu", **EXACT) as engine:
        return engine.generate(PROMPT, **GREEDY).token_ids


def load(device: str = "sim", **options: Any) -> Engine:
    return kt_core.load(STORIES, device=device, **(EXACT | options))


def answer(engine: Engine) -> tuple[int, ...]:
    return engine.generate(PROMPT, **GREEDY).token_ids


def kernels(engine: Engine, number: int) -> Iterator[ExpertKernel]:
    """Kernel ``number`` of every layer."""
    assert engine.accelerators is not None
    for layer in engine.accelerators.hybrid.layers:
        yield layer.kernels[number]


def test_after_an_error_in_a_callback_the_engine_goes_on(want: tuple[int, ...]) -> None:
    """Experts are gone that the host should compute, which the called function finds out."""
    with load(hot_experts="25%", placement="uniform") as engine:
        host = list(kernels(engine, 0))[1]
        taken = {expert: host.packed(expert).clone() for expert in host.resident()}
        for expert in taken:
            host.unload(expert)
        with pytest.raises(RuntimeError, match=r"expert \d+ is not resident"):
            answer(engine)
        for expert, packed in taken.items():
            host.load_packed(expert, packed)
        assert answer(engine) == want
        assert answer(engine) == want, "no error is left over"


def test_a_swap_without_memory_leaves_the_answer_as_it_is(
    want: tuple[int, ...], kept: Path, device: NativeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(hot_experts="0%") as engine:
        answer(engine)
    used = load_statistics(kept)
    assert used is not None
    most = max(max(layer) for layer in used.counts)
    counts = tuple(tuple(most - count for count in layer) for layer in used.counts)
    save_statistics(RoutingStatistics(counts=counts, tokens=40), kept)
    with load(hot_experts="40%", placement="adaptive") as engine:
        answer(engine)  # what a step allocates is there now
        assert engine.accelerators is not None
        mover = engine.accelerators.mover
        mover.finish()
        failures = iter(range(3))

        def without_memory(kernel: ExpertKernel) -> Any:
            load_packed = kernel.load_packed

            def load_one(expert: int, packed: torch.Tensor) -> None:
                if next(failures, None) is not None:
                    device.fail_allocations(0, 1)
                load_packed(expert, packed)

            return load_one

        for kernel in kernels(engine, 1):
            monkeypatch.setattr(kernel, "load_packed", without_memory(kernel))
        other = engine.generate("Lily and Ben like to play in the park", **GREEDY)
        assert other.token_ids
        assert answer(engine) == want
        mover.finish()
        assert mover.given_up == 3
        homes = [kernel.resident() for kernel in kernels(engine, 0)]
        hot = [kernel.resident() for kernel in kernels(engine, 1)]
        assert all(not (cold & warm) for cold, warm in zip(homes, hot, strict=True))
        assert sum(map(len, homes)) + sum(map(len, hot)) == 64


@pytest.mark.parametrize(("device_name", "lost"), [("sim", 0), ("sim:0,1", 0), ("sim:0,1", 1)])
def test_a_lost_device_ends_the_answer_and_the_engine_closes(
    want: tuple[int, ...],
    device: NativeDevice,
    caplog: pytest.LogCaptureFixture,
    device_name: str,
    lost: int,
) -> None:
    options = {"hot_experts": "50%", "placement": "adaptive"}
    engine = load(device_name, **options)
    events = engine.stream(PROMPT, **GREEDY)
    for _ in range(5):
        next(events)
    device.lose(lost, "it fell off the bus")
    with pytest.raises((DeviceError, RuntimeError), match="fell off the bus"):
        list(events)
    with caplog.at_level(logging.WARNING):
        engine.close()
    if lost == 0:
        assert "routing statistics were not kept: sim:0 is lost" in caplog.text
    engine.close()  # twice does nothing
    del events, engine
    device.revive(lost)
    with load(device_name, **options) as again:
        assert answer(again) == want
