"""A weight format: its descriptor, and the slow reference that defines what its numbers mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kt_core.types import Element, Format

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedTensor:
    """One matrix ``[out_features, in_features]`` in canonical, unpacked form.

    ``weight = scale * (code - zero_point)``, or ``scale * code - minimum``, the scale of input
    feature ``i`` being in column ``i // group_size``.

    Attributes:
        weight_format: What the numbers mean.
        codes: ``[out, in]``: bfloat16 (the weights), float8_e4m3fn, int8 (signed integers) or
            uint8 (integers with a zero point or a minimum; the bits of an fp4, one to the byte).
        scales: ``[out, groups]`` float32 holding values the format's scale type can represent;
            None for bf16.
        zero_points: ``[out, groups]`` uint8, at most one more than the largest code; None for a
            format without.
        minimums: ``[out, groups]`` float32 holding values the format's scale type can represent;
            None for a format without.
        output_scales: ``[out]`` float32, which multiply the scales of an output's groups; None for
            a format without.
    """

    weight_format: Format
    codes: torch.Tensor
    scales: torch.Tensor | None = None
    zero_points: torch.Tensor | None = None
    minimums: torch.Tensor | None = None
    output_scales: torch.Tensor | None = None


def stored_parts(
    weight_format: Format, out_features: int, in_features: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype] | None]:
    """Return shape and dtype of each tensor of a ``QuantizedTensor``; None for those it lacks."""
    import torch

    integer = torch.int8 if weight_format.has_signed_codes else torch.uint8
    codes = {
        Element.BF16: torch.bfloat16,
        Element.FP8: torch.float8_e4m3fn,
        Element.INT8: integer,
        Element.INT4: integer,
        Element.FP4: torch.uint8,
    }[weight_format.element]
    groups = (out_features, weight_format.num_groups(in_features))
    return {
        "codes": ((out_features, in_features), codes),
        "scales": None if weight_format.scale is None else (groups, torch.float32),
        "zero_points": (groups, torch.uint8) if weight_format.has_zero_point else None,
        "minimums": (groups, torch.float32) if weight_format.has_minimum else None,
        "output_scales": (
            ((out_features,), torch.float32) if weight_format.has_output_scale else None
        ),
    }


class WeightFormat(ABC):
    """A storage format of expert weights.

    Attributes:
        descriptor: Element, scale, group size; its ``name`` is what users type.
        aliases: Other words for the same format.
    """

    descriptor: Format
    aliases: tuple[str, ...] = ()

    @abstractmethod
    def quantize(self, weight: torch.Tensor) -> QuantizedTensor:
        """Quantise ``[out, in]`` of any floating type. Backends must produce the same codes.

        Raises:
            ValueError: A weight is NaN or infinite.
        """

    @abstractmethod
    def dequantize(self, quantized: QuantizedTensor) -> torch.Tensor:
        """Return the float32 weights ``[out, in]`` that the stored numbers stand for."""
