"""A model on the host and on simulated accelerators: the same answers as on the host alone."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import kt_core
from kt_core.engine import Engine
from kt_core.engine.deferral_effect import deferral_effects
from kt_core.errors import (
    InvalidRequestError,
    NotEnoughMemoryError,
    UnknownNameError,
)
from kt_core.interfaces import RoutingStatistics
from kt_core.placement.statistics import load_statistics, save_statistics
from sim import target
from sim.stories import EXACT, PROMPT, STORIES, TOLERANCE, alone, kept
from sim.target import NAME, WHERE

pytestmark = pytest.mark.sim
__all__ = ["alone", "kept"]

GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 24, "raw": True}


def load(device: str = NAME, **options: Any) -> Engine:
    if device in {f"{NAME}:1", f"{NAME}:0,1"} and len(target.BACKEND.devices()) < 2:
        pytest.skip(f"there is one {NAME}")
    return kt_core.load(STORIES, device=device, **(EXACT | options))


def test_the_command_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from kt_core.cli.main import run_cli

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The little dog ran\n")
    command = ["bench", "deferral", str(STORIES), "--prompts", str(prompts), "--device", NAME]
    command += ["--raw", "--hot-experts", "20%", "--defer", "1", "--json", "--threads", "1"]
    assert run_cli(command) == 0
    (effect,) = json.loads(capsys.readouterr().out)
    assert effect["per_token"] == 1
    assert effect["kl_divergence"] > 0


def check_logits(engine: Engine, alone: Engine) -> None:
    ids = torch.tensor([engine.encode("The little dog ran to the tree and", raw=True)])
    with torch.inference_mode():
        got = engine.model(input_ids=ids.to(engine.model.device)).logits.cpu()
        want = alone.model(input_ids=ids).logits
    scale = float(want.abs().max())
    assert float((got - want).abs().max()) <= TOLERANCE * scale


@pytest.mark.parametrize(
    ("device", "hot"),
    [(NAME, "0%"), (NAME, "25%"), (f"{NAME}:1", "70%"), (f"{NAME}:0,1", "50%"), (NAME, "auto")],
)
def test_the_same_answer(alone: Engine, device: str, hot: str) -> None:
    want = alone.generate(PROMPT, **GREEDY)
    with load(device, hot_experts=hot, placement="random") as engine:
        assert engine.generate(PROMPT, **GREEDY).token_ids == want.token_ids
        check_logits(engine, alone)
        stats = engine.stats()
    experts = sum(alone.stats().placement.values())
    on_host, *on_devices = stats.placement.values()
    share = {"auto": 1.0}.get(hot) or float(hot.rstrip("%")) / 100
    assert sum(on_devices) == int(share * experts) == experts - on_host
    assert stats.accelerators is not None
    assert stats.accelerators.tokens == len(alone.encode(PROMPT, raw=True)) + 23
    assert stats.accelerators.hit_rate is not None
    if share in {0.0, 1.0}:
        assert stats.accelerators.hit_rate == share


def test_experts_follow_the_routing_and_the_answer_stays(alone: Engine, kept: Path) -> None:
    """It starts with what an earlier run liked, which is wrong, and learns."""
    want = alone.generate(PROMPT, **(GREEDY | {"max_new_tokens": 80}))
    with load(hot_experts="0%") as engine:
        assert engine.generate(PROMPT, **(GREEDY | {"max_new_tokens": 80})).token_ids
    used = load_statistics(kept)
    assert used is not None
    most = max(max(layer) for layer in used.counts)
    unused = RoutingStatistics(
        counts=tuple(tuple(most - count for count in layer) for layer in used.counts), tokens=40
    )
    save_statistics(unused, kept)
    with load(hot_experts="40%", placement="adaptive") as engine:
        got = engine.generate(PROMPT, **(GREEDY | {"max_new_tokens": 80}))
        assert got.token_ids == want.token_ids
        stats = engine.stats().accelerators
        check_logits(engine, alone)
    assert stats is not None
    assert stats.moved_experts > 0
    assert stats.link_bytes_to_device > 0
    learned = load_statistics(kept)
    assert learned is not None
    assert learned.tokens > 40 + 79


def test_a_long_prompt_goes_through_the_accelerator(alone: Engine) -> None:
    """From a pair for each expert on, as the test has it; rates are measured otherwise."""
    prompt = "The little dog ran to the tree and the cat sat on the mat. " * 8
    want = alone.generate(prompt, **GREEDY)
    with load(hot_experts="20%") as engine:
        assert engine.accelerators is not None
        target.stream_from_a_pair_for_each_expert_on(engine.accelerators.hybrid.streamed)
        assert engine.generate(prompt, **GREEDY).token_ids == want.token_ids
        stats = engine.stats().accelerators
    assert stats is not None
    assert stats.streamed_layers == alone.stats().expert_layers
    assert stats.link_bytes_streamed > 0


def test_deferral_changes_the_answer_a_little() -> None:
    with load(hot_experts="20%") as engine:
        prompts = [engine.encode("The little dog ran to the tree and", raw=True)] * 2
        off, one, many = deferral_effects(engine, prompts, [0, 1, 9])
        assert engine.accelerators is not None
        assert engine.accelerators.hybrid.deferral.per_token == 0
    assert off.kl_divergence == off.largest_difference == 0
    assert off.same_choice == 1
    assert off.tokens == sum(map(len, prompts))
    assert 0 < one.kl_divergence < 1
    assert one == many.__class__(**{**asdict(many), "per_token": 1}), "it has two experts a token"


def test_closing_gives_all_memory_back(alone: Engine) -> None:
    del alone

    def used() -> int:
        torch.accelerator.synchronize(WHERE)
        return int(torch.accelerator.memory_allocated(WHERE))

    def use() -> None:
        before = used()
        with load(hot_experts="50%") as engine:
            assert used() > before
            engine.generate(PROMPT, **GREEDY)

    use()  # a vendor's libraries keep what they took when they were first called
    before = used()
    use()
    assert used() == before


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"hot_experts": "many"}, InvalidRequestError, "neither auto"),
        ({"hot_experts": "120%"}, InvalidRequestError, "at most 100%"),
        ({"hot_experts": "99999"}, InvalidRequestError, "the model has"),
        ({"accelerator_memory": 1 << 20}, NotEnoughMemoryError, "the dense part"),
        ({"dense_format": "int5"}, UnknownNameError, "int5"),
        ({"placement": "best"}, UnknownNameError, "best"),
        ({"device": f"{NAME}:0,0"}, UnknownNameError, "once"),
        ({"device": f"{NAME}:7"}, UnknownNameError, f"{NAME}:7"),
    ],
)
def test_what_cannot_be_is_refused(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        load(**options)
