"""Quantise better than to the nearest: try scales, keep the one with the least error in a group.

The largest number of a group need not be the largest code: a smaller scale clamps it and rounds all
others more finely. And where codes reach further below zero than above (-8..7), a scale may be
negative, so that the largest number meets the longer side. For each candidate the codes are chosen,
then, where scales are free numbers, the scale that is best for these codes (weighted least squares:
sum(w x q) / sum(w q^2)), rounded as it will be stored, and the codes once more.

Everything is a number that ``reference.dequantize`` and every kernel reads as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from kt_core.interfaces import QuantizedTensor
from kt_core.quant.grid import Grid, divide
from kt_core.quant.reference import LARGEST, group_scales, output_scales, quantize, stored_scale
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
    nearest = quantize(weight, weight_format)  # refuses what cannot be quantised, too
    if nearest.scales is None:
        return nearest
    columns = weight.shape[1]
    worth = torch.ones(columns) if importance is None else importance.float()
    rows_at_once = max(1, _CHUNK_ELEMENTS // columns)
    parts = []
    for rows in torch.split(weight, rows_at_once):
        groups = Groups.of(rows.float(), worth, weight_format)
        grid = best_grid(groups, weight_format, output_scales(groups.values, weight_format))
        codes = grid.codes(groups.values).flatten(1)[:, :columns]
        parts.append(grid.stored(codes))
    return joined(parts)


@dataclass(frozen=True, slots=True)
class Groups:
    """Numbers of some outputs, group by group; the last group is padded with weights of no account.

    Attributes:
        values: ``[out, groups, size]``.
        weights: Of squared errors, ``[1, groups, size]``.
    """

    values: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor, worth: torch.Tensor, weight_format: Format) -> Groups:
        """Cut ``[out, in]`` and ``[in]``, float32, into groups."""
        size = weight_format.group_size or rows.shape[1]
        missing = -rows.shape[1] % size
        return cls(
            functional.pad(rows, (0, missing)).reshape(len(rows), -1, size),
            functional.pad(worth, (0, missing)).reshape(1, -1, size),
        )

    def error(self, grid: Grid) -> torch.Tensor:
        """``[out, groups, 1]``: weighted squared errors of the nearest codes."""
        guess = grid.numbers(grid.codes(self.values))
        return ((guess - self.values).square_() * self.weights).sum(-1, keepdim=True)

    def best_scale(self, codes: torch.Tensor) -> torch.Tensor:
        """The least squares' one; 0 where all codes are."""
        weighted = codes * self.weights
        below = (weighted * codes).sum(-1, keepdim=True)
        above = (weighted * self.values).sum(-1, keepdim=True)
        return torch.where(below > 0, above / below, torch.zeros_like(above))


def best_grid(groups: Groups, weight_format: Format, outputs: torch.Tensor | None) -> Grid:
    """Return the scales whose nearest codes have the least error, group by group.

    Args:
        groups: All of some outputs, or some groups of them.
        weight_format: The format; not bf16.
        outputs: What ``reference.output_scales`` says of the whole outputs.
    """
    candidates = _candidates(groups, weight_format, outputs)
    best = next(candidates)
    least = groups.error(best)
    for candidate in candidates:
        error = groups.error(candidate)
        is_better = error < least
        least = torch.where(is_better, error, least)
        best = best.better(candidate, is_better)
    return best


def joined(parts: list[QuantizedTensor]) -> QuantizedTensor:
    """Put outputs together that were quantised by themselves."""
    names = ("codes", "scales", "zero_points", "minimums", "output_scales")
    columns = {name: [getattr(part, name) for part in parts] for name in names}
    together: dict[str, Any] = {
        name: None if found[0] is None else torch.cat(found) for name, found in columns.items()
    }
    return QuantizedTensor(weight_format=parts[0].weight_format, **together)


def _candidates(
    groups: Groups, weight_format: Format, outputs: torch.Tensor | None
) -> Iterator[Grid]:
    """Yield candidates, round-to-nearest's scales first."""
    if weight_format.has_zero_point or weight_format.has_minimum:
        yield from _ranges(groups, weight_format)
        return
    for scale in _scales(groups, weight_format, outputs):
        grid = Grid(weight_format, scale, None, outputs)
        yield grid
        if weight_format.scale is not ScaleType.E8M0:
            fitted = groups.best_scale(grid.codes(groups.values))
            yield Grid(weight_format, _fitting(fitted, outputs, weight_format), None, outputs)


def _scales(
    groups: Groups, weight_format: Format, outputs: torch.Tensor | None
) -> Iterator[torch.Tensor]:
    nearest = group_scales(groups.values, weight_format, outputs)
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
    scale: torch.Tensor, outputs: torch.Tensor | None, weight_format: Format
) -> torch.Tensor:
    """Return the number that can be stored; e4m3 scales are not negative, and times outputs'."""
    if outputs is None:
        return stored_scale(scale, weight_format)
    wanted = divide(scale, outputs.expand_as(scale))
    return stored_scale(wanted.clamp(0, LARGEST[Element.FP8]), weight_format)


def _ranges(groups: Groups, weight_format: Format) -> Iterator[Grid]:
    """Candidates with a zero point or a minimum: ranges within that of the numbers and 0."""
    low = groups.values.amin(-1, keepdim=True).clamp(max=0)
    high = groups.values.amax(-1, keepdim=True).clamp(min=0)
    for below in _RANGE_FACTORS:
        for above in _RANGE_FACTORS:
            yield _range(groups, weight_format, low * below, high * above)


def _range(groups: Groups, weight_format: Format, low: torch.Tensor, high: torch.Tensor) -> Grid:
    if weight_format.has_zero_point:
        scale = stored_scale((high - low) / 15, weight_format)
        zero = divide(-low, scale).clamp(0, 15).round()
        codes = Grid(weight_format, scale, zero).codes(groups.values)
        fitted = groups.best_scale(codes - zero).clamp(min=0)
        return Grid(weight_format, stored_scale(fitted, weight_format), zero)
    minimum = stored_scale(0 - low, weight_format)
    scale = stored_scale((high + minimum) / 15, weight_format)
    minimum = torch.where(scale > 0, minimum, torch.zeros_like(minimum))
    return Grid(weight_format, scale, minimum)
