"""Quantised checkpoints that `kt quant` packs: where a format holds their numbers, none changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

import kt_core
from checkpoints.schemes import SCHEMES, Scheme
from checkpoints.test_gguf_models import CASES, write
from checkpoints.writing import save_model, store_matrices, write_checkpoint
from kt_core import plugins
from kt_core.engine.quantize import quantize
from kt_core.engine.quantize_expert import Method
from kt_core.engine.quantize_plan import plan_quantization

SIZES = {
    "hidden_size": 128,
    "moe_intermediate_size": 192,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_experts": 4,
}
EXACT = [scheme for scheme in SCHEMES if scheme.is_exact]


def logits(directory: Path) -> torch.Tensor:
    with kt_core.load(directory, threads=1, dtype=torch.float32, precision="float32") as engine:
        result: torch.Tensor = tiny.logits(engine.model, tiny.sample_input_ids(engine.model.config))
        return result


@pytest.mark.parametrize("scheme", EXACT, ids=lambda scheme: scheme.name.replace(" ", "-"))
def test_numbers_stay_what_they_are(scheme: Scheme, tmp_path: Path) -> None:
    """Experts as they are stored, whatever the method; dense layers in the type of the model."""
    tensors = save_model("qwen3_moe", tmp_path / "base", **SIZES)
    stored, _ = store_matrices(tensors, scheme.store)
    source = write_checkpoint(
        tmp_path / "source", tmp_path / "base", stored, quantization_config=dict(scheme.config)
    )
    plan = plan_quantization(
        source, plugins.load(), weight_format=scheme.packed, method=Method.SEARCH
    )
    report = quantize(plan, tmp_path / "packed", method=Method.SEARCH, threads=1)
    assert [layer.relative_error for layer in report.layers] == [0.0]  # the first layer is dense
    assert torch.equal(logits(tmp_path / "packed"), logits(source))


@pytest.mark.parametrize("name", ["Q4_0", "gpt-oss", "glm4moe"])
def test_a_model_in_one_file(name: str, tmp_path: Path) -> None:
    """Of another kind: its config is written out; with the numbers it is loaded with."""
    case = CASES[name]
    file, _ = write(case, tmp_path)
    plan = plan_quantization(file, plugins.load(), weight_format=case.packed, method=Method.SEARCH)
    report = quantize(plan, tmp_path / "packed", method=Method.SEARCH, threads=1)
    assert {layer.relative_error for layer in report.layers} == {0.0}
    with kt_core.load(file, threads=1) as engine:
        ids = tiny.sample_input_ids(engine.model.config)
        want = tiny.logits(engine.model, ids)
        dtype = engine.model.dtype
    with kt_core.load(tmp_path / "packed", threads=1) as engine:
        assert engine.model.dtype is dtype
        assert torch.equal(tiny.logits(engine.model, ids), want)
