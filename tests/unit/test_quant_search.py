"""The search is never worse than round-to-nearest, and finds what was found by hand."""

from __future__ import annotations

import pytest
import torch

from kt_core.interfaces import QuantizedTensor, stored_parts
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.quant.reference import dequantize, quantize
from kt_core.quant.search import quantize_searched
from kt_core.types import Format

FORMATS = {f.descriptor.name: f.descriptor for f in BUILT_IN_FORMATS}
INT4 = FORMATS["int4-g32"]


def matrix(rows: int, cols: int) -> torch.Tensor:
    """Rows of different size, positive ones, negative ones, zeros."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(rows, cols, generator=generator) * torch.rand(rows, 1, generator=generator)
    values[1::5] = values[1::5].abs()
    values[2::5] = -values[2::5].abs()
    values[3::5] = 0
    return values


def errors(
    weight: torch.Tensor, quantized: QuantizedTensor, importance: torch.Tensor
) -> torch.Tensor:
    """Weighted squared error of each group, in float64."""
    size = quantized.weight_format.group_size or weight.shape[1]
    error = (dequantize(quantized).double() - weight.double()).square() * importance.double()
    padded = torch.nn.functional.pad(error, (0, -weight.shape[1] % size))
    return padded.reshape(weight.shape[0], -1, size).sum(-1)


@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(7, 160), (5, 33), (1, 1), (6, 500)])
def test_never_worse_than_to_the_nearest(
    weight_format: Format, is_weighted: bool, rows: int, cols: int
) -> None:
    weight = matrix(rows, cols)
    importance = torch.rand(cols, generator=torch.Generator().manual_seed(1)) ** 4
    importance = importance if is_weighted else torch.ones(cols)
    found = quantize_searched(weight, weight_format, importance if is_weighted else None)
    nearest = errors(weight, quantize(weight, weight_format), importance)
    searched = errors(weight, found, importance)
    # Candidates are compared in float32: two that differ by less may be taken for each other.
    assert (searched <= nearest * (1 + 1e-5) + 1e-12).all()
    for name, part in stored_parts(weight_format, rows, cols).items():
        value = getattr(found, name)
        assert (None if value is None else (tuple(value.shape), value.dtype)) == part, name


@pytest.mark.parametrize("name", ["int4-g32", "int4-g32-asym", "int4-g32-min", "mxfp4", "nvfp4"])
def test_better_where_that_is_possible(name: str) -> None:
    """Of random numbers: for most groups there is a better scale than the nearest one's."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(3))
    ones = torch.ones(512)
    nearest = errors(weight, quantize(weight, FORMATS[name]), ones).sum()
    assert errors(weight, quantize_searched(weight, FORMATS[name]), ones).sum() < 0.97 * nearest


def test_a_positive_outlier_meets_the_longer_side() -> None:
    """-8 is a code, 8 is none: these numbers are exact with a scale of -1, with no positive one."""
    weight = torch.tensor([[8.0, *(float(x % 8 - 3) for x in range(31))]])
    found = quantize_searched(weight, INT4)
    assert found.scales is not None
    assert torch.equal(dequantize(found), weight)
    assert found.scales.item() == -1


def test_what_matters_is_kept() -> None:
    """A largest number of no account gives way to others that a smaller scale stores exactly."""
    scale = (torch.tensor(1 / 7).bfloat16().float() * 0.82).bfloat16().float()
    weight = scale * torch.tensor([[0.0, *(float(x % 15 - 7) for x in range(31))]])
    weight[0, 0] = 1.0
    importance = torch.ones(32)
    importance[0] = 0
    found = dequantize(quantize_searched(weight, INT4, importance))
    assert torch.equal(found[0, 1:], weight[0, 1:])
    assert found[0, 0] < 1
    assert not torch.equal(dequantize(quantize(weight, INT4))[0, 1:], weight[0, 1:])


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN or an infinity"):
        quantize_searched(torch.tensor([[float("nan")]]), INT4)


def test_large_numbers_stay_finite() -> None:
    """A candidate scale that float16 cannot hold is not taken."""
    weight = torch.full((1, 32), 65504.0 * 7)
    found = quantize_searched(weight, FORMATS["int4-g32-f16"])
    assert torch.isfinite(dequantize(found)).all()
