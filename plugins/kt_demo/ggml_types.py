"""The ggml block formats that the demo model's file holds, as float32.

Layouts from ggml's ``ggml-common.h`` (``block_q4_1``, ``block_q8_0``). Both
carry 32 elements per block::

    Q4_1   f16 scale | f16 minimum | 16 bytes: element i in the low nibble of
           byte i, element i + 16 in its high nibble; value = scale * q + minimum
    Q8_0   f16 scale | 32 signed bytes; value = scale * q
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]
Floats: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgmlType:
    """One block format.

    Attributes:
        name: as ggml spells it.
        block_elements: elements in one block.
        block_bytes: bytes in one block.
        dequantize: [blocks, block_bytes] uint8 to [blocks, block_elements] float32.
    """

    name: str
    block_elements: int
    block_bytes: int
    dequantize: Callable[[Bytes], Floats]


def _halves(blocks: Bytes, start: int) -> Floats:
    """Return the float16 at byte ``start`` of every block, as [blocks, 1]."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)


def _from_f32(blocks: Bytes) -> Floats:
    return blocks.copy().view(np.float32)


def _from_f16(blocks: Bytes) -> Floats:
    return _halves(blocks, 0)


def _from_q4_1(blocks: Bytes) -> Floats:
    nibbles = blocks[:, 4:]
    quants = np.concatenate([nibbles & 0x0F, nibbles >> 4], axis=1).astype(np.float32)
    return _halves(blocks, 0) * quants + _halves(blocks, 2)


def _from_q8_0(blocks: Bytes) -> Floats:
    quants = blocks[:, 2:].view(np.int8).astype(np.float32)
    return _halves(blocks, 0) * quants


GGML_TYPES: Final = MappingProxyType(
    {
        0: GgmlType(name="F32", block_elements=1, block_bytes=4, dequantize=_from_f32),
        1: GgmlType(name="F16", block_elements=1, block_bytes=2, dequantize=_from_f16),
        3: GgmlType(name="Q4_1", block_elements=32, block_bytes=20, dequantize=_from_q4_1),
        8: GgmlType(name="Q8_0", block_elements=32, block_bytes=34, dequantize=_from_q8_0),
    }
)
