"""Blocks of ggml as matrices of a packed format, number for number.

Layouts from ggml's ``ggml-common.h``, as the ``gguf`` package's ``quants.py`` reads them. What is
not here is decoded by transformers (``integrations/gguf/dequant.py``), and quantised again.
"""

from __future__ import annotations

import torch

from kt_checkpoints.floats import to_float
from kt_checkpoints.gguf.types import GGML_TYPES
from kt_core.interfaces import QuantizedTensor
from kt_core.quant.exact import format_named, quantized

# What a code of IQ4 stands for.
_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def decode(raw: torch.Tensor, ggml_type: int) -> QuantizedTensor | torch.Tensor:
    """Return what rows of blocks stand for.

    Args:
        raw: ``[out, row bytes]`` uint8, or ``[out, in]`` of plain numbers.
        ggml_type: A key of ``GGML_TYPES``.

    Raises:
        ValueError: There is nobody who knows the type.
    """
    kind = GGML_TYPES[ggml_type]
    if kind.dtype is not None:
        if kind.packed is None or raw.dim() != 2:
            return raw
        return QuantizedTensor(weight_format=format_named(kind.packed), codes=raw)
    if kind.packed is None:
        return _by_transformers(raw, ggml_type)
    blocks = raw.reshape(-1, kind.block_bytes)
    codes, scales, minimums = _DECODERS[kind.name](blocks)
    rows = len(raw)
    weight_format = format_named(kind.packed)
    return quantized(
        weight_format,
        codes.reshape(rows, -1),
        scales.reshape(rows, -1),
        group_size=weight_format.group_size,
        minimums=None if minimums is None else minimums.reshape(rows, -1),
    )


def _by_transformers(raw: torch.Tensor, ggml_type: int) -> torch.Tensor:
    kind = GGML_TYPES[ggml_type]
    if kind.name == "Q5_1":
        return _q5_1(raw.reshape(-1, kind.block_bytes)).reshape(len(raw), -1)
    msg = f"this version of transformers does not decode {kind.name}; update transformers"
    try:
        from transformers.integrations.gguf import dequant
    except ImportError as error:
        raise ValueError(msg) from error
    if ggml_type not in dequant.GGML_BLOCK:
        raise ValueError(msg)
    values: torch.Tensor = dequant.dequantize(raw.reshape(-1), ggml_type)
    return values.reshape(len(raw), -1)


_Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at a byte of every block, ``[blocks, 1]`` float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(data: torch.Tensor) -> torch.Tensor:
    """``[..., bytes]`` to ``[..., 2 * bytes]``: all low halves, then all high ones."""
    return torch.cat((data & 15, data >> 4), dim=-1)


def _fifth_bits(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """Bit ``i`` of the 32-bit word at a byte, as 16 for element ``i``."""
    each = blocks[:, at : at + 4, None] >> torch.arange(8, dtype=torch.uint8)
    return (each.flatten(1) & 1) << 4


def _q4_0(blocks: torch.Tensor) -> _Parts:
    return (_nibbles(blocks[:, 2:]).to(torch.int8) - 8), _half(blocks, 0), None


def _q4_1(blocks: torch.Tensor) -> _Parts:
    return _nibbles(blocks[:, 4:]), _half(blocks, 0), -_half(blocks, 2)


def _q5_0(blocks: torch.Tensor) -> _Parts:
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return codes.to(torch.int8) - 16, _half(blocks, 0), None


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return _half(blocks, 0) * codes.float() + _half(blocks, 2)


def _q8_0(blocks: torch.Tensor) -> _Parts:
    return blocks[:, 2:].contiguous().view(torch.int8), _half(blocks, 0), None


def _q3_k(blocks: torch.Tensor) -> _Parts:
    """hmask 32 bytes, 2-bit codes 64 bytes, 16 scales of 6 bits in 12 bytes, float16."""
    high, low, packed = blocks[:, :32], blocks[:, 32:96], blocks[:, 96:108]
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)
    # [blocks, half, shift, 32]
    two = (low.view(-1, 2, 1, 32) >> shifts.view(1, 1, 4, 1)) & 3
    bits = torch.arange(8, dtype=torch.uint8).view(1, 2, 4, 1)
    third = (high.view(-1, 1, 1, 32) >> bits) & 1
    codes = two.to(torch.int8) - 4 * (1 - third.to(torch.int8))
    four = _nibbles(packed[:, :8])
    upper = (packed[:, None, 8:] >> shifts.view(1, 4, 1)) & 3
    scales = (four | (upper.flatten(1) << 4)).float() - 32
    return codes.flatten(1), _half(blocks, 108) * scales, None


def _q4_k(blocks: torch.Tensor) -> _Parts:
    """Two float16; 8 scales and 8 minimums of 6 bits in 12 bytes; 4-bit codes."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), dim=1)
    minimums = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), dim=1)
    codes = _nibbles(blocks[:, 16:].reshape(-1, 4, 32))
    return (
        codes.flatten(1),
        _half(blocks, 0) * scales.float(),
        _half(blocks, 2) * minimums.float(),
    )


def _q6_k(blocks: torch.Tensor) -> _Parts:
    """Low 4 bits 128 bytes, high 2 bits 64 bytes, 16 scales int8, float16."""
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).view(-1, 2, 4, 32)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8).view(1, 1, 4, 1)
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    codes = (low | (high << 4)).to(torch.int8) - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return codes.flatten(1), _half(blocks, 208) * scales, None


def _levels(data: torch.Tensor) -> torch.Tensor:
    return torch.tensor(_IQ4_LEVELS, dtype=torch.int8)[_nibbles(data).long()]


def _iq4_nl(blocks: torch.Tensor) -> _Parts:
    return _levels(blocks[:, 2:]), _half(blocks, 0), None


def _iq4_xs(blocks: torch.Tensor) -> _Parts:
    """float16, high 2 bits of 8 scales in a u16, low 4 bits in 4 bytes, 4-bit codes."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)
    high = (blocks[:, 2:4, None] >> shifts).flatten(1) & 3
    halves = torch.tensor((0, 4), dtype=torch.uint8)
    low = (blocks[:, 4:8, None] >> halves).flatten(1) & 15
    scales = (low | (high << 4)).float() - 32
    return _levels(blocks[:, 8:].reshape(-1, 8, 16)).flatten(1), _half(blocks, 0) * scales, None


def _mxfp4(blocks: torch.Tensor) -> _Parts:
    return _nibbles(blocks[:, 1:]), to_float(blocks[:, :1].contiguous()), None


_DECODERS = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q8_0": _q8_0,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
