"""Packed dense layers as plain ones: every number is that of the reference, rounded once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kt_core.checkpoint.packed_config import PackedDense
from kt_core.engine import dense_unpacking
from kt_core.engine.dense_unpacking import _Unpacking
from kt_core.interfaces import WeightFormat
from kt_core.packed.codec import pack_linear
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.types import LinearSpec

HOST = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weight_format", BUILT_IN_FORMATS, ids=lambda f: f.descriptor.name)
def test_the_numbers_are_those_of_the_reference(
    weight_format: WeightFormat, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, in pieces of two panels; outputs and inputs fill neither panels nor groups."""
    spec = LinearSpec(in_features=200, out_features=75, has_bias=True)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(spec.out_features, spec.in_features, generator=generator)
    bias = torch.randn(spec.out_features, generator=generator)
    quantized = weight_format.quantize(weight)
    descriptor = weight_format.descriptor
    packed = pack_linear(quantized, bias, spec, descriptor)
    layer = PackedDense(name="layer", file="", weight_format=descriptor, spec=spec)
    module = nn.Linear(spec.in_features, spec.out_features, device="meta")
    unpacking = _Unpacking(module, packed, layer, dtype)
    monkeypatch.setattr(dense_unpacking, "_PIECE_WEIGHTS", 2 * 16 * spec.in_features)

    pieces = list(unpacking.pieces(HOST))
    assert len(pieces) == 3
    for fill in reversed(pieces):  # they wait for nobody
        fill()

    assert torch.equal(module.weight, weight_format.dequantize(quantized).to(dtype))
    assert torch.equal(module.bias, bias.to(dtype))
    assert not module.weight.requires_grad
    assert unpacking.unpacked_bytes == module.weight.nbytes + module.bias.nbytes
