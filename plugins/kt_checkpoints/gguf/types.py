"""The types of ggml: how many bytes a block has, and which format holds it exactly.

Numbers and sizes from ``GGMLQuantizationType`` and ``GGML_QUANT_SIZES`` of gguf 0.19.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True, kw_only=True)
class GgmlType:
    """One type.

    Attributes:
        name: As ggml spells it.
        block_elements: Numbers in a block.
        block_bytes: Bytes of a block.
        dtype: The word of safetensors, of plain numbers; None for quantised ones.
        packed: Name of the format that holds it exactly; None where none does.
        nearest: Name of the format it is quantised into then.
    """

    name: str
    block_elements: int
    block_bytes: int
    dtype: str | None = None
    packed: str | None = None
    nearest: str = "int8-g32"


def _plain(name: str, size_bytes: int, dtype: str) -> GgmlType:
    packed = "bf16" if dtype == "BF16" else None
    return GgmlType(
        name=name,
        block_elements=1,
        block_bytes=size_bytes,
        dtype=dtype,
        packed=packed,
        nearest="bf16",
    )


def _blocks(
    name: str, elements: int, size_bytes: int, packed: str | None = None, nearest: str = "int8-g32"
) -> GgmlType:
    return GgmlType(
        name=name,
        block_elements=elements,
        block_bytes=size_bytes,
        packed=packed,
        nearest=nearest,
    )


GGML_TYPES: Mapping[int, GgmlType] = MappingProxyType(
    {
        0: _plain("F32", 4, "F32"),
        1: _plain("F16", 2, "F16"),
        2: _blocks("Q4_0", 32, 18, "int4-g32-f16"),
        3: _blocks("Q4_1", 32, 20, "int4-g32-f16-min"),
        6: _blocks("Q5_0", 32, 22, "int8-g32-f16"),
        7: _blocks("Q5_1", 32, 24),
        8: _blocks("Q8_0", 32, 34, "int8-g32-f16"),
        10: _blocks("Q2_K", 256, 84, nearest="int8-g16"),
        11: _blocks("Q3_K", 256, 110, "int8-g16-f32"),
        12: _blocks("Q4_K", 256, 144, "int4-g32-f32-min"),
        13: _blocks("Q5_K", 256, 176),
        14: _blocks("Q6_K", 256, 210, "int8-g16-f32"),
        16: _blocks("IQ2_XXS", 256, 66),
        17: _blocks("IQ2_XS", 256, 74),
        18: _blocks("IQ3_XXS", 256, 98),
        19: _blocks("IQ1_S", 256, 50),
        20: _blocks("IQ4_NL", 32, 18, "int8-g32-f16"),
        21: _blocks("IQ3_S", 256, 110),
        22: _blocks("IQ2_S", 256, 82),
        23: _blocks("IQ4_XS", 256, 136, "int8-g32-f32"),
        29: _blocks("IQ1_M", 256, 56),
        30: _plain("BF16", 2, "BF16"),
        39: _blocks("MXFP4", 32, 17, "mxfp4"),
    }
)
"""By ggml's number."""
