"""Quantise and dequantise, slow and obvious: the definition of what the stored numbers mean.

Backends must store the same codes and scales, bit for bit. Round-to-nearest, ties to even:

* symmetric: ``scale = max|w| / 7`` (int4) or ``/ 127`` (int8), ``code = round(w / scale)``;
* with zero point: ``scale = (max(w, 0) - min(w, 0)) / 15``, ``zero = round(-min(w, 0) / scale)``,
  ``code = round(w / scale) + zero``;
* with minimum: ``minimum = -min(w, 0)``, ``scale = (max(w, 0) + minimum) / 15``,
  ``code = round((w + minimum) / scale)``;
* fp8 and fp4: ``scale = max|w| / 448`` or ``/ 6``, ``code`` the nearest number of that type;
* with e8m0 scales: ``scale = 2^(floor(log2(max|w|)) - 8)`` or ``- 2``; what then lies beyond the
  largest number is clamped (OCP Microscaling Formats 1.0, section 6.3);
* with e4m3 scales (NVFP4): ``output_scale = max|w| / (6 * 448)`` of the whole output,
  ``scale = e4m3(max|w| / 6 / output_scale)`` of the group.

Scale and minimum are rounded to their stored type *before* what follows from them is computed, so
that codes are the best ones for the numbers that will be used.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from kt_core.interfaces import QuantizedTensor
from kt_core.types import Element, Format, ScaleType

FP4_VALUES = (
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
    -0.0,
    -0.5,
    -1.0,
    -1.5,
    -2.0,
    -3.0,
    -4.0,
    -6.0,
)
LARGEST = {Element.FP8: 448.0, Element.FP4: 6.0}
SIGNED_CODES = {Element.INT8: (-127, 127), Element.INT4: (-8, 7)}
LARGEST_EXPONENT = {Element.FP8: 8, Element.FP4: 2}


def quantize(weight: torch.Tensor, weight_format: Format) -> QuantizedTensor:
    """Quantise ``[out, in]`` of any floating type.

    Raises:
        ValueError: The tensor is not a matrix, or holds a NaN, an infinity, or numbers so large
            that what is to be stored is infinite.
    """
    if weight.dim() != 2:
        msg = f"expected a matrix [out_features, in_features], got shape {tuple(weight.shape)}"
        raise ValueError(msg)
    values = weight.float()
    _check_finite(values)
    if weight_format.element is Element.BF16:
        stored = values.bfloat16()
        _check_finite(stored)
        return QuantizedTensor(weight_format=weight_format, codes=stored)
    groups = _grouped(values, weight_format)
    zeros = minimums = outputs = None
    if weight_format.has_zero_point:
        codes, scales, zeros = _asymmetric(groups, weight_format)
    elif weight_format.has_minimum:
        codes, scales, minimums = _from_minimum(groups, weight_format)
        _check_finite(minimums)
    elif weight_format.element.is_integer:
        codes, scales = _symmetric(groups, weight_format)
    else:
        codes, scales, outputs = _float(groups, weight_format)
    _check_finite(scales)
    return QuantizedTensor(
        weight_format=weight_format,
        codes=codes.flatten(1)[:, : weight.shape[1]].contiguous(),
        scales=scales.squeeze(-1).contiguous(),
        zero_points=zeros,
        minimums=minimums,
        output_scales=outputs,
    )


def dequantize(quantized: QuantizedTensor) -> torch.Tensor:
    """Return the float32 weights ``[out, in]``."""
    if quantized.scales is None:
        return quantized.codes.float()
    group_size = quantized.weight_format.group_size or quantized.codes.shape[1]
    columns = quantized.codes.shape[1]

    def spread(per_group: torch.Tensor) -> torch.Tensor:
        return per_group.float().repeat_interleave(group_size, dim=1)[:, :columns]

    codes = _numbers(quantized)
    if quantized.zero_points is not None:
        codes = codes - spread(quantized.zero_points)
    scales = quantized.scales
    if quantized.output_scales is not None:
        scales = scales * quantized.output_scales[:, None]
    weights = codes * spread(scales)
    return weights if quantized.minimums is None else weights - spread(quantized.minimums)


def _numbers(quantized: QuantizedTensor) -> torch.Tensor:
    codes = quantized.codes
    match quantized.weight_format.element:
        case Element.FP4:
            table = torch.tensor(FP4_VALUES)
        case Element.FP8:  # torch knows them, but converts one in the time that it looks up three
            table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float()
        case _:
            return codes.float()
    return table.index_select(0, codes.view(torch.uint8).flatten().int()).view(codes.shape)


def _check_finite(values: torch.Tensor) -> None:
    if not torch.isfinite(values).all():
        msg = "the weight holds a NaN or an infinity, or numbers too large for the format"
        raise ValueError(msg)


def _grouped(weight: torch.Tensor, weight_format: Format) -> torch.Tensor:
    """``[out, groups, group_size]``; zeros fill the last group, they change no scale."""
    size = weight_format.group_size or weight.shape[1]
    padding = -weight.shape[1] % size
    return functional.pad(weight, (0, padding)).reshape(weight.shape[0], -1, size)


def stored_scale(scale: torch.Tensor, weight_format: Format) -> torch.Tensor:
    """Return the nearest numbers that the format's scales can be; not for e8m0."""
    types = {
        ScaleType.BF16: torch.bfloat16,
        ScaleType.FLOAT16: torch.float16,
        ScaleType.E4M3: torch.float8_e4m3fn,
    }
    stored = types.get(weight_format.scale or ScaleType.FLOAT32, torch.float32)
    return scale.to(stored).float()


def _divide(groups: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``groups / scale``, and 0 where the scale is 0."""
    return torch.where(scale > 0, groups / scale, torch.zeros_like(groups))


def _symmetric(groups: torch.Tensor, weight_format: Format) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = SIGNED_CODES[weight_format.element]
    scale = group_scales(groups, weight_format)
    codes = _divide(groups, scale).clamp(low, high).round()
    return codes.to(torch.int8), scale


def _asymmetric(
    groups: torch.Tensor, weight_format: Format
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    low = groups.amin(dim=-1, keepdim=True).clamp(max=0)
    high = groups.amax(dim=-1, keepdim=True).clamp(min=0)
    scale = stored_scale((high - low) / 15, weight_format)
    zero = _divide(-low, scale).clamp(0, 15).round()
    codes = (_divide(groups, scale).clamp(-15, 15).round() + zero).clamp(0, 15)
    return codes.to(torch.uint8), scale, zero.squeeze(-1).to(torch.uint8).contiguous()


def _from_minimum(
    groups: torch.Tensor, weight_format: Format
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    low = groups.amin(dim=-1, keepdim=True).clamp(max=0)
    high = groups.amax(dim=-1, keepdim=True).clamp(min=0)
    minimum = stored_scale(0 - low, weight_format)  # never -0
    scale = stored_scale((high + minimum) / 15, weight_format)
    codes = _divide(groups + minimum, scale).clamp(0, 15).round()
    # A scale of 0: the group is too small to have weights.
    minimum = torch.where(scale > 0, minimum, torch.zeros_like(minimum))
    return codes.to(torch.uint8), scale, minimum.squeeze(-1).contiguous()


def _float(
    groups: torch.Tensor, weight_format: Format
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scales, and scales of outputs."""
    element = weight_format.element
    largest = LARGEST[element]
    outputs = output_scales(groups, weight_format)
    scale = group_scales(groups, weight_format, outputs)
    step = scale if outputs is None else scale * outputs
    values = _divide(groups, step).clamp(-largest, largest)
    codes = nearest_fp4(values) if element is Element.FP4 else values.to(torch.float8_e4m3fn)
    return codes, scale, None if outputs is None else outputs.flatten()


def output_scales(groups: torch.Tensor, weight_format: Format) -> torch.Tensor | None:
    """``[out, 1, 1]``: what multiplies the scales of an output's groups; None without.

    Args:
        groups: All of an output, ``[out, groups, group_size]``.
        weight_format: Of a format.
    """
    if not weight_format.has_output_scale:
        return None
    peak = groups.abs().amax(dim=(1, 2), keepdim=True)
    return peak / (LARGEST[weight_format.element] * LARGEST[Element.FP8])


def group_scales(
    groups: torch.Tensor, weight_format: Format, outputs: torch.Tensor | None = None
) -> torch.Tensor:
    """``[out, groups, 1]``: scales of round-to-nearest in formats without zero point or minimum.

    Args:
        groups: ``[out, groups, group_size]``.
        weight_format: The format.
        outputs: What ``output_scales`` returned for whole outputs.
    """
    peak = groups.abs().amax(dim=-1, keepdim=True)
    if weight_format.element.is_integer:
        return stored_scale(peak / SIGNED_CODES[weight_format.element][1], weight_format)
    if weight_format.scale is ScaleType.E8M0:
        exponent = (peak.view(torch.int32) >> 23) - LARGEST_EXPONENT[weight_format.element]
        scale = (exponent.clamp(min=1) << 23).view(torch.float32)
        return torch.where(peak > 0, scale, 2.0**-127)  # the least there is
    wanted = peak / LARGEST[weight_format.element]
    if outputs is None:
        return stored_scale(wanted, weight_format)
    wanted = _divide(wanted, outputs.expand_as(wanted)).clamp(max=LARGEST[Element.FP8])
    return stored_scale(wanted, weight_format)


def nearest_fp4(values: torch.Tensor) -> torch.Tensor:
    """The code of the nearest e2m1; of two that are as near, the even one."""
    magnitude = values.abs()
    codes = torch.signbit(values).to(torch.uint8) * 8
    for code in range(7):
        middle = (FP4_VALUES[code] + FP4_VALUES[code + 1]) / 2
        is_above = magnitude > middle if code % 2 == 0 else magnitude >= middle
        codes += is_above.to(torch.uint8)
    return codes
