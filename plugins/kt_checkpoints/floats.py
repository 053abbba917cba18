"""Weights that are small floating-point numbers: fp8 and fp4, with scales for blocks of them.

A tensor of codes and a tensor of scales say everything themselves: types tell the element and the
scale, the number of scales tells the block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kt_checkpoints.integers import nibbles
from kt_core.errors import CheckpointError, UnsupportedFormatError
from kt_core.interfaces import QuantizedTensor, StoredMatrix, TensorInfo
from kt_core.quant.exact import exact_format, format_named, quantized
from kt_core.types import Element, Format, ScaleType

if TYPE_CHECKING:
    import torch

FP8 = "F8_E4M3"
_BYTES = frozenset({"I8", "U8"})
SCALE_TYPES: Mapping[str, ScaleType] = {
    "F32": ScaleType.FLOAT32,
    "BF16": ScaleType.BF16,
    "F16": ScaleType.FLOAT16,
    "F8_E8M0": ScaleType.E8M0,
    "U8": ScaleType.E8M0,
    FP8: ScaleType.E4M3,
}
# Tried, in this order, where config.json does not say: rows and columns that share a scale.
_USUAL_BLOCKS = ((128, 128), (1, 32), (1, 16), (1, 128))


@dataclass(frozen=True, slots=True)
class _Blocks:
    """A matrix ``[out, in]`` and the block of it that shares a scale.

    Attributes:
        out_features: Rows of the matrix.
        in_features: Its columns.
        rows: Rows of a block.
        columns: Its columns.
        is_whole_row: Whether that is all of them, whatever the matrix.
    """

    out_features: int
    in_features: int
    rows: int
    columns: int
    is_whole_row: bool = False


def is_codes(info: TensorInfo) -> bool:
    """Whether a tensor may hold fp8 or fp4 codes."""
    return info.dtype == FP8 or info.dtype in _BYTES


def as_block(said: Sequence[int] | None) -> tuple[int, int] | None:
    """Return the rows and columns of a block as config.json says them.

    Raises:
        TypeError: It says something else.
    """
    if said is None:
        return None
    if [type(n) for n in said] != [int, int] or min(said) < 1:
        msg = f"a block has a number of rows and one of columns, got {said}"
        raise TypeError(msg)
    return said[0], said[1]


def float_matrix(
    name: str,
    weight: str,
    scale: str,
    tensors: Mapping[str, TensorInfo],
    *,
    output_scale: str | None = None,
    divides: bool = False,
    block: tuple[int, int] | None = None,
    unread: tuple[str, ...] = (),
) -> StoredMatrix:
    """Describe a matrix of fp8 or fp4 codes, or a stack of such.

    Args:
        name: Of the unquantised tensor.
        weight: Of the codes: ``[..., out, in]`` fp8, or bytes ``[..., out, in / 2]`` of two fp4,
            the first of the two in the low bits.
        scale: Of the scales: ``[..., out blocks, in blocks]``, or ``[out]``, or a single one.
        tensors: Those of the checkpoint.
        output_scale: Of a float32 that all scales are to be multiplied with.
        divides: Whether it divides them instead.
        block: Rows and columns that share a scale, as config.json says.
        unread: See ``StoredMatrix``.

    Raises:
        CheckpointError: The shapes do not fit together.
        UnsupportedFormatError: The types are none that are read.
    """
    codes, scales = tensors[weight], tensors[scale]
    element, scale_type = _types(weight, scale, tensors)
    *stack, out_features, in_features = codes.shape
    in_features *= 1 if element is Element.FP8 else 2
    blocks = _blocks(out_features, in_features, scales.shape[len(stack) :], block)
    if blocks is None:
        shape = [*stack, out_features, in_features]
        msg = (
            f"{scale} is {list(scales.shape)}, which does not fit {weight}, "
            f"{shape}{f' in blocks of {list(block)}' if block else ''}. "
            "Download the checkpoint again."
        )
        raise CheckpointError(msg)
    size = None if blocks.is_whole_row else blocks.columns
    weight_format = exact_format(element, scale_type, group_size=size)

    def decode(parts: Mapping[str, torch.Tensor]) -> QuantizedTensor | torch.Tensor:
        return _decode(parts, element, blocks, weight_format, divides=divides)

    parts = {"codes": weight, "scales": scale}
    if output_scale is not None:
        parts["output_scale"] = output_scale
    return StoredMatrix(
        name=name,
        shape=(*stack, out_features, in_features),
        parts=parts,
        decode=decode,
        weight_format=weight_format,
        nearest=None if weight_format else format_named("bf16"),
        unread=unread,
    )


def _types(weight: str, scale: str, tensors: Mapping[str, TensorInfo]) -> tuple[Element, ScaleType]:
    codes, scales = tensors[weight], tensors[scale]
    if not is_codes(codes) or scales.dtype not in SCALE_TYPES:
        msg = (
            f"{weight} is stored as {codes.dtype} with scales {scales.dtype} ({scale}), which is "
            f"not read; read are {FP8}, U8 and I8 with {', '.join(SCALE_TYPES)}"
        )
        raise UnsupportedFormatError(msg)
    element = Element.FP8 if codes.dtype == FP8 else Element.FP4
    scale_type = SCALE_TYPES[scales.dtype]
    if element is Element.FP4 and scale_type not in {ScaleType.E8M0, ScaleType.E4M3}:
        msg = f"{weight} is {codes.dtype} with scales {scales.dtype}: that is neither fp8 nor fp4"
        raise UnsupportedFormatError(msg)
    if len(codes.shape) < 2:
        msg = f"{weight} is {list(codes.shape)}, quantised weights are matrices"
        raise CheckpointError(msg)
    return element, scale_type


def _blocks(
    out_features: int, in_features: int, grid: Sequence[int], block: tuple[int, int] | None
) -> _Blocks | None:
    """Return the block of which there are that many in a matrix; None if there is none."""

    def fits(rows: int, columns: int) -> bool:
        return list(grid) == [-(-out_features // rows), -(-in_features // columns)]

    if block and fits(*block):
        return _Blocks(out_features, in_features, *block)
    if list(grid) in ([], [1], [1, 1]):  # one for all
        return _Blocks(out_features, in_features, out_features, in_features, is_whole_row=True)
    if list(grid) in ([out_features], [out_features, 1]):
        return _Blocks(out_features, in_features, 1, in_features, is_whole_row=True)
    for rows, columns in _USUAL_BLOCKS:
        if fits(rows, columns):
            return _Blocks(out_features, in_features, rows, columns)
    return None


def unpack_fp4(packed: torch.Tensor) -> torch.Tensor:
    """Return ``[out, in]`` uint8 codes of bytes ``[out, in / 2]``: the low four bits come first."""
    import torch

    return nibbles(packed.contiguous().view(torch.uint8))


def to_float(scales: torch.Tensor) -> torch.Tensor:
    """Return scales as float32; bytes are exponents, ``2^(byte - 127)``."""
    import torch

    if scales.dtype is torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    return scales.float()


def _decode(
    parts: Mapping[str, torch.Tensor],
    element: Element,
    blocks: _Blocks,
    weight_format: Format | None,
    *,
    divides: bool,
) -> QuantizedTensor | torch.Tensor:
    import torch

    from kt_core.quant.reference import FP4_VALUES

    codes = parts["codes"] if element is Element.FP8 else unpack_fp4(parts["codes"])
    scales = to_float(parts["scales"])
    of_row = torch.arange(blocks.out_features) // blocks.rows
    scales = scales.reshape(-1, -(-blocks.in_features // blocks.columns))[of_row]
    factor = None
    if "output_scale" in parts:
        factor = parts["output_scale"].float().reshape(())
        factor = 1 / factor if divides else factor
    if weight_format is not None:
        outputs = None
        if weight_format.has_output_scale:
            outputs = torch.ones(()) if factor is None else factor
            outputs = outputs.repeat(blocks.out_features)
        elif factor is not None:
            scales = scales * factor
        return quantized(
            weight_format, codes, scales, group_size=blocks.columns, output_scales=outputs
        )
    numbers = codes.float() if element is Element.FP8 else torch.tensor(FP4_VALUES)[codes.long()]
    spread = scales.repeat_interleave(blocks.columns, dim=1)[:, : blocks.in_features]
    return numbers * (spread if factor is None else spread * factor)
