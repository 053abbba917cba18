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


_SIZES = (32, 64, 128)
_INTEGERS_IN_GROUPS: tuple[tuple[Element, ScaleType, str, tuple[int, ...]], ...] = (
    (Element.INT8, ScaleType.BF16, "", (16, *_SIZES)),
    (Element.INT8, ScaleType.FLOAT16, "", (32,)),  # GGUF's Q8_0
    (Element.INT8, ScaleType.FLOAT32, "", (16, 32)),  # its Q6_K, and its IQ4_XS
    (Element.INT4, ScaleType.BF16, "", _SIZES),
    (Element.INT4, ScaleType.BF16, "asym", _SIZES),
    (Element.INT4, ScaleType.BF16, "min", _SIZES),
    (Element.INT4, ScaleType.FLOAT16, "", _SIZES),  # Q4_0 is in groups of 32
    (Element.INT4, ScaleType.FLOAT16, "asym", _SIZES),  # GPTQ, AWQ
    (Element.INT4, ScaleType.FLOAT16, "min", (32,)),  # Q4_1
    # Q4_K: its factors of 6 bits, multiplied out, are exact in float32.
    (Element.INT4, ScaleType.FLOAT32, "min", (32,)),
)
_SCALE_WORDS = {ScaleType.BF16: "", ScaleType.FLOAT16: "f16", ScaleType.FLOAT32: "f32"}


def _integer(element: Element, scale: ScaleType, offset: str, group_size: int) -> ReferenceFormat:
    """Integers in groups: the name says the scales' type where it is not bf16."""
    words = (element, f"g{group_size}", _SCALE_WORDS[scale], offset)
    name = "-".join(word for word in words if word)
    descriptor = Format(
        name=name,
        element=element,
        scale=scale,
        group_size=group_size,
        has_zero_point=offset == "asym",
        has_minimum=offset == "min",
    )
    return ReferenceFormat(descriptor, aliases=("int4",) if name == "int4-g32" else ())


def _float(name: str, element: Element, scale: ScaleType, group_size: int | None) -> Format:
    return Format(name=name, element=element, scale=scale, group_size=group_size)


BUILT_IN_FORMATS: tuple[WeightFormat, ...] = (
    ReferenceFormat(Format(name="bf16", element=Element.BF16)),
    ReferenceFormat(Format(name="int8", element=Element.INT8, scale=ScaleType.FLOAT32)),
    *(
        _integer(element, scale, offset, size)
        for element, scale, offset, sizes in _INTEGERS_IN_GROUPS
        for size in sizes
    ),
    # The scales of checkpoints in blocks of 128 x 128 are repeated for the outputs of a block.
    ReferenceFormat(_float("fp8", Element.FP8, ScaleType.FLOAT32, 128)),
    ReferenceFormat(_float("fp8-channel", Element.FP8, ScaleType.FLOAT32, None)),
    ReferenceFormat(_float("mxfp8", Element.FP8, ScaleType.E8M0, 32)),
    ReferenceFormat(_float("mxfp4", Element.FP4, ScaleType.E8M0, 32)),
    ReferenceFormat(_float("nvfp4", Element.FP4, ScaleType.E4M3, 16)),
)
"""The table."""
