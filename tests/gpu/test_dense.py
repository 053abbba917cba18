"""Packed dense layers by the Triton kernels, for one row and for many, against the reference."""

from __future__ import annotations

import pytest
import torch

from gpu.kernels import WHERE, KernelsBackend
from kt_core.interfaces import WeightFormat
from kt_core.packed import MatrixLayout
from kt_core.packed.codec import pack_linear
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.testing import reference_linear
from kt_core.testing.backend_dense import random_dense, random_rows
from kt_core.testing.backend_harness import is_within, worst_of
from kt_core.testing.backward_reference import Bounded
from kt_core.types import ActivationPrecision, LinearSpec
from kt_triton import launch
from kt_triton.layer import DenseLayer
from kt_triton.matrix import Matrix

BF16, FLOAT32 = ActivationPrecision.BF16, ActivationPrecision.FLOAT32
FORMATS = {f.descriptor.name: f for f in BUILT_IN_FORMATS}
# As in test_numbers: small for the interpreter, and no multiples of a panel, a group or a tile.
SMALL = LinearSpec(in_features=100, out_features=40, has_bias=True)
ODD = LinearSpec(in_features=205, out_features=309, has_bias=True)

both = pytest.mark.parametrize("is_few", [True, False], ids=["few", "many"])


def computed(
    spec: LinearSpec,
    weight_format: WeightFormat,
    x: torch.Tensor,
    precision: ActivationPrecision,
    *,
    is_few: bool | None,
) -> torch.Tensor:
    """Compute a call of a layer of ``random_dense(spec)``."""
    device = KernelsBackend(is_few=is_few).open("kernels")
    kernel = device.linear_kernel(spec, weight_format.descriptor, precision=precision)
    kernel.load(*random_dense(spec))
    return kernel.apply(x.to(WHERE)).cpu()


def check(
    spec: LinearSpec,
    weight_format: WeightFormat,
    x: torch.Tensor,
    precision: ActivationPrecision,
    *,
    is_few: bool | None,
) -> torch.Tensor:
    """Compute and compare with the reference."""
    got = computed(spec, weight_format, x, precision, is_few=is_few)
    assert got.dtype is x.dtype
    layer = reference_linear.dense(weight_format, *random_dense(spec))
    _compare(got, reference_linear.forward(layer, x, precision))
    return got


def _compare(got: torch.Tensor, want: Bounded) -> None:
    within = (got, want.value, want.error)
    assert is_within(*within), worst_of(*within)


@both
@pytest.mark.parametrize("name", FORMATS)
def test_every_format(name: str, is_few: bool) -> None:
    """bfloat16 as it comes, in the mode that models use, with a bias."""
    x = random_rows(3, SMALL.in_features, torch.bfloat16)
    check(SMALL, FORMATS[name], x, BF16, is_few=is_few)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("precision", [FLOAT32, BF16])
def test_other_rows(precision: ActivationPrecision, dtype: torch.dtype, is_few: bool) -> None:
    """Rows that are no bfloat16 lose nothing, unless bfloat16 was asked for; they keep their type.

    Without a bias.
    """
    spec = LinearSpec(in_features=40, out_features=24)
    check(spec, FORMATS["int4-g32-min"], random_rows(3, 40, dtype), precision, is_few=is_few)


@pytest.mark.parametrize("rows", [1, 2, 17, 33])
def test_rows_in_blocks(rows: int) -> None:
    """What suits: one row, a block of which most rows are none, several blocks."""
    check(SMALL, FORMATS["int8"], random_rows(rows, 100), FLOAT32, is_few=None)


@both
def test_bytes_that_32_bits_do_not_count(is_few: bool) -> None:
    """Panels 1 GiB apart: the last one's scales lie where an int32 would be negative.

    An output head has so many bytes, of which a format of one-byte scales counts each. Memory that
    nobody touches is none.
    """
    stored = FORMATS["mxfp4"]
    spec = LinearSpec(in_features=64, out_features=64)
    weight, _ = random_dense(spec)
    layout = MatrixLayout.of(stored.descriptor, 64, 64)
    packed = pack_linear(stored.quantize(weight), None, spec, stored.descriptor)
    apart = torch.empty((layout.panels, 1 << 30), dtype=torch.uint8, device=WHERE)
    apart[:, : layout.panel_bytes] = packed.view(layout.panels, -1).to(WHERE)
    layer = DenseLayer(Matrix.of(layout, 0, 1 << 30), -1)
    x = random_rows(2, 64)
    out = torch.empty(2, 64, device=WHERE)
    launch.compute_dense(layer, x.to(WHERE), apart, out, is_few=is_few)
    _compare(
        out.cpu(), reference_linear.forward(reference_linear.dense(stored, weight), x, FLOAT32)
    )


@pytest.mark.triton
@pytest.mark.parametrize("precision", [BF16, FLOAT32])
@pytest.mark.parametrize(
    ("rows", "is_few"), [(1, True), (3, True), (1, False), (3, False), (17, False), (70, False)]
)
@pytest.mark.parametrize("name", FORMATS)
def test_sweep(name: str, rows: int, precision: ActivationPrecision, is_few: bool) -> None:
    """Odd sizes of several tiles, from one row to several blocks; the same bits each time."""
    dtype = torch.bfloat16 if precision is BF16 else torch.float32
    x = random_rows(rows, ODD.in_features, dtype)
    got = check(ODD, FORMATS[name], x, precision, is_few=is_few)
    assert torch.equal(computed(ODD, FORMATS[name], x, precision, is_few=is_few), got)
