"""What calibration sees and how it is used; what evaluation counts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import kt_core
from cli.calling import STORIES
from kt_core import plugins
from kt_core.engine.calibration import Calibration, calibrate
from kt_core.engine.evaluation import evaluate
from kt_core.engine.quantize_command import Options, run
from kt_core.engine.quantize_plan import plan_quantization
from kt_core.engine.quantize_report import QuantReport
from kt_core.engine.text_windows import WINDOW_TOKENS
from kt_core.errors import InvalidRequestError
from kt_core.interfaces import no_progress
from kt_core.quant.reference import dequantize, quantize
from kt_core.quant.search import quantize_searched

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


def test_importance_is_what_the_experts_were_given(
    calibration: Calibration, registry: plugins.Registry
) -> None:
    """Of the first layer, taken again from the model by other means."""
    plan = plan_quantization(STORIES, registry, weight_format="int4", method="search")
    layer, spec = plan.layers[0], plan.layers[0].site.spec
    stored = load_file(calibration.folder / "layer-00000.safetensors")
    with kt_core.load(STORIES, threads=1) as engine:
        seen: list[torch.Tensor] = []
        block = engine.model.get_submodule(layer.site.module_name.rpartition(".")[0])
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
        tokens = engine.encode(TEXT, raw=True)
        with torch.inference_mode():
            engine.model(input_ids=torch.tensor([tokens[:WINDOW_TOKENS]]))
    first = seen[0].bfloat16()
    assert torch.equal(stored["hidden"][: len(first)], first)
    counts = torch.bincount(stored["ids"].flatten(), minlength=spec.num_experts)
    busiest = int(counts.argmax())
    rows = {name: tensors.read(busiest) for name, tensors in layer.tensors.items()}
    weights = layer.site.expert_weights(rows)
    worth = calibration.importance(0, busiest, weights, spec)
    own = stored["hidden"][(stored["ids"] == busiest).any(dim=1)][:512].double()
    gate, up = weights.gate.double(), weights.up.double()
    inner = torch.nn.functional.silu(own @ gate.T) * (own @ up.T)
    # 16 tokens of everybody are counted in, among some hundred of its own.
    share = 16 / (len(own) + 16)
    for name, inputs in (("gate", own), ("up", own), ("down", inner)):
        squares = inputs.square()
        expected = (squares / squares.mean(dim=1, keepdim=True)).mean(dim=0)
        assert worth[name].shape == expected.shape
        assert worth[name].mean() == pytest.approx(1, rel=1e-4)
        assert (worth[name] >= (1 - share) * expected * 0.999).all()


def test_an_expert_that_no_token_went_to(
    calibration: Calibration, registry: plugins.Registry
) -> None:
    plan = plan_quantization(STORIES, registry, weight_format="int4", method="search")
    layer = plan.layers[0]
    rows = {name: tensors.read(0) for name, tensors in layer.tensors.items()}
    weights = layer.site.expert_weights(rows)
    worth = calibration.importance(0, 10_000, weights, layer.site.spec)
    for values in worth.values():
        assert torch.isfinite(values).all()
        assert values.sum() > 0


def test_each_step_is_better(calibration: Calibration, registry: plugins.Registry) -> None:
    """To the nearest, searched, calibrated: errors of what trained experts give, token by token.

    Not the KL divergence of this model: on text that is made by rules nearly all tokens are sure,
    and the mean is that of the few that are not.
    """
    plan = plan_quantization(STORIES, registry, weight_format="int4", method="search")
    layer, spec = plan.layers[-1], plan.layers[-1].site.spec
    stored = load_file(calibration.folder / f"layer-{len(plan.layers) - 1:05}.safetensors")
    errors = dict.fromkeys(("rtn", "search", "calibrated"), 0.0)
    for expert in range(spec.num_experts):
        inputs = stored["hidden"][(stored["ids"] == expert).any(dim=1)].float()
        rows = {name: tensors.read(expert) for name, tensors in layer.tensors.items()}
        weights = layer.site.expert_weights(rows)
        worth = calibration.importance(len(plan.layers) - 1, expert, weights, spec)
        gate, up, down = (getattr(weights, n).float() for n in ("gate", "up", "down"))
        inner = torch.nn.functional.silu(inputs @ gate.T) * (inputs @ up.T)
        for name, matrix, given in (
            ("gate", gate, inputs), ("up", up, inputs), ("down", down, inner),
        ):  # fmt: skip
            sizes = given.square().mean(dim=1)
            descriptor = layer.weight_format.descriptor
            for method, quantised in (
                ("rtn", quantize(matrix, descriptor)),
                ("search", quantize_searched(matrix, descriptor)),
                ("calibrated", quantize_searched(matrix, descriptor, worth[name])),
            ):
                wrong = (given @ (dequantize(quantised) - matrix).T).square().sum(dim=1)
                errors[method] += float((wrong / sizes).sum())
    assert errors["search"] < 0.9 * errors["rtn"]
    assert errors["calibrated"] < 0.98 * errors["search"]


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
    assert config["quantization_config"]["method"].startswith("search, calibrated on a text of")


@pytest.mark.parametrize("content", [b"", b"too short", b"\xff\xfe"])
def test_bad_texts(content: bytes, registry: plugins.Registry, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(content)
    for option in ("calibrate", "evaluate"):
        with pytest.raises(InvalidRequestError, match=r"tokens, at least 16|cannot be read as UTF"):
            quantized(tmp_path / option, registry, **{option: text})
    with pytest.raises(InvalidRequestError, match="cannot be read as UTF-8 text"):
        quantized(tmp_path / "packed", registry, calibrate=tmp_path / "absent")
