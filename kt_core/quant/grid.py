"""The numbers that codes can stand for once scales are chosen, and which of them is nearest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kt_core.interfaces import QuantizedTensor
from kt_core.quant.reference import FP4_VALUES, LARGEST, SIGNED_CODES, nearest_fp4
from kt_core.types import Element, Format


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales of some weights, in any shape that broadcasts with theirs.

    Codes are float32 here: what their bits stand for, before scale, zero point and minimum.

    Attributes:
        weight_format: Of the codes; not bf16, which has no scales.
        scales: As they are stored; may be negative where the format's may.
        offsets: Zero points, or minimums; None in a format without.
        outputs: What multiplies the scales of an output's groups; None in a format without.
    """

    weight_format: Format
    scales: torch.Tensor
    offsets: torch.Tensor | None = None
    outputs: torch.Tensor | None = None

    @property
    def steps(self) -> torch.Tensor:
        """What a code is multiplied with."""
        return self.scales if self.outputs is None else self.scales * self.outputs

    def codes(self, values: torch.Tensor) -> torch.Tensor:
        """Return the code nearest to each of some numbers, float32."""
        weight_format = self.weight_format
        if weight_format.has_zero_point:
            assert self.offsets is not None
            return (divide(values, self.scales).round() + self.offsets).clamp(0, 15)
        if weight_format.has_minimum:
            assert self.offsets is not None
            return divide(values + self.offsets, self.scales).clamp(0, 15).round()
        ratio = divide(values, self.steps)
        element = weight_format.element
        if element.is_integer:
            return ratio.round().clamp(*SIGNED_CODES[element])
        ratio = ratio.clamp(-LARGEST[element], LARGEST[element])
        if element is Element.FP8:
            return ratio.to(torch.float8_e4m3fn).float()
        return torch.tensor(FP4_VALUES)[nearest_fp4(ratio).long()]

    def numbers(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the weights that codes stand for."""
        if self.offsets is None:
            return codes * self.steps
        if self.weight_format.has_zero_point:
            return (codes - self.offsets) * self.scales
        return codes * self.scales - self.offsets

    def better(self, other: Grid, where: torch.Tensor) -> Grid:
        """Return this one, and another's scales and offsets where a mask says so."""
        offsets = None
        if self.offsets is not None and other.offsets is not None:
            offsets = torch.where(where, other.offsets, self.offsets)
        scales = torch.where(where, other.scales, self.scales)
        return Grid(self.weight_format, scales, offsets, self.outputs)

    def stored(self, codes: torch.Tensor) -> QuantizedTensor:
        """Return what is stored of ``[out, in]`` codes; scales here are ``[out, groups, 1]``."""
        weight_format = self.weight_format
        if weight_format.element is Element.FP4:
            bits = nearest_fp4(codes)
        elif weight_format.element is Element.FP8:
            bits = codes.to(torch.float8_e4m3fn)
        else:
            bits = codes.to(torch.int8 if weight_format.has_signed_codes else torch.uint8)
        offsets = None if self.offsets is None else self.offsets.squeeze(-1).contiguous()
        zeros = offsets if weight_format.has_zero_point else None
        return QuantizedTensor(
            weight_format=weight_format,
            codes=bits.contiguous(),
            scales=self.scales.squeeze(-1).contiguous(),
            zero_points=None if zeros is None else zeros.to(torch.uint8),
            minimums=offsets if weight_format.has_minimum else None,
            output_scales=None if self.outputs is None else self.outputs.flatten(),
        )


def divide(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``values / scale``, and 0 where the scale is 0."""
    return torch.where(scale != 0, values / scale, torch.zeros_like(values))
