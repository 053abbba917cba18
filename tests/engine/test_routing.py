"""Recording the routing of an engine: against the routers themselves, on a small trained model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kt_core
from kt_core.engine import Engine
from kt_core.engine.prompts import read_prompts
from kt_core.engine.routing import expert_modules, record, recording, remember, saved_statistics
from kt_core.errors import InvalidRequestError, UnsupportedModelError
from kt_core.placement.trace import NO_EXPERT

STORIES = Path(__file__).parents[1] / "data" / "stories-moe"
PROMPTS = ["Once upon a time", "Tom had a red ball and he loved it very much."]
GREEDY = {"raw": True, "temperature": 0.0, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with kt_core.load(STORIES, threads=1) as engine:
        yield engine


class Routers:
    """What every router of the model got and answered, in order."""

    def __init__(self, engine: Engine) -> None:
        self.gates = [layer.mlp.gate for layer in engine.model.model.layers]
        self.inputs: list[list[torch.Tensor]] = [[] for _ in self.gates]
        self.ids: list[list[torch.Tensor]] = [[] for _ in self.gates]
        self.weights: list[list[torch.Tensor]] = [[] for _ in self.gates]
        self.handles = [
            gate.register_forward_hook(self._hook(layer)) for layer, gate in enumerate(self.gates)
        ]

    def _hook(self, layer: int) -> Any:
        def keep(module: Any, args: Any, output: Any) -> None:
            _, weights, ids = output
            self.inputs[layer].append(args[0])
            self.ids[layer].append(ids)
            self.weights[layer].append(weights)

        return keep

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def test_recorded_is_what_the_routers_said(engine: Engine) -> None:
    routers = Routers(engine)
    trace = record(engine, PROMPTS, **GREEDY)
    routers.close()
    for layer in range(4):
        ids = torch.cat(routers.ids[layer]).numpy()
        assert np.array_equal(trace.expert_ids[:, layer], ids)
        weights = torch.cat(routers.weights[layer]).to(torch.float16).numpy()
        assert np.array_equal(trace.weights[:, layer], weights)  # type: ignore[index]
    sizes = [len(engine.encode(prompt, raw=True)) for prompt in PROMPTS]
    # The last token of an answer is chosen, but goes through no layer.
    assert trace.step_tokens.tolist() == [sizes[0], *[1] * 5, sizes[1], *[1] * 5]
    assert trace.step_is_decode.tolist() == [0, *[1] * 5] * 2
    assert trace.prompt_steps.tolist() == [0, 6]
    assert trace.predicted_ids is None
    assert trace.model == "stories-moe (qwen3_moe, bf16)"
    module = expert_modules(engine)[0]
    assert trace.grid.num_experts == (16,) * 4
    assert trace.grid.expert_bytes == (module.kernels[0].bytes_per_expert,) * 4
    assert trace.expert_weights == (3 * 128 * 128,) * 4
    assert trace.dense_bytes == engine.stats().dense_bytes


def test_predictions_are_the_next_router_on_this_layers_input(engine: Engine) -> None:
    routers = Routers(engine)
    plain = record(engine, PROMPTS, **GREEDY)
    routers.close()
    trace = record(engine, PROMPTS, predicts=True, **GREEDY)
    assert np.array_equal(trace.expert_ids, plain.expert_ids)
    assert trace.predicted_ids is not None
    assert (trace.predicted_ids[:, 0] == NO_EXPERT).all()
    with torch.inference_mode():
        for layer in range(1, 4):
            _, _, want = routers.gates[layer](torch.cat(routers.inputs[layer - 1]))
            same = trace.predicted_ids[:, layer] == want.numpy()
            # One product for all tokens is rounded otherwise than one for each: near ties turn.
            assert same.mean() > 0.95
    assert (trace.predicted_ids[:, 1:] != trace.expert_ids[:, 1:]).any()


def test_recording_changes_nothing_and_ends(engine: Engine) -> None:
    want = engine.generate(PROMPTS[0], **GREEDY).token_ids
    hooks = [len(module._forward_pre_hooks) for module in engine.model.modules()]
    with recording(engine, predicts=True) as recorder:
        assert engine.generate(PROMPTS[0], **GREEDY).token_ids == want
    tokens = recorder.num_tokens
    assert engine.generate(PROMPTS[0], **GREEDY).token_ids == want
    assert recorder.num_tokens == tokens
    assert [len(module._forward_pre_hooks) for module in engine.model.modules()] == hooks


def test_a_failure_within_the_block_removes_the_hooks(engine: Engine) -> None:
    hooks = [len(module._forward_pre_hooks) for module in engine.model.modules()]
    with pytest.raises(KeyboardInterrupt), recording(engine):
        raise KeyboardInterrupt
    assert [len(module._forward_pre_hooks) for module in engine.model.modules()] == hooks


def test_a_block_that_needs_more_than_hidden_states_cannot_be_asked_early(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = type(engine.model.model.layers[0].mlp)

    def forward(self: Any, hidden_states: torch.Tensor, token_types: torch.Tensor) -> None:
        raise AssertionError

    monkeypatch.setattr(block, "forward", forward)
    with (
        pytest.raises(UnsupportedModelError, match="routes by hidden_states, token_types"),
        recording(engine, predicts=True),
    ):
        pass


def test_what_was_learned_is_there_at_the_next_start(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert saved_statistics(engine) is None
    trace = record(engine, PROMPTS[:1], **GREEDY)
    file = remember(engine, trace)
    assert file.is_relative_to(tmp_path)
    assert saved_statistics(engine) == trace.statistics()
    remember(engine, trace)
    twice = saved_statistics(engine)
    assert twice is not None
    assert twice.tokens == 2 * trace.num_tokens


# ---------------------------------------------------------------- prompts


def test_prompt_files(tmp_path: Path) -> None:
    plain = tmp_path / "p.txt"
    plain.write_text('Hello\n\n  \n{"prompt": "x"}\n', encoding="utf-8")
    assert read_prompts(plain) == ["Hello", '{"prompt": "x"}']
    lines = tmp_path / "p.jsonl"
    messages = '[{"role": "user", "content": "c"}]'
    lines.write_text(f'"a"\n{{"prompt": "b", "id": 7}}\n{{"messages": {messages}}}\n')
    assert read_prompts(lines) == ["a", "b", [{"role": "user", "content": "c"}]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompts"),
        ("{", "line 1 of .* is no JSON"),
        ('"a"\n7\n', "line 2 of .* is no prompt"),
        ('{"text": "a"}', "is no prompt"),
        ('{"messages": [{"role": "user"}]}', "is no prompt"),
        ('""', "is no prompt"),
    ],
)
def test_prompt_files_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(text)
    with pytest.raises(InvalidRequestError, match=message):
        read_prompts(file)
    with pytest.raises(InvalidRequestError, match="cannot read the prompts"):
        read_prompts(tmp_path / "absent")
