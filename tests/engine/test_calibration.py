"""What calibration sees and how it is used; what evaluation counts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kt_core
from cli.calling import STORIES
from kt_core import plugins
from kt_core.engine.calibration import Calibration, calibrate
from kt_core.engine.evaluation import evaluate
from kt_core.engine.expert_inputs import ExpertInputs
from kt_core.engine.quantize_command import Options, run
from kt_core.engine.quantize_expert import Method, quantize_expert
from kt_core.engine.quantize_plan import plan_quantization
from kt_core.engine.quantize_report import QuantReport
from kt_core.engine.text_windows import WINDOW_TOKENS
from kt_core.errors import InvalidRequestError
from kt_core.interfaces import ExpertWeights, no_progress
from kt_core.quant.reference import dequantize

TEXT = " ".join(
    f"Once upon a time there was a little {animal}. The {animal} had a red {thing}, and it was "
    f"happy. One day it went to the {place} and lost the {thing}."
    for animal in ("cat", "dog", "bird", "fox")
    for thing in ("ball", "hat", "kite")
    for place in ("park", "lake", "hill")
)


@pytest.fixture(scope="module")
def registry() -> plugins.Registry:
    return plugins.load()


@pytest.fixture(scope="module")
def calibration(
    registry: plugins.Registry, tmp_path_factory: pytest.TempPathFactory
) -> Calibration:
    folder = tmp_path_factory.mktemp("calibration") / "files"
    return calibrate(STORIES, TEXT, folder, registry, threads=1, progress=no_progress)


def quantized(target: Path, registry: plugins.Registry, **options: Any) -> QuantReport:
    remark: Callable[[str], None] = lambda _: None  # noqa: E731
    chosen = Options(weight_format="int4", threads=1, **options)
    return run(str(STORIES), target, registry, chosen, progress=no_progress, remark=remark)


def test_inputs_are_what_the_experts_were_given(
    calibration: Calibration, registry: plugins.Registry
) -> None:
    """Of the first layer, taken again from the model by other means."""
    plan = plan_quantization(STORIES, registry, weight_format="int4", method="search")
    layer, spec = plan.layers[0], plan.layers[0].site.spec
    states, routes = [], []
    with kt_core.load(STORIES, threads=1) as engine:
        block = engine.model.get_submodule(layer.site.module_name.rpartition(".")[0])
        block.register_forward_pre_hook(lambda _, args: states.append(args[0][0]))
        block.gate.register_forward_hook(lambda _, args, out: routes.append(out))
        tokens = engine.encode(TEXT, raw=True)
        for at in range(0, len(tokens), WINDOW_TOKENS):
            with torch.inference_mode():
                engine.model(input_ids=torch.tensor([tokens[at : at + WINDOW_TOKENS]]))
    hidden = torch.cat(states).bfloat16()
    ids = torch.cat([next(p for p in route if not p.is_floating_point()) for route in routes])
    for expert in range(spec.num_experts):
        inputs = calibration.inputs(0, expert)
        own = hidden[(ids == expert).any(dim=1)].float()
        assert torch.equal(inputs.hidden[: len(own)], own)
        assert (inputs.shares[: len(own)] == 1).all()
        # What is shared counts as 16 of its own.
        assert float(inputs.shares[len(own) :].sum()) == pytest.approx(16)
    double = own.double()
    rows = double / double.square().mean(dim=1, keepdim=True).sqrt()
    moments = inputs.moments(inputs.hidden).double()
    assert moments.trace() == pytest.approx((len(own) + 16) * spec.hidden_size, rel=1e-4)
    assert float(torch.linalg.eigvalsh(moments - rows.T @ rows).min()) > -1e-3


def test_an_expert_that_no_token_went_to(calibration: Calibration) -> None:
    """It gets some of everybody's."""
    inputs = calibration.inputs(0, 10_000)
    assert 0 < len(inputs.hidden) <= 256
    assert torch.isfinite(inputs.moments(inputs.hidden)).all()


def test_each_step_is_better(calibration: Calibration, registry: plugins.Registry) -> None:
    """To the nearest, searched, compensated: errors of what trained experts give, on other text.

    Not the KL divergence of this model: on text that is made by rules nearly all tokens are sure,
    and the mean is that of the few that are not.
    """
    plan = plan_quantization(STORIES, registry, weight_format="int4", method="search")
    number = len(plan.layers) - 1
    layer, spec = plan.layers[number], plan.layers[number].site.spec
    descriptor = layer.weight_format
    errors = dict.fromkeys(("rtn", "search", "compensated"), 0.0)
    for expert in range(0, spec.num_experts, 4):
        inputs = calibration.inputs(number, expert)
        seen, other = (_half(inputs, half) for half in (0, 1))
        rows = {name: tensors.read(expert) for name, tensors in layer.tensors.items()}
        weights = layer.site.expert_weights(rows)
        want = _output(weights, other.hidden)
        for method, given in (("rtn", None), ("search", None), ("compensated", seen)):
            chosen = Method.RTN if method == "rtn" else Method.SEARCH
            quantised, _ = quantize_expert(weights, descriptor, chosen, given, spec)
            dense = replace(
                quantised, **{n: dequantize(getattr(quantised, n)) for n in ("gate", "up", "down")}
            )
            wrong = (_output(dense, other.hidden) - want).square().sum(dim=1)
            errors[method] += float((wrong / want.square().sum(dim=1).clamp(min=1e-30)).sum())
    assert errors["search"] < 0.9 * errors["rtn"]
    assert errors["compensated"] < 0.8 * errors["search"]


def _half(inputs: ExpertInputs, half: int) -> ExpertInputs:
    return ExpertInputs(inputs.hidden[half::2], inputs.shares[half::2])


def _output(weights: ExpertWeights, hidden: torch.Tensor) -> torch.Tensor:
    gate, up, down = (getattr(weights, name).float() for name in ("gate", "up", "down"))
    inner = torch.nn.functional.silu(hidden @ gate.T) * (hidden @ up.T)
    result: torch.Tensor = inner @ down.T
    return result


def test_evaluation_and_calibration_leave_nothing(
    registry: plugins.Registry, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT)
    report = quantized(tmp_path / "packed", registry, calibrate=text, evaluate=text)
    assert report.evaluation is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "text"]
    assert not (tmp_path / "packed" / "kt-calibration").exists()


def test_evaluation_counts_what_it_says(registry: plugins.Registry, tmp_path: Path) -> None:
    """The source against itself; and perplexity as transformers' own loss has it."""
    quantized(tmp_path / "packed", registry)
    same = evaluate(STORIES, STORIES, TEXT, registry, threads=1, progress=no_progress)
    assert (same.kl, same.same_best) == (0, 1)
    assert same.perplexity == same.source_perplexity
    other = evaluate(STORIES, tmp_path / "packed", TEXT, registry, threads=1, progress=no_progress)
    assert other.source_perplexity == same.perplexity
    assert other.kl > 0
    assert other.tokens == same.tokens
    with kt_core.load(tmp_path / "packed", threads=1) as engine:
        tokens = engine.encode(TEXT, raw=True)[:2048]
        windows = [tokens[at : at + WINDOW_TOKENS] for at in range(0, len(tokens), WINDOW_TOKENS)]
        losses, count = 0.0, 0
        for window in (w for w in windows if len(w) >= 16):
            ids = torch.tensor([window])
            with torch.inference_mode():
                losses += float(engine.model(input_ids=ids, labels=ids).loss) * (len(window) - 1)
            count += len(window) - 1
    assert count == other.tokens
    assert other.perplexity == pytest.approx(math.exp(losses / count), rel=1e-4)


def test_another_text_is_another_job(registry: plugins.Registry, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT)
    quantized(tmp_path / "packed", registry, calibrate=text)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"]["method"].startswith("search, compensated on a text of")


@pytest.mark.parametrize("content", [b"", b"too short", b"\xff\xfe"])
def test_bad_texts(content: bytes, registry: plugins.Registry, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(content)
    for option in ("calibrate", "evaluate"):
        with pytest.raises(InvalidRequestError, match=r"tokens, at least 16|cannot be read as UTF"):
            quantized(tmp_path / option, registry, **{option: text})
    with pytest.raises(InvalidRequestError, match="cannot be read as UTF-8 text"):
        quantized(tmp_path / "packed", registry, calibrate=tmp_path / "absent")
