"""Compensation against the definition: inverses taken anew for each column, all codes tried."""

from __future__ import annotations

import itertools

import pytest
import torch

from kt_core.interfaces import QuantizedTensor, stored_parts
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.quant.compensate import Compensator, _compensated, inverse_factor, output_errors
from kt_core.quant.grid import Grid
from kt_core.quant.reference import dequantize, quantize
from kt_core.quant.search import Groups, best_grid, quantize_searched
from kt_core.types import Format

FORMATS = {f.descriptor.name: f.descriptor for f in BUILT_IN_FORMATS}
SCALED = {name: f for name, f in FORMATS.items() if f.scale is not None}
DAMPING = 0.01
"""As in compensate.py."""


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and second moments of inputs that go together, with fewer samples than columns."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, max(1, columns // 3), generator=generator)
    hidden = torch.randn(4 * columns // 5 + 1, mixing.shape[1], generator=generator) @ mixing.T
    inputs = hidden + 0.1 * torch.randn(len(hidden), columns, generator=generator)
    weight = torch.randn(rows, columns, generator=generator)
    return weight, inputs.T @ inputs / len(inputs)


def errors(weight: torch.Tensor, found: QuantizedTensor, moments: torch.Tensor) -> torch.Tensor:
    """In float64, by the definition."""
    wrong = dequantize(found).double() - weight.double()
    return torch.einsum("oi,ij,oj->o", wrong, moments.double(), wrong)


def damped(moments: torch.Tensor) -> torch.Tensor:
    return moments.double() + DAMPING * moments.diagonal().double().mean() * torch.eye(len(moments))


@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(("rows", "columns"), [(7, 96), (5, 33), (1, 1)])
def test_never_worse_than_to_the_nearest(weight_format: Format, rows: int, columns: int) -> None:
    """Output by output, by the moments; and everything is of the right kind."""
    weight, moments = problem(rows, columns)
    found = Compensator(moments).quantize(weight, weight_format)
    nearest = errors(weight, quantize(weight, weight_format), moments)
    # The choice is made in float32, whose products err by as much as terms cancel.
    slack = 1e-4 * output_errors(dequantize(quantize(weight, weight_format)).abs(), moments.abs())
    assert (errors(weight, found, moments) <= nearest + 1e-6 * slack.double()).all()
    for name, part in stored_parts(weight_format, rows, columns).items():
        value = getattr(found, name)
        assert (None if value is None else (tuple(value.shape), value.dtype)) == part, name


@pytest.mark.parametrize("weight_format", SCALED.values(), ids=SCALED)
def test_better_than_the_search_where_inputs_go_together(weight_format: Format) -> None:
    weight, moments = problem(16, 128)
    found = errors(weight, Compensator(moments).quantize(weight, weight_format), moments).sum()
    searched = quantize_searched(weight, weight_format, moments.diagonal())
    assert found < 0.5 * errors(weight, searched, moments).sum()


def test_the_factor_is_one_of_the_inverse() -> None:
    _, moments = problem(1, 40)
    factor = inverse_factor(moments).double()
    assert torch.equal(factor, factor.triu())
    # float32's rounding, times the condition, which the damping bounds by 40 / 0.01.
    assert torch.allclose(factor.T @ factor @ damped(moments), torch.eye(40).double(), atol=1e-3)


@pytest.mark.parametrize("name", ["int4-g32", "int4-g32-asym", "int4-g32-min", "nvfp4", "int8"])
def test_codes_are_those_of_the_definition(name: str) -> None:
    """Round a column; change the others by the inverse of what is left; take that inverse anew."""
    weight_format = FORMATS[name]
    columns = weight_format.group_size or 24
    weight, moments = problem(5, columns, seed=3)
    if weight_format.has_output_scale:
        weight[:, 0] = 3  # the output's scale is then that of its only group
    got = _compensated(weight, weight_format, inverse_factor(moments))
    inverses = [torch.linalg.inv(damped(moments)[at:, at:]) for at in range(columns)]
    worth = torch.stack([1 / inverse[0, 0] for inverse in inverses]).float()
    groups = Groups.of(weight, worth, weight_format)
    outputs = got.output_scales[:, None, None] if got.output_scales is not None else None
    grid = best_grid(groups, weight_format, outputs)
    parts = (grid.scales, grid.offsets, grid.outputs)
    flat = Grid(weight_format, *(None if p is None else p[:, 0, 0] for p in parts))  # type: ignore[arg-type]
    left, codes = weight.double(), []
    for at, inverse in enumerate(inverses):
        codes.append(flat.codes(left[:, at].float()))
        wrong = left[:, at] - flat.numbers(codes[-1]).double()
        left[:, at:] -= wrong[:, None] * inverse[0] / inverse[0, 0]
    want = grid.stored(torch.stack(codes, dim=1))
    assert torch.allclose(got.scales, want.scales, rtol=1e-5)  # type: ignore[arg-type]
    # A number halfway between two codes may fall on either side.
    assert (got.codes.float() != want.codes.float()).float().mean() <= 0.01
    assert torch.allclose(
        errors(weight, got, moments), errors(weight, want, moments), rtol=0.05, atol=1e-9
    )


def test_near_to_the_best_of_all_codes() -> None:
    """Two inputs that nearly say the same: 256 pairs of codes are tried for each output."""
    weight_format = FORMATS["int4-g32"]
    weight = torch.tensor([[1.0, 0.43], [0.7, -0.61], [-0.9, 0.38]])
    moments = torch.tensor([[1.0, 0.95], [0.95, 1.0]])
    found = Compensator(moments).quantize(weight, weight_format)
    nearest = quantize(weight, weight_format)
    scale, start = (part.scales for part in (found, nearest))
    assert scale is not None
    assert start is not None
    pairs = torch.tensor(list(itertools.product(range(-8, 8), repeat=2))).float()
    for row in range(len(weight)):
        wrong = (pairs * scale[row] - weight[row]).double()
        least = torch.einsum("pi,ij,pj->p", wrong, moments.double(), wrong).min()
        got = errors(weight[row : row + 1], _row(found, row), moments)
        rounded = errors(weight[row : row + 1], _row(nearest, row), moments)
        assert least <= got + 1e-12
        assert got <= rounded
    assert errors(weight, found, moments).sum() < 0.5 * errors(weight, nearest, moments).sum()


def _row(found: QuantizedTensor, row: int) -> QuantizedTensor:
    assert found.scales is not None
    return QuantizedTensor(
        weight_format=found.weight_format,
        codes=found.codes[row : row + 1],
        scales=found.scales[row : row + 1],
    )


def test_inputs_that_never_came() -> None:
    """No moments at all: as the search without weights; some of 0: those do not matter."""
    weight, moments = problem(4, 64)
    weight_format = FORMATS["int4-g32"]
    nothing = Compensator(torch.zeros(64, 64)).quantize(weight, weight_format)
    assert torch.isfinite(dequantize(nothing)).all()
    moments[:8], moments[:, :8] = 0, 0
    found = Compensator(moments).quantize(weight, weight_format)
    assert (
        errors(weight, found, moments) <= errors(weight, quantize(weight, weight_format), moments)
    ).all()


def test_bad_moments_are_refused() -> None:
    with pytest.raises(ValueError, match="second moments of the inputs hold a NaN"):
        Compensator(torch.full((2, 2), torch.nan))
    with pytest.raises(ValueError, match="NaN or an infinity"):
        Compensator(torch.eye(1)).quantize(torch.tensor([[torch.inf]]), FORMATS["int4-g32"])


def test_the_same_again() -> None:
    weight, moments = problem(16, 256)
    first, second = (Compensator(moments).quantize(weight, FORMATS["int4-g32"]) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scales, second.scales)  # type: ignore[arg-type]
