"""Experts that move between the host and two simulated accelerators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kt_core
from kt_core.engine import Engine, accelerators
from kt_core.interfaces import ExpertDevice, ExpertId, RoutingStatistics, Swap
from kt_core.moe.expert_mover import ExpertMover
from kt_core.placement.machine import LINK_SHARE
from kt_core.placement.statistics import load_statistics, save_statistics
from kt_core.plan.hot_experts import card_reserve_bytes
from kt_cpu.backend import CpuBackend
from kt_sim.native import NativeDevice
from kt_sim.settings import parse
from sim.stories import EXACT, STORIES
from sim.target import only_sim
from sim.test_hybrid_experts import SPEC, check, hybrid

pytestmark = [pytest.mark.sim, only_sim]

GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 80, "raw": True}
PROMPTS = ("Once upon a time", "The little dog ran to the tree and", "Lily and Ben like to")


def both() -> list[torch.device]:
    return [torch.device("sim:0"), torch.device("sim:1")]


@pytest.fixture(scope="module")
def host() -> Iterator[ExpertDevice]:
    with CpuBackend().open("cpu", threads=2) as opened:
        yield opened


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where statistics are kept: they tell of the opposite of what will be used."""
    file = tmp_path / "statistics.json"
    monkeypatch.setattr(accelerators, "statistics_file", lambda directory: file)
    with kt_core.load(STORIES, device="sim", hot_experts="0%", **EXACT) as engine:
        for prompt in PROMPTS:
            engine.generate(prompt, **GREEDY)
    used = load_statistics(file)
    assert used is not None
    most = max(max(layer) for layer in used.counts)
    counts = tuple(tuple(most - count for count in layer) for layer in used.counts)
    save_statistics(RoutingStatistics(counts=counts, tokens=40), file)
    return file


def test_experts_move_between_three_places_while_the_layer_runs(
    host: ExpertDevice, device: NativeDevice
) -> None:
    layer = hybrid(host, {0, 1}, {2, 3})
    # Slow enough for calls to pass while copies are under way.
    device.configure(
        **parse("devices=2,memory_gib=0.25,link_gb_s=0.002,link_latency_us=50").native()
    )
    mover, dice = ExpertMover([layer], *both()), random.Random(1)
    for seed in range(40):
        if mover.is_idle:
            target, source = dice.sample([1, 2], 2)
            swap = Swap(
                ExpertId(0, dice.choice(sorted(layer.kernels[0].resident()))),
                (ExpertId(0, dice.choice(sorted(layer.kernels[source].resident()))),),
            )
            if len(layer.kernels[source].resident()) > 1:
                mover.begin([swap], target)
                homes = mover.homes((1, SPEC.num_experts))
                assert homes[swap.load] == target
                assert homes[swap.evict[0]] == 0
        check(layer, tokens=4, seed=seed)
        mover.advance()
    mover.finish()
    assert mover.moves >= 6
    held = [kernel.resident() for kernel in layer.kernels]
    assert sum(map(len, held)) == SPEC.num_experts
    assert frozenset.union(*held) == frozenset(range(SPEC.num_experts))
    assert mover.bytes_to_device == mover.bytes_to_host > 0
    check(layer, tokens=4)


def test_moving_leaks_nothing_on_either_device(host: ExpertDevice) -> None:
    layer = hybrid(host, {0}, {2})
    mover = ExpertMover([layer], *both())

    def there_and_back() -> list[int]:
        for load, evict, target in ((1, 0, 2), (0, 2, 1), (2, 1, 2)):
            mover.begin([Swap(ExpertId(0, load), (ExpertId(0, evict),))], target)
            mover.finish()
            check(layer, tokens=3)
        for where in both():
            torch.accelerator.synchronize(where)
        return [int(torch.accelerator.memory_allocated(where)) for where in both()]

    first = there_and_back()
    assert [there_and_back() for _ in range(4)] == [first] * 4
    assert [kernel.resident() for kernel in layer.kernels[1:]] == [{0}, {2}]


def homes_of(engine: Engine) -> list[frozenset[ExpertId]]:
    """What lies on each device, the host first."""
    assert engine.accelerators is not None
    layers = engine.accelerators.hybrid.layers
    return [
        frozenset(
            ExpertId(index, expert)
            for index, layer in enumerate(layers)
            for expert in layer.kernels[number].resident()
        )
        for number in range(3)
    ]


@pytest.mark.parametrize("hot", ["25%", "60%"])
def test_two_devices_follow_the_routing_and_the_answer_stays(kept: Path, hot: str) -> None:
    with kt_core.load(STORIES, device="cpu", **EXACT) as alone:
        want = [alone.generate(prompt, **GREEDY).token_ids for prompt in PROMPTS]
    with kt_core.load(
        STORIES, device="sim:0,1", hot_experts=hot, placement="adaptive", **EXACT
    ) as engine:
        before = homes_of(engine)
        got = [engine.generate(prompt, **GREEDY).token_ids for prompt in PROMPTS]
        assert engine.accelerators is not None
        engine.accelerators.mover.finish()
        after, stats = homes_of(engine), engine.stats()
    assert got == want
    assert stats.accelerators is not None
    assert stats.accelerators.moved_experts > 0
    # Both took part, and neither took the other's share.
    assert all(after[number] - before[number] for number in (1, 2))
    assert sum(map(len, after)) == sum(map(len, before)) == 64
    assert len(after[1]) + len(after[2]) <= len(before[1]) + len(before[2])
    assert abs(len(after[1]) - len(after[2])) <= len(before[1]) // 2
    assert load_statistics(kept) is not None


def test_each_device_holds_what_it_has_room_for(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense part leaves the first one room for five experts: the second gets the others."""
    options = {"hot_experts": "60%", "placement": "adaptive", **EXACT}
    with kt_core.load(STORIES, device="sim:0,1", **options) as engine:
        assert engine.accelerators is not None
        first, layer = engine.accelerators.devices[0], engine.accelerators.hybrid.layers[0]
        size = first.expert_bytes(layer.spec, layer.kernels[0].weight_format)
        memory = first.info.memory_bytes
    room = 5 * size + size // 2
    monkeypatch.setattr(
        accelerators,
        "computing_bytes",
        lambda *_, **__: {"dense_weights": memory - card_reserve_bytes(memory) - room},
    )
    with kt_core.load(STORIES, device="sim:0,1", **options) as engine:
        assert engine.accelerators is not None
        before = homes_of(engine)
        assert (len(before[1]), len(before[2])) == (5, 38 - 5)
        engine.generate(PROMPTS[0], **GREEDY)
        mover = engine.accelerators.mover
        mover.finish()
        after = homes_of(engine)
        assert mover.moves > 0
        assert mover.given_up == 0
        assert len(after[1]) <= 5
        assert len(after[1]) + len(after[2]) <= 38
    assert kept.is_file()


def test_swaps_take_their_share_of_the_slowest_link(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"sim:0": 8e9, "sim:1": 2e9}
    monkeypatch.setattr(
        accelerators.Accelerators,
        "_measure_link",
        staticmethod(lambda device: rates[device.info.torch_device]),
    )
    options: dict[str, Any] = {"hot_experts": "25%", "placement": "adaptive"}
    with kt_core.load(STORIES, device="sim:0,1", **EXACT, **options) as engine:
        assert engine.accelerators is not None
        assert engine.accelerators._link is not None
        assert engine.accelerators._link.grant(1.0) == LINK_SHARE * 2e9
