"""Every type of ggml, from random blocks: the numbers are those that the package ``gguf`` reads."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES

from kt_checkpoints.gguf.blocks import decode
from kt_checkpoints.gguf.types import GGML_TYPES
from kt_core.interfaces import QuantizedTensor
from kt_core.quant.reference import dequantize

ROUNDING = 2.0**-22
"""Of two float32 decoders that multiply and add in another order; relative to the largest."""

# Where float16 numbers stand in a block: the rest may be any bytes.
HALVES = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82),
    "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ2_XXS": (0,), "IQ2_XS": (0,),
    "IQ3_XXS": (0,), "IQ1_S": (0,), "IQ4_NL": (0,), "IQ3_S": (0,), "IQ2_S": (0,), "IQ4_XS": (0,),
}  # fmt: skip


def random_blocks(name: str, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Return ``[rows, row bytes]`` of sensible numbers."""
    kind = next(k for k in GGML_TYPES.values() if k.name == name)
    generator = np.random.default_rng(seed)
    count = rows * columns // kind.block_elements
    blocks = generator.integers(0, 256, (count, kind.block_bytes), dtype=np.uint8)
    for at in HALVES.get(name, ()):
        numbers = generator.normal(0, 0.01, count).astype(np.float16)
        blocks[:, at : at + 2] = numbers.view(np.uint8).reshape(-1, 2)
    if name == "MXFP4":
        blocks[:, 0] = generator.integers(115, 125, count)
    if name == "IQ1_M":  # its scale is the upper bits of four words
        blocks[:, 49::2] = (blocks[:, 49::2] & 0x0F) | np.array([0x00, 0x00, 0x00, 0x20], np.uint8)
    return blocks.reshape(rows, -1)


QUANTISED = [(number, kind.name) for number, kind in GGML_TYPES.items() if kind.dtype is None]


@pytest.mark.parametrize(("number", "name"), QUANTISED, ids=[name for _, name in QUANTISED])
def test_numbers_are_those_of_gguf(number: int, name: str) -> None:
    kind = GGML_TYPES[number]
    ggml_type = gguf.GGMLQuantizationType[name]
    assert ggml_type == number
    assert (kind.block_elements, kind.block_bytes) == GGML_QUANT_SIZES[ggml_type]
    raw = random_blocks(name, 6, 512)
    want = torch.from_numpy(gguf.quants.dequantize(raw, ggml_type))
    assert want.shape == (6, 512)
    assert torch.isfinite(want).all()
    got = decode(torch.from_numpy(raw), number)
    if kind.packed is not None:
        assert isinstance(got, QuantizedTensor)
        assert got.weight_format.name == kind.packed
        assert torch.equal(dequantize(got), want)
    else:
        assert isinstance(got, torch.Tensor)
        assert float((got - want).abs().max()) <= ROUNDING * float(want.abs().max())


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_what_gguf_quantises(name: str) -> None:
    weight = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    ggml_type = gguf.GGMLQuantizationType[name]
    raw = gguf.quants.quantize(weight, ggml_type)
    got = decode(torch.from_numpy(raw), int(ggml_type))
    values = dequantize(got) if isinstance(got, QuantizedTensor) else got
    assert torch.equal(values, torch.from_numpy(gguf.quants.dequantize(raw, ggml_type)))


@pytest.mark.parametrize("number", [0, 1, 30])
def test_plain_numbers(number: int) -> None:
    dtype = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}[number]
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = decode(weight, number)
    values = dequantize(got) if isinstance(got, QuantizedTensor) else got
    assert torch.equal(values.float(), weight.float())
