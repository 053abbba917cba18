"""Quantise better than to the nearest: try scales, keep the one with the least error in a group.

The largest number of a group need not be the largest code: a smaller scale clamps it and rounds all
others more finely. And where codes reach further below zero than above (-8..7), a scale may be
negative, so that the largest number meets the longer side. For each candidate the codes are chosen,
then, where scales are free numbers, the scale that is best for these codes (weighted least squares:
sum(w x q) / sum(w q^2)), rounded as it will be stored, and the codes once more.

Everything is a number that ``reference.dequantize`` and every kernel reads as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

from kt_core.interfaces import QuantizedTensor
from kt_core.quant.reference import FP4_VALUES, LARGEST, nearest_fp4, quantize, stored_scale
from kt_core.types import Element, Format, ScaleType

# Of the scale that takes the largest number to the largest code: a little more, down to where it is
# clamped to three quarters.
_FACTORS = (1.1, 1.05, 1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.78, 0.74)
_RANGE_FACTORS = (1.0, 0.95, 0.9, 0.85, 0.8)
_OCTAVES = (2.0, 1.0, 0.5)  # of e8m0 scales
# Worked on at once, so that a dozen of temporaries stay in a core's cache.
_CHUNK_ELEMENTS = 1 << 18


def quantize_searched(
    weight: torch.Tensor, weight_format: Format, importance: torch.Tensor | None = None
) -> QuantizedTensor:
    """Quantise ``[out, in]`` with the least weighted squared error that the search finds.

    Args:
        weight: Of any floating type.
        weight_format: What it becomes. bf16 has no scales: that is rounded.
        importance: ``[in]``, at least 0: weight of the squared error of an input's weights, such as
            the mean square of what it is multiplied with. None for 1.

    Raises:
        ValueError: As ``reference.quantize``.
    """
    start = quantize(weight, weight_format)
    if start.scales is None:
        return start
    rows_at_once = max(1, _CHUNK_ELEMENTS // weight.shape[1])
    parts = [
        _search(weight[at : at + rows_at_once].float(), _rows(start, at, rows_at_once), importance)
        for at in range(0, weight.shape[0], rows_at_once)
    ]
    return QuantizedTensor(
        weight_format=weight_format,
        codes=torch.cat([part.codes for part in parts]),
        scales=torch.cat([part.scales for part in parts if part.scales is not None]),
        zero_points=_joined([part.zero_points for part in parts]),
        minimums=_joined([part.minimums for part in parts]),
        output_scales=start.output_scales,
    )


@dataclass(slots=True)
class _Groups:
    """Numbers of some outputs, group by group; the last group is padded with weights of no account.

    Attributes:
        values: ``[out, groups, size]``.
        weights: Of squared errors, ``[1, groups, size]``.
    """

    values: torch.Tensor
    weights: torch.Tensor

    def error(self, guess: torch.Tensor) -> torch.Tensor:
        """``[out, groups, 1]``."""
        return ((guess - self.values).square_() * self.weights).sum(-1, keepdim=True)

    def best_scale(self, codes: torch.Tensor) -> torch.Tensor:
        """The least squares' one; 0 where all codes are."""
        weighted = codes * self.weights
        below = (weighted * codes).sum(-1, keepdim=True)
        above = (weighted * self.values).sum(-1, keepdim=True)
        return torch.where(below > 0, above / below, torch.zeros_like(above))


@dataclass(slots=True)
class _Candidate:
    """A guess: what is stored, and what it stands for."""

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None
    guess: torch.Tensor


def _search(
    weight: torch.Tensor, start: QuantizedTensor, importance: torch.Tensor | None
) -> QuantizedTensor:
    weight_format = start.weight_format
    size = weight_format.group_size or weight.shape[1]
    missing = -weight.shape[1] % size
    ones = torch.ones(weight.shape[1]) if importance is None else importance.float()
    groups = _Groups(
        functional.pad(weight, (0, missing)).reshape(weight.shape[0], -1, size),
        functional.pad(ones, (0, missing)).reshape(1, -1, size),
    )
    best: _Candidate | None = None
    least: torch.Tensor | None = None
    for candidate in _candidates(groups, start):
        error = groups.error(candidate.guess)
        if best is None or least is None:
            best, least = candidate, error
            continue
        is_better = error < least
        least = torch.where(is_better, error, least)
        best.codes = torch.where(is_better, candidate.codes, best.codes)
        best.scales = torch.where(is_better, candidate.scales, best.scales)
        if best.offsets is not None and candidate.offsets is not None:
            best.offsets = torch.where(is_better, candidate.offsets, best.offsets)
    assert best is not None
    codes = best.codes.flatten(1)[:, : weight.shape[1]]
    offsets = None if best.offsets is None else best.offsets.squeeze(-1)
    return QuantizedTensor(
        weight_format=weight_format,
        codes=_stored_codes(codes, weight_format),
        scales=best.scales.squeeze(-1),
        zero_points=offsets.to(torch.uint8)
        if offsets is not None and weight_format.has_zero_point
        else None,
        minimums=offsets if weight_format.has_minimum else None,
        output_scales=start.output_scales,
    )


def _stored_codes(codes: torch.Tensor, weight_format: Format) -> torch.Tensor:
    if weight_format.element is Element.FP4:
        return nearest_fp4(codes)
    if weight_format.element is Element.FP8:
        return codes.to(torch.float8_e4m3fn)
    return codes.to(torch.int8 if weight_format.has_signed_codes else torch.uint8)


def _candidates(groups: _Groups, start: QuantizedTensor) -> Iterator[_Candidate]:
    """Yield candidates, round-to-nearest's scale among them; codes are float32 numbers."""
    weight_format = start.weight_format
    if weight_format.has_zero_point or weight_format.has_minimum:
        yield from _ranges(groups, weight_format)
        return
    rounded = _rounding(weight_format)
    outputs = start.output_scales
    unit = 1.0 if outputs is None else outputs[:, None, None]
    assert start.scales is not None
    for scale in _scales(groups, start.scales[..., None], weight_format):
        codes = rounded(_divide(groups.values, scale * unit))
        yield _Candidate(codes, scale, None, codes * (scale * unit))
        if weight_format.scale is ScaleType.E8M0:
            continue
        fitted = _fitting(groups.best_scale(codes), unit, weight_format)
        codes = rounded(_divide(groups.values, fitted * unit))
        yield _Candidate(codes, fitted, None, codes * (fitted * unit))


def _scales(
    groups: _Groups, nearest: torch.Tensor, weight_format: Format
) -> Iterator[torch.Tensor]:
    yield nearest
    if weight_format.scale is ScaleType.E8M0:
        for octave in _OCTAVES:
            yield (nearest * octave).clamp(2.0**-127, 2.0**127)
        return
    for factor in _FACTORS:
        yield stored_scale(nearest * factor, weight_format)
    if weight_format.element is Element.INT4:  # -8..7: let the largest number meet -8
        low, high = groups.values.amin(-1, keepdim=True), groups.values.amax(-1, keepdim=True)
        longer = torch.where(high > -low, high, low) / -8
        for factor in _FACTORS:
            yield stored_scale(longer * factor, weight_format)


def _fitting(
    scale: torch.Tensor, unit: torch.Tensor | float, weight_format: Format
) -> torch.Tensor:
    """Return the number that can be stored; e4m3 scales are not negative, and times ``unit``."""
    if weight_format.scale is ScaleType.E4M3:
        wanted = _divide(scale, torch.as_tensor(unit).expand_as(scale))
        return stored_scale(wanted.clamp(0, LARGEST[Element.FP8]), weight_format)
    return stored_scale(scale, weight_format)


def _ranges(groups: _Groups, weight_format: Format) -> Iterator[_Candidate]:
    """Candidates with a zero point or a minimum: ranges within that of the numbers and 0."""
    low = groups.values.amin(-1, keepdim=True).clamp(max=0)
    high = groups.values.amax(-1, keepdim=True).clamp(min=0)
    for below in _RANGE_FACTORS:
        for above in _RANGE_FACTORS:
            yield _range(groups, weight_format, low * below, high * above)


def _range(
    groups: _Groups, weight_format: Format, low: torch.Tensor, high: torch.Tensor
) -> _Candidate:
    values = groups.values
    if weight_format.has_zero_point:
        scale = stored_scale((high - low) / 15, weight_format)
        zero = _divide(-low, scale).clamp(0, 15).round()
        codes = (_divide(values, scale).round() + zero).clamp(0, 15)
        scale = stored_scale(groups.best_scale(codes - zero).clamp(min=0), weight_format)
        codes = (_divide(values, scale).round() + zero).clamp(0, 15)
        return _Candidate(codes, scale, zero, (codes - zero) * scale)
    minimum = stored_scale(0 - low, weight_format)
    scale = stored_scale((high + minimum) / 15, weight_format)
    codes = _divide(values + minimum, scale).clamp(0, 15).round()
    minimum = torch.where(scale > 0, minimum, torch.zeros_like(minimum))
    return _Candidate(codes, scale, minimum, codes * scale - minimum)


def _rounding(weight_format: Format) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what turns numbers into the nearest that a code stands for."""
    largest = LARGEST.get(weight_format.element)
    match weight_format.element:
        case Element.INT8:
            return lambda x: x.round().clamp(-127, 127)
        case Element.INT4:
            return lambda x: x.round().clamp(-8, 7)
        case Element.FP8:
            return lambda x: x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    assert largest is not None
    values = torch.tensor(FP4_VALUES)
    return lambda x: values[nearest_fp4(x.clamp(-largest, largest)).long()]


def _divide(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``values / scale``, and 0 where the scale is 0."""
    return torch.where(scale != 0, values / scale, torch.zeros_like(values))


def _rows(quantized: QuantizedTensor, at: int, count: int) -> QuantizedTensor:
    def cut(part: torch.Tensor | None) -> torch.Tensor | None:
        return None if part is None else part[at : at + count]

    return QuantizedTensor(
        weight_format=quantized.weight_format,
        codes=quantized.codes[at : at + count],
        scales=cut(quantized.scales),
        zero_points=cut(quantized.zero_points),
        minimums=cut(quantized.minimums),
        output_scales=cut(quantized.output_scales),
    )


def _joined(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None
