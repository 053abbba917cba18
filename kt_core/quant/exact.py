"""Which format holds the numbers of a checkpoint exactly, and those numbers in that format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kt_core.interfaces import QuantizedTensor
from kt_core.quant.formats import BUILT_IN_FORMATS
from kt_core.types import SCALE_BITS, Element, Format, ScaleType

if TYPE_CHECKING:
    import torch

# Every number of the first is one of the second.
_WIDER = {
    ScaleType.BF16: (ScaleType.BF16, ScaleType.FLOAT32),
    ScaleType.FLOAT16: (ScaleType.FLOAT16, ScaleType.FLOAT32),
    ScaleType.FLOAT32: (ScaleType.FLOAT32,),
    ScaleType.E8M0: (ScaleType.E8M0, ScaleType.FLOAT32),
    ScaleType.E4M3: (ScaleType.E4M3,),
}


def exact_format(
    element: Element,
    scale: ScaleType,
    *,
    group_size: int | None,
    has_zero_point: bool = False,
    has_minimum: bool = False,
) -> Format | None:
    """Return a built-in format that holds these numbers exactly; None if none does.

    Groups may become smaller, their scales are then repeated, and scales of a wider type: as little
    as possible of either. What is returned does not depend on the shape of a matrix, so that all
    matrices of a layer that are stored alike have one format.

    Args:
        element: What a code is.
        scale: What a scale, and a minimum, is.
        group_size: Inputs that share a scale; None where all of an output do.
        has_zero_point: Whether groups have one.
        has_minimum: Whether groups have one.
    """

    def holds(candidate: Format) -> bool:
        divides = candidate.group_size is not None and (group_size or 0) % candidate.group_size == 0
        return (
            candidate.element is element
            and candidate.scale in _WIDER[scale]
            and candidate.has_zero_point == has_zero_point
            and candidate.has_minimum == has_minimum
            and (group_size is None or divides)
        )

    def cost(candidate: Format) -> tuple[bool, int, int]:
        assert candidate.scale is not None
        is_other = candidate.group_size != group_size
        return is_other, -(candidate.group_size or 0), SCALE_BITS[candidate.scale]

    found = [f.descriptor for f in BUILT_IN_FORMATS if holds(f.descriptor)]
    return min(found, key=cost, default=None)


def quantized(
    weight_format: Format,
    codes: torch.Tensor,
    scales: torch.Tensor,
    *,
    group_size: int | None,
    zero_points: torch.Tensor | None = None,
    minimums: torch.Tensor | None = None,
    output_scales: torch.Tensor | None = None,
) -> QuantizedTensor:
    """Put numbers into a format that ``exact_format`` found for them.

    Args:
        weight_format: What they become.
        codes: ``[out, in]``, as ``QuantizedTensor`` has them.
        scales: ``[out, groups]``, any floating-point type.
        group_size: Inputs of a group; None where all of an output share one.
        zero_points: As the scales, integers.
        minimums: As the scales.
        output_scales: ``[out]``.

    Raises:
        ValueError: The scales are not as many as the codes need.
    """
    import torch

    in_features = codes.shape[1]
    size = in_features if group_size is None else group_size
    wanted = (codes.shape[0], -(-in_features // size))
    if tuple(scales.shape) != wanted:
        msg = f"there are scales {list(scales.shape)}, groups of {size} need {list(wanted)}"
        raise ValueError(msg)

    def spread(values: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        if values is None:
            return None
        target = in_features if weight_format.group_size is None else weight_format.group_size
        if target != size:
            of_group = torch.arange(weight_format.num_groups(in_features)) * target // size
            values = values[:, of_group]
        return values.to(dtype).contiguous()

    spread_scales = spread(scales, torch.float32)
    return QuantizedTensor(
        weight_format=weight_format,
        codes=codes.contiguous(),
        scales=spread_scales,
        zero_points=spread(zero_points, torch.uint8),
        minimums=spread(minimums, torch.float32),
        output_scales=output_scales,
    )


def format_named(name: str) -> Format:
    """Return a built-in format by its name.

    Raises:
        KeyError: There is none of that name.
    """
    return {f.descriptor.name: f.descriptor for f in BUILT_IN_FORMATS}[name]
