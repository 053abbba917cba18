"""Decode graphs when something goes wrong, is changed, or is over."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from kt_core.engine import Engine, decode_cache
from kt_core.engine.decode_step import DecodeStep
from kt_core.engine.routing import recording
from kt_sim.native import NativeDevice
from sim.stories import PROMPT, alone, kept
from sim.target import WHERE
from sim.test_decode_graphs import GREEDY, TWO, Steps, check_logits, load, want

pytestmark = pytest.mark.sim
__all__ = ["alone", "kept", "want"]


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
