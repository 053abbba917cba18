"""Weights that are small integers, packed into words, with scales and perhaps zero points.

``weight = scale * (code - zero)``, codes from 0 to ``2^bits - 1``; without zero points the zero is
in the middle, ``2^(bits - 1)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kt_core.errors import UnsupportedFormatError
from kt_core.interfaces import QuantizedTensor, TensorInfo
from kt_core.quant.exact import exact_format, format_named, quantized
from kt_core.types import Element, Format, ScaleType

if TYPE_CHECKING:
    import torch

SCALE_TYPES: Mapping[str, ScaleType] = {
    "F32": ScaleType.FLOAT32,
    "BF16": ScaleType.BF16,
    "F16": ScaleType.FLOAT16,
}
NEAREST = "int8-g32"
"""What is quantised again becomes this: the step is a 254th of a group's range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Integers:
    """How a matrix of integers is stored.

    Attributes:
        bits: Of a code.
        in_features: Of the matrix.
        scale: Type of the scales.
        group_size: Inputs that share a scale; None where all do.
        has_zero_points: Whether groups store a zero point.
        is_permuted: Whether inputs of a group lie apart, so that each input says its group.
    """

    bits: int
    in_features: int
    scale: ScaleType
    group_size: int | None
    has_zero_points: bool
    is_permuted: bool = False

    @property
    def weight_format(self) -> Format | None:
        """The format that holds them exactly; None if none does."""
        is_small = self.bits <= 4
        if self.is_permuted or (self.has_zero_points and not is_small):
            return None
        return exact_format(
            Element.INT4 if is_small else Element.INT8,
            self.scale,
            group_size=self.group_size,
            has_zero_point=self.has_zero_points,
        )

    @property
    def nearest(self) -> Format | None:
        """What they become where no format is exact."""
        return None if self.weight_format else format_named(NEAREST)

    def matrix(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        group_of_input: torch.Tensor | None = None,
    ) -> QuantizedTensor | torch.Tensor:
        """Return the matrix.

        Args:
            codes: ``[out, in]`` uint8.
            scales: ``[out, groups]``.
            zeros: As the scales, uint8; None where they are in the middle.
            group_of_input: ``[in]``; None where groups are of consecutive inputs.

        Raises:
            ValueError: The parts do not fit together.
        """
        import torch

        middle = 1 << (self.bits - 1)
        size = self.group_size or self.in_features
        consecutive = torch.arange(self.in_features) // size
        if group_of_input is None:
            group_of_input = consecutive
        if not self.is_permuted and not torch.equal(group_of_input.long(), consecutive):
            msg = "its inputs are not in the order of their groups, though config.json says so"
            raise ValueError(msg)
        wanted = (codes.shape[0], int(consecutive[-1]) + 1)
        if tuple(scales.shape) != wanted or codes.shape[1] != self.in_features:
            msg = (
                f"codes {list(codes.shape)} and scales {list(scales.shape)} do not fit groups of "
                f"{size}: scales {list(wanted)} would"
            )
            raise ValueError(msg)
        weight_format = self.weight_format
        if weight_format is not None and zeros is not None and not self.has_zero_points:
            if not bool((zeros == middle).all()):
                msg = "its zero points are not in the middle, though config.json says symmetric"
                raise ValueError(msg)
            zeros = None
        if weight_format is not None:
            # Bytes wrap round: what lies below the middle becomes a negative int8.
            signed = codes if zeros is not None else (codes - middle).view(torch.int8)
            return quantized(
                weight_format, signed, scales, group_size=self.group_size, zero_points=zeros
            )
        group = group_of_input.long()
        zero = middle if zeros is None else zeros.float()[:, group]
        return (codes.float() - zero) * scales.float()[:, group]


def scale_type(name: str, tensors: Mapping[str, TensorInfo]) -> ScaleType:
    """Return the type of a tensor of scales.

    Raises:
        UnsupportedFormatError: It is none that is read.
    """
    dtype = tensors[name].dtype
    if dtype not in SCALE_TYPES:
        msg = f"{name} is stored as {dtype}; scales of integers are {', '.join(SCALE_TYPES)}"
        raise UnsupportedFormatError(msg)
    return SCALE_TYPES[dtype]


def nibbles(data: torch.Tensor) -> torch.Tensor:
    """Return the halves of bytes ``[rows, bytes]`` as ``[rows, 2 * bytes]``, low ones first."""
    import torch

    # In one number of 16 bits, of which x86 stores the lower half first.
    wide = data.to(torch.int16)
    return ((wide | (wide << 4)) & 0x0F0F).view(torch.uint8)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes in words, the first one in the lowest bits.

    Args:
        words: ``[rows, words]`` int32.
        bits: Of a code; a code may begin in one word and end in the next.

    Returns:
        ``[rows, words * 32 // bits]`` uint8.
    """
    import torch

    data = words.contiguous().view(torch.uint8)  # x86 stores the lowest byte first, too
    if bits == 8:
        return data
    if bits == 4:
        return nibbles(data)
    if bits == 2:
        halves = nibbles(data).short()
        return ((halves | (halves << 6)) & 0x0303).view(torch.uint8)
    each = (data[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
    each = each.flatten(1)
    count = each.shape[1] // bits
    each = each[:, : count * bits].view(len(each), count, bits)
    return (each << torch.arange(bits, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
