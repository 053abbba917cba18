"""Quantise one expert, and measure how far that is from what it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from typing import Any

import torch

from kt_core.engine.expert_inputs import ExpertInputs
from kt_core.engine.quantize_report import Squares
from kt_core.interfaces import ExpertWeights, QuantizedTensor, WeightFormat
from kt_core.quant import ReferenceFormat
from kt_core.quant.compensate import Compensator
from kt_core.quant.search import quantize_searched
from kt_core.types import MoeSpec


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
    inputs: ExpertInputs | None = None,
    spec: MoeSpec | None = None,
) -> tuple[ExpertWeights, Squares]:
    """Return the quantised expert; and its squared errors and squared weights, summed.

    Matrices that are quantised already stay as they are.

    Args:
        weights: The expert.
        weight_format: What it becomes.
        method: How.
        inputs: What it was given when the model read a text: errors in its outputs are kept small
            then (``kt_core.quant.compensate``). Of all matrices or none quantised already.
        spec: The expert's layer; needed with ``inputs``.

    Raises:
        ValueError: A weight is NaN or infinite.
    """
    stored: dict[str, Any] = {}
    errors = squares = 0.0
    outer = inner = None
    is_compensated = inputs is not None and isinstance(weight_format, ReferenceFormat)
    if inputs is not None and is_compensated:
        outer = Compensator(inputs.moments(inputs.hidden))
    for name in ("gate", "up", "down"):
        matrix = getattr(weights, name)
        if not isinstance(matrix, torch.Tensor):
            continue
        if inputs is not None and is_compensated and name == "down":
            assert spec is not None
            # What it will be given is what the quantised gate and up make.
            before = {n: weight_format.dequantize(part) for n, part in stored.items()}
            inner = Compensator(inputs.moments(inputs.between(replace(weights, **before), spec)))
        quantized, (error, square) = quantize_matrix(
            matrix, weight_format, method, inner if name == "down" else outer
        )
        errors, squares = errors + error, squares + square
        stored[name] = quantized
    return replace(weights, **stored), (errors, squares)


def quantize_matrix(
    matrix: torch.Tensor,
    weight_format: WeightFormat,
    method: Method,
    compensator: Compensator | None = None,
) -> tuple[QuantizedTensor, Squares]:
    """Return a quantised ``[out, in]``, its squared errors and squared weights.

    Search and compensation are written over descriptors: for formats that these say all about.

    Raises:
        ValueError: A weight is NaN or infinite.
    """
    quantize: Callable[[torch.Tensor], QuantizedTensor] = weight_format.quantize
    if method is Method.SEARCH and isinstance(weight_format, ReferenceFormat):
        descriptor = weight_format.descriptor
        if compensator is None:
            quantized = quantize_searched(matrix, descriptor)
        else:
            quantized = compensator.quantize(matrix, descriptor)
    else:
        quantized = quantize(matrix)
    values = matrix.float()
    errors = float((weight_format.dequantize(quantized) - values).square().sum())
    return quantized, (errors, float(values.square().sum()))
