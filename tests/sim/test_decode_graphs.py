"""Steps of decoding from a graph: the answers of the host alone, whatever happens between them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import kt_core
from kt_core.engine import Engine, decode_cache, generation
from kt_core.interfaces import ExpertId, Swap
from sim import target
from sim.stories import EXACT, PROMPT, STORIES, TOLERANCE, alone, kept
from sim.target import NAME

pytestmark = pytest.mark.sim
__all__ = ["alone", "kept"]

GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 24, "raw": True}
TWO = f"{NAME}:0,1"


@pytest.fixture(scope="module")
def want(alone: Engine) -> tuple[int, ...]:
    return alone.generate(PROMPT, **GREEDY).token_ids


def load(device: str = NAME, **options: Any) -> Engine:
    if device == TWO and len(target.BACKEND.devices()) < 2:
        pytest.skip(f"there is one {NAME}")
    return kt_core.load(STORIES, device=device, **(EXACT | options))


class Steps:
    """Feeds an engine tokens one by one, and keeps the logits."""

    def __init__(self, engine: Engine, prompt: list[int]) -> None:
        self.engine = engine
        cache = engine.passes.begin(len(prompt), None)
        self.logits: list[torch.Tensor] = []
        self.cache = cache
        self._run(prompt)

    def _run(self, tokens: list[int]) -> None:
        logits, self.cache = self.engine.passes.run(torch.tensor([tokens]), self.cache)
        self.logits.append(logits.clone())
        assert self.engine.accelerators is not None
        self.engine.accelerators.after_step(len(tokens), 0.001)

    def add(self, token: int) -> None:
        self._run([token])


def check_logits(steps: Steps, alone: Engine, tokens: list[int]) -> None:
    """Of each step; the prompt is what the other tokens leave of ``tokens``."""
    with torch.inference_mode():
        want = alone.model(input_ids=torch.tensor([tokens])).logits[0]
    want = want[len(tokens) - len(steps.logits) :]
    worst = float((torch.stack(steps.logits) - want).abs().max())
    assert worst <= TOLERANCE * float(want.abs().max())


@pytest.mark.parametrize("hot", ["0%", "30%", "100%"])
def test_a_step_is_replayed(want: tuple[int, ...], hot: str) -> None:
    with load(hot_experts=hot, placement="random") as engine:
        got = engine.generate(PROMPT, **GREEDY)
        decode = engine.stats().decode
    assert got.token_ids == want
    assert decode.why_eager is None
    # The first step is run, so that what is made once is made; the others are replayed.
    assert (decode.eager, decode.captures, decode.from_graphs) == (1, 1, got.timing.new_tokens - 2)


def test_on_another_device(want: tuple[int, ...]) -> None:
    if len(target.BACKEND.devices()) < 2:
        pytest.skip(f"there is one {NAME}")
    with load(f"{NAME}:1", hot_experts="30%") as engine:
        assert engine.generate(PROMPT, **GREEDY).token_ids == want
        assert engine.stats().decode.from_graphs == len(want) - 2


def test_the_host_is_passed_by_until_it_has_an_expert(alone: Engine) -> None:
    tokens = [5, 6, 7, *range(40, 52)]
    with load(hot_experts="100%") as engine:
        assert engine.accelerators is not None
        layers = engine.accelerators.hybrid.layers
        assert not any(layer.uses_host for layer in layers)
        steps = Steps(engine, tokens[:3])
        for token in tokens[3:9]:
            steps.add(token)
        host, device = layers[2].kernels
        for expert in range(8):
            host.load_packed(expert, device.packed(expert).cpu())
            layers[2].move_home(expert, 0)
        assert [layer.uses_host for layer in layers] == [False, False, True, False]
        for token in tokens[9:]:
            steps.add(token)
        decode, stats = engine.stats().decode, engine.stats().accelerators
    check_logits(steps, alone, tokens)
    assert decode.captures == 2
    assert stats is not None
    assert stats.hit_rate is not None
    assert 0.8 < stats.hit_rate < 1


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "eager"])
@pytest.mark.parametrize("device", [NAME, TWO])
def test_any_residency_while_experts_move(
    alone: Engine, device: str, graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random homes, and random moves begun between steps, under buffers that soon have to grow."""
    monkeypatch.setattr(decode_cache, "_SMALLEST", 16)
    dice = random.Random(device)
    for seed in range(3):
        hot = f"{dice.choice([10, 30, 50, 80])}%"
        tokens = [dice.randrange(3, 1000) for _ in range(30)]
        with load(device, hot_experts=hot, placement="random", graph=graph) as engine:
            steps = Steps(engine, tokens[: 3 + seed])
            for token in tokens[3 + seed :]:
                begin_a_move(engine, dice)
                steps.add(token)
            stats = engine.stats()
        check_logits(steps, alone, tokens)
        assert stats.accelerators is not None
        # Several devices: the policies move nothing between them, and nobody captures over them.
        assert (stats.accelerators.moved_experts > 3) == (device == NAME)
        assert (stats.decode.from_graphs > 20) == (graph and device == NAME)
        assert stats.decode.captures in ((0,) if stats.decode.from_graphs == 0 else (2, 3))


def begin_a_move(engine: Engine, dice: random.Random) -> None:
    held = engine.accelerators
    assert held is not None
    if len(held.devices) > 1 or not held.mover.is_idle:
        return
    number = dice.randrange(len(held.hybrid.layers))
    host, device = held.hybrid.layers[number].kernels
    hot, cold = sorted(device.resident()), sorted(host.resident())
    if hot and cold:
        load, evict = ExpertId(number, dice.choice(cold)), ExpertId(number, dice.choice(hot))
        held.mover.begin([Swap(load, (evict,))])


@pytest.mark.parametrize("defer", [1, 2])
def test_deferral_gives_what_it_gives_without_graphs(defer: int) -> None:
    found = []
    for graph in (True, False):
        options = {"hot_experts": "20%", "placement": "random", "defer": defer, "graph": graph}
        with load(**options) as engine:
            steps = Steps(engine, [5, 6, 7])
            for token in range(40, 60):
                steps.add(token)
            found.append(torch.stack(steps.logits))
            assert (engine.stats().decode.from_graphs > 0) == graph
    assert float((found[0] - found[1]).abs().max()) <= TOLERANCE * float(found[1].abs().max())


def test_a_change_of_deferral_ends_the_graph() -> None:
    with load(hot_experts="20%", placement="random") as engine:
        steps = Steps(engine, [5, 6, 7])
        assert engine.accelerators is not None
        for per_token in (0, 1, 0):
            engine.accelerators.hybrid.deferral.per_token = per_token
            for token in (40, 41, 42):
                steps.add(token)
        assert engine.stats().decode.captures == 3


def test_a_kernel_that_cannot_go_on_ends_the_graph(
    alone: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As converted experts say it after a load or an unload."""
    with load(hot_experts="20%", placement="random") as engine:
        assert engine.accelerators is not None
        kernel = engine.accelerators.hybrid.layers[1].kernels[1]
        tokens = [5, 6, 7, *range(40, 52)]
        steps = Steps(engine, tokens[:3])
        for version, token in enumerate(tokens[3:]):
            changed = property(lambda _, now=version // 4: now)
            monkeypatch.setattr(type(kernel), "capture_version", changed)
            steps.add(token)
        decode = engine.stats().decode
    assert (decode.captures, decode.eager) == (3, 3)
    check_logits(steps, alone, tokens)


def test_a_long_answer_outgrows_its_buffers(alone: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_cache, "_SMALLEST", 16)
    monkeypatch.setattr(decode_cache, "_STRIDE", 32)
    monkeypatch.setattr(generation, "_TOKENS_AHEAD", 0)
    options = GREEDY | {"max_new_tokens": 300}
    want = alone.generate(PROMPT, **options).token_ids
    with load(hot_experts="40%") as engine:
        assert engine.generate(PROMPT, **options).token_ids == want
        decode = engine.stats().decode
    assert len(want) > 100
    assert decode.captures == decode.eager >= 4
    assert decode.from_graphs + decode.eager == len(want) - 1 + (len(want) < 300)


def test_the_next_turn_goes_on_with_cache_and_graph(alone: Engine) -> None:
    with load(hot_experts="40%", placement="random") as engine:
        first = engine.generate(PROMPT, **GREEDY)
        longer = [*engine.encode(PROMPT, raw=True), *first.token_ids, 70, 71]
        second = engine.generate(longer, **GREEDY)
        other = engine.generate([9, 8, 7], **GREEDY)
        decode = engine.stats().decode
    assert second.token_ids == alone.generate(longer, **GREEDY).token_ids
    assert other.token_ids == alone.generate([9, 8, 7], **GREEDY).token_ids
    assert second.timing.cached_tokens >= len(longer) - 3
    assert other.timing.cached_tokens == 0
    assert (decode.captures, decode.eager) == (1, 1)


def test_streams_and_engines_in_turns(want: tuple[int, ...]) -> None:
    with load(hot_experts="30%") as one, load(hot_experts="60%", placement="random") as two:
        streams = [engine.stream(PROMPT, **GREEDY) for engine in (one, two, one)]
        steps = list(zip(*streams, strict=True))
        decode = one.stats().decode
    for place in range(3):
        tokens = tuple(step[place].token for step in steps)
        assert tokens[:-1] == want
    assert decode.captures == 2  # each sequence has buffers of its own


def test_an_answer_that_is_left_can_be_continued(want: tuple[int, ...]) -> None:
    with load(hot_experts="30%") as engine:
        stream = engine.stream(PROMPT, **GREEDY)
        assert [next(stream).token for _ in range(8)] == list(want[:8])
        stream.close()  # type: ignore[attr-defined]
        again = engine.generate(PROMPT, **GREEDY)
        decode = engine.stats().decode
    assert again.token_ids == want
    assert again.timing.cached_tokens > 0
    assert decode.captures == 1
