"""Steps of decoding from a graph: the answers of the host alone, whatever happens between them."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicLayer

import kt_core
from kt_core.engine import Engine, accelerators, decode_cache, generation
from kt_core.engine.decode_step import DecodeStep
from kt_core.engine.routing import recording
from kt_core.interfaces import ExpertId, Swap
from kt_sim.native import NativeDevice
from sim import target
from sim.target import NAME, WHERE

pytestmark = pytest.mark.sim

STORIES = Path(__file__).parents[1] / "data" / "stories-moe"
PROMPT = "Once upon a time"
GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 24, "raw": True}
# So that host and device compute the same numbers, but for the order of sums.
EXACT: dict[str, Any] = {"format": "bf16", "threads": 1, "dtype": torch.float32}
# As in test_engine: logits of two orders of float32 sums.
TOLERANCE = 2**8 * 2**-24
TWO = f"{NAME}:0,1"


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where statistics are kept; there are none of earlier runs."""
    file = tmp_path / "statistics.json"
    monkeypatch.setattr(accelerators, "statistics_file", lambda directory: file)
    return file


@pytest.fixture(scope="module")
def alone() -> Iterator[Engine]:
    with kt_core.load(STORIES, device="cpu", precision="float32", **EXACT) as engine:
        yield engine


@pytest.fixture(scope="module")
def want(alone: Engine) -> tuple[int, ...]:
    return alone.generate(PROMPT, **GREEDY).token_ids


def load(device: str = NAME, **options: Any) -> Engine:
    if device == TWO and len(target.BACKEND.devices()) < 2:
        pytest.skip(f"there is one {NAME}")
    return kt_core.load(STORIES, device=device, precision="float32", **(EXACT | options))


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


@pytest.mark.parametrize("place", ["run", "capture", "replay"])
def test_an_interrupt_leaves_the_engine_usable(
    want: tuple[int, ...], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the host waits for the device, or puts the step together for it."""
    name = "_put_together" if place == "capture" else "_wait"
    real = getattr(DecodeStep, name)
    calls_left = {"run": 1, "capture": 2, "replay": 5}[place]

    def interrupted(self: DecodeStep, *arguments: Any) -> None:
        nonlocal calls_left
        calls_left -= 1
        if place == "capture":
            real(self, *arguments)
        if calls_left == 0:
            raise KeyboardInterrupt
        if place != "capture":
            real(self, *arguments)

    with load(hot_experts="30%") as engine:
        with monkeypatch.context() as patch:
            patch.setattr(DecodeStep, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.generate(PROMPT, **GREEDY)
        again = engine.generate(PROMPT, **GREEDY)
        decode = engine.stats().decode
    assert again.token_ids == want
    assert again.timing.cached_tokens > 0, "what was computed before is kept"
    assert decode.why_eager is None
    assert decode.from_graphs > 10


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "eager"])
def test_what_an_interrupted_pass_put_off_is_not_added_to_the_next(
    graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(hot_experts="20%", placement="random", defer=1, graph=graph) as engine:
        want = engine.generate(PROMPT, **GREEDY).token_ids
        layer: Any = engine.model.model.layers[2].mlp

        def interrupted(hidden: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(layer, "forward", interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.generate([*range(60, 80)], **GREEDY)
        assert engine.generate(PROMPT, **GREEDY).token_ids == want


def test_an_interrupt_while_buffers_grow(alone: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_cache, "_SMALLEST", 16)
    real, calls = decode_cache.DecodeLayer.fit, 0

    def interrupted(self: decode_cache.DecodeLayer) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        real(self)

    tokens = [5, 6, 7, *range(40, 60)]
    with load(hot_experts="20%") as engine:
        steps = Steps(engine, tokens[:3])
        monkeypatch.setattr(decode_cache.DecodeLayer, "fit", interrupted)
        for token in tokens[3:]:
            try:
                steps.add(token)
            except KeyboardInterrupt:
                steps.add(token)
    assert calls == 7  # of four layers, the third one twice
    check_logits(steps, alone, tokens)


def test_without_memory_for_what_may_come_only_the_needed_is_taken(
    alone: Engine, device: NativeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_cache, "_SMALLEST", 16)
    tokens = [5, 6, 7, *range(40, 60)]
    with load(hot_experts="20%", graph=True) as engine:
        steps = Steps(engine, tokens[:3])
        device.fail_allocations(0, 1)
        assert engine.passes.begin(200, steps.cache) is steps.cache
        for token in tokens[3:]:
            steps.add(token)
        assert steps.cache.capacity == 32
    check_logits(steps, alone, tokens)


def test_what_cannot_be_captured_is_decoded_eagerly(
    want: tuple[int, ...], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(hot_experts="30%", placement="random") as engine:
        norm: Any = engine.model.model.norm
        real = norm.forward

        def reads(hidden: torch.Tensor) -> torch.Tensor:
            assert hidden.sum().item() != 0.123
            out: torch.Tensor = real(hidden)
            return out

        monkeypatch.setattr(norm, "forward", reads)
        for _ in range(2):
            assert engine.generate(PROMPT, **GREEDY).token_ids == want
        decode = engine.stats().decode
        assert engine.accelerators is not None
        lanes = [layer.kernels[0] for layer in engine.accelerators.hybrid.layers]
        assert not any(lane.take_captured() for lane in lanes), "nothing of the attempt is kept"
    assert decode.from_graphs == decode.captures == 0
    assert decode.why_eager is not None
    assert "could not be captured" in decode.why_eager
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "--no-graph" in caplog.text


def test_a_model_that_wants_its_own_cache_gets_it(
    want: tuple[int, ...], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(hot_experts="30%", placement="random") as engine:
        real = engine.model.forward

        def forward(past_key_values: Any = None, **arguments: Any) -> Any:
            assert past_key_values is None or past_key_values.layers[0].reset_marks is not None
            return real(past_key_values=past_key_values, **arguments)

        monkeypatch.setattr(DynamicLayer, "reset_marks", (), raising=False)
        monkeypatch.setattr(engine.model, "forward", forward)
        for _ in range(2):
            assert engine.generate(PROMPT, **GREEDY).token_ids == want
        decode = engine.stats().decode
    assert decode.why_eager is not None
    assert "reset_marks" in decode.why_eager
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_who_watches_the_model_sees_every_step(want: tuple[int, ...]) -> None:
    with load(hot_experts="30%") as engine:
        engine.generate(PROMPT, **GREEDY)
        with recording(engine) as recorder:
            assert engine.generate(PROMPT, **GREEDY).token_ids == want
        seen = recorder.num_tokens
        before = engine.stats().decode.from_graphs
        assert engine.generate(PROMPT, **GREEDY).token_ids == want
        assert engine.stats().decode.from_graphs > before
    assert seen == len(want)  # the prompt was there already, but for its last token


def test_a_model_that_was_changed_is_captured_again(
    alone: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed: Any = copy.deepcopy(alone.model.model.norm)
    with torch.no_grad():
        changed.weight.mul_(torch.linspace(-1, 2, len(changed.weight)))
    with load(hot_experts="30%") as engine:
        before = engine.generate(PROMPT, **GREEDY).token_ids
        engine.model.model.norm = copy.deepcopy(changed).to(WHERE)
        got = engine.generate(PROMPT, **GREEDY).token_ids
        assert engine.stats().decode.captures == 2
    monkeypatch.setattr(alone.model.model, "norm", changed)
    assert got == alone.generate(PROMPT, **GREEDY).token_ids != before


def test_another_attention_is_captured_again_or_not_at_all(
    want: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with load(hot_experts="30%") as engine:
        for captures, attention in enumerate(("sdpa", "eager"), 1):
            monkeypatch.setattr(engine.model.config, "_attn_implementation", attention)
            assert engine.generate(PROMPT, **GREEDY).token_ids == want
            assert engine.stats().decode.captures == captures
        monkeypatch.setattr(engine.model.config, "_attn_implementation", "flex_attention")
        engine.passes.begin(8, None)  # it cannot run here, so that is all that is asked
        assert not engine.passes._may_replay


def test_why_steps_are_eager() -> None:
    with load(hot_experts="30%", graph=False) as engine:
        assert engine.stats().decode.why_eager == "switched off"
    with load(TWO, hot_experts="30%") as engine:
        why = engine.stats().decode.why_eager
        assert why is not None
        assert "several accelerators" in why


def test_closing_gives_the_graph_s_memory_back() -> None:
    def used() -> tuple[int, int]:
        torch.accelerator.synchronize(WHERE)
        torch.accelerator.empty_cache()
        device = torch.device(WHERE)
        allocated = torch.accelerator.memory_allocated(device)
        return int(allocated), int(torch.accelerator.memory_reserved(device))

    with load(hot_experts="50%") as engine:
        engine.generate(PROMPT, **GREEDY)
    del engine
    before = used()
    with load(hot_experts="50%") as engine:
        engine.generate(PROMPT, **GREEDY)
        assert engine.stats().decode.captures == 1
    del engine
    assert used() == before


def test_an_error_on_the_host_reaches_the_caller(want: tuple[int, ...]) -> None:
    with load(hot_experts="0%") as engine:
        engine.generate(PROMPT, **GREEDY)
        assert engine.accelerators is not None
        layer = engine.accelerators.hybrid.layers[1]
        held = {e: layer.kernels[0].packed(e).clone() for e in layer.kernels[0].resident()}
        stream = engine.stream(PROMPT, **GREEDY)
        next(stream)
        for expert in held:
            layer.kernels[0].unload(expert)  # behind the table's back
        with pytest.raises(RuntimeError, match="experts on the cpu failed"):
            list(stream)
        for expert, packed in held.items():
            layer.kernels[0].load_packed(expert, packed)
        assert engine.generate(PROMPT, **GREEDY).token_ids == want


def test_a_lost_device_ends_in_an_error(device: NativeDevice, want: tuple[int, ...]) -> None:
    with load(hot_experts="30%") as engine:
        stream = engine.stream(PROMPT, **GREEDY)
        assert [next(stream).token for _ in range(5)] == list(want[:5])
        device.lose(0, "it fell off the bus")
        with pytest.raises(RuntimeError, match="fell off the bus"):
            list(stream)
        assert engine.stats().decode.why_eager is None, "the graph was not to blame"
        device.revive(0)
