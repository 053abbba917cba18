"""The table of built-in formats, and the class that makes a format out of its descriptor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kt_core.interfaces import QuantizedTensor, WeightFormat
from kt_core.types import Element, Format, ScaleType

if TYPE_CHECKING:
    import torch


class ReferenceFormat(WeightFormat):
    """A format that its descriptor says everything about."""

    def __init__(self, descriptor: Format, aliases: tuple[str, ...] = ()) -> None:
        """Take the descriptor and the other names of the format."""
        self.descriptor = descriptor
        self.aliases = aliases

    def quantize(self, weight: torch.Tensor) -> QuantizedTensor:
        """See ``WeightFormat.quantize``."""
        from kt_core.quant import reference

        return reference.quantize(weight, self.descriptor)

    def dequantize(self, quantized: QuantizedTensor) -> torch.Tensor:
        """See ``WeightFormat.dequantize``."""
        from kt_core.quant import reference

        return reference.dequantize(quantized)


def _int4(group_size: int, *, has_zero_point: bool = False) -> Format:
    suffix = "-asym" if has_zero_point else ""
    return Format(
        name=f"int4-g{group_size}{suffix}",
        element=Element.INT4,
        scale=ScaleType.BF16,
        group_size=group_size,
        has_zero_point=has_zero_point,
    )


def _int8(group_size: int) -> Format:
    return Format(
        name=f"int8-g{group_size}",
        element=Element.INT8,
        scale=ScaleType.BF16,
        group_size=group_size,
    )


def _float(name: str, element: Element, scale: ScaleType, group_size: int | None) -> Format:
    return Format(name=name, element=element, scale=scale, group_size=group_size)


BUILT_IN_FORMATS: tuple[WeightFormat, ...] = (
    ReferenceFormat(Format(name="bf16", element=Element.BF16)),
    ReferenceFormat(Format(name="int8", element=Element.INT8, scale=ScaleType.FLOAT32)),
    *(ReferenceFormat(_int8(size)) for size in (16, 32, 64, 128)),
    ReferenceFormat(_int4(32), aliases=("int4",)),
    *(ReferenceFormat(_int4(size)) for size in (64, 128)),
    *(ReferenceFormat(_int4(size, has_zero_point=True)) for size in (32, 64, 128)),
    # The scales of checkpoints in blocks of 128 x 128 are repeated for the outputs of a block.
    ReferenceFormat(_float("fp8", Element.FP8, ScaleType.FLOAT32, 128)),
    ReferenceFormat(_float("fp8-channel", Element.FP8, ScaleType.FLOAT32, None)),
    ReferenceFormat(_float("mxfp8", Element.FP8, ScaleType.E8M0, 32)),
    ReferenceFormat(_float("mxfp4", Element.FP4, ScaleType.E8M0, 32)),
    ReferenceFormat(_float("nvfp4", Element.FP4, ScaleType.E4M3, 16)),
)
"""The table."""
