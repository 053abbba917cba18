"""Tiny models whose dense layers are packed, and transformers' own with the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import PreTrainedModel

import kt_core
from kt_core import plugins
from kt_core.engine import Engine
from kt_core.engine.quantize import quantize
from kt_core.engine.quantize_expert import Method
from kt_core.engine.quantize_plan import plan_quantization
from kt_core.interfaces import no_progress
from kt_core.plugins import Registry
from kt_core.quant import BUILT_IN_FORMATS
from sim.target import NAME

FORMATS = {f.descriptor.name: f for f in BUILT_IN_FORMATS}
# A tied output head; biases; gate and up of shared experts that are two tensors on disk.
FAMILIES = ("qwen3_moe", "cohere2_moe", "gpt_oss", "deepseek_v3")
COMBINATIONS = [
    *((family, dense_format) for family in FAMILIES for dense_format in ("int8", "mxfp4")),
    *(("qwen3_moe", dense_format) for dense_format in ("int4", "fp8", "bf16")),
]
Pack = Callable[..., Path]


@pytest.fixture(scope="module")
def registry() -> Registry:
    return plugins.load()


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory, registry: Registry) -> Pack:
    """Return where a packed tiny model of a family is; experts in bf16, which holds them exactly.

    Beside it, in ``source``, is what was packed.
    """

    @cache
    def packed(family: str, dense_format: str, dtype: torch.dtype = torch.float32) -> Path:
        folder = tmp_path_factory.mktemp(family)
        tiny.save_tiny(family, folder / "source", dtype=dtype)
        return write(folder / "source", folder / "packed", registry, dense_format)

    return packed


def write(source: Path, target: Path, registry: Registry, dense: str, **options: Any) -> Path:
    plan = plan_quantization(
        source, registry, weight_format="bf16", method="rtn", dense_format=dense, **options
    )
    quantize(plan, target, method=Method.RTN, threads=1, progress=no_progress)
    return target


def load(directory: Path, **options: Any) -> Engine:
    chosen: dict[str, Any] = {"threads": 1, "precision": "float32", "device": NAME}
    return kt_core.load(directory, **(chosen | options))


def formats_of(directory: Path) -> dict[str, str]:
    """Formats of the packed dense layers, by their paths."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    layers = config["quantization_config"]["dense"]
    return {name: entry["format"] for name, entry in layers.items()}


def dequantised(truth: PreTrainedModel, formats: dict[str, str]) -> PreTrainedModel:
    """Give layers what their stored numbers stand for; a tied head gets a weight of its own."""
    with torch.no_grad():
        for name, format_name in formats.items():
            layer, stored = truth.get_submodule(name), FORMATS[format_name]
            weight = stored.dequantize(stored.quantize(layer.weight))
            layer.weight = nn.Parameter(weight.to(layer.weight.dtype))
    return truth


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())
