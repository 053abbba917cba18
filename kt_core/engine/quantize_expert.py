"""Quantise one expert, and measure how far that is from what it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from typing import Any

import torch

from kt_core.interfaces import ExpertWeights, QuantizedTensor, WeightFormat
from kt_core.quant import ReferenceFormat
from kt_core.quant.search import quantize_searched


class Method(StrEnum):
    """How weights become codes."""

    RTN = "rtn"
    """To the nearest, with the scale that takes the largest number to the largest code."""
    SEARCH = "search"
    """With the scale of least squared error: ``kt_core.quant.search``."""


def quantize_expert(
    weights: ExpertWeights,
    weight_format: WeightFormat,
    method: Method,
    importance: Mapping[str, torch.Tensor] | None = None,
) -> tuple[ExpertWeights, tuple[float, float]]:
    """Return the quantised expert; and its squared errors and squared weights, summed.

    Matrices that are quantised already stay as they are.

    Args:
        weights: The expert.
        weight_format: What it becomes.
        method: How.
        importance: What the inputs of each projection are worth: see ``quantize_searched``.

    Raises:
        ValueError: A weight is NaN or infinite.
    """
    stored: dict[str, Any] = {}
    errors = squares = 0.0
    for name in ("gate", "up", "down"):
        matrix = getattr(weights, name)
        if not isinstance(matrix, torch.Tensor):
            continue
        worth = None if importance is None else importance[name]
        quantized = _quantize(matrix, weight_format, method, worth)
        values = matrix.float()
        errors += float((weight_format.dequantize(quantized) - values).square().sum())
        squares += float(values.square().sum())
        stored[name] = quantized
    return replace(weights, **stored), (errors, squares)


def _quantize(
    matrix: torch.Tensor,
    weight_format: WeightFormat,
    method: Method,
    importance: torch.Tensor | None,
) -> QuantizedTensor:
    """The search is written over descriptors, and only for formats that these say all about."""
    if method is Method.SEARCH and isinstance(weight_format, ReferenceFormat):
        return quantize_searched(matrix, weight_format.descriptor, importance)
    return weight_format.quantize(matrix)
