"""Every format on every instruction set, in all its precisions, forward and backward.

A cell is a format, an instruction set, a number of tokens and an odd shape. ``nox -s isa`` takes
them all (marker ``grid``) and ends with a table; the default suite takes one cell in twenty, so
that each format meets each instruction set, and each number of tokens each shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch

from kernels.devices import ISAS, open_when_asked, precisions
from kernels.test_forward import FORMATS, routed
from kt_core.interfaces import ExpertWeights
from kt_core.testing import backward_reference, reference
from kt_core.testing.backend_training import check_gradients
from kt_core.types import ActivationPrecision, MoeSpec
from kt_cpu.backend import CpuDevice
from kt_cpu.kernel import CpuExpertKernel

TOKENS = (1, 3, 17, 130)  # streamed; streamed in part; unpacked first; and in several blocks
# On both sides of a panel of 16 outputs, and of groups of 16, 32, 64 and 128 inputs.
SHAPES = ((1, 1), (15, 17), (63, 65), (129, 31), (200, 130))
CASES = [(tokens, shape) for tokens in TOKENS for shape in SHAPES]
EXPERTS = 3


class Cell(NamedTuple):
    """One format on one instruction set with one batch of one shape."""

    name: str
    isa: str
    tokens: int
    shape: tuple[int, int]


class Batch(NamedTuple):
    """A layer, what it is asked, and a gradient of its output."""

    spec: MoeSpec
    experts: dict[int, ExpertWeights]
    hidden: torch.Tensor
    expert_ids: torch.Tensor
    weights: torch.Tensor
    grad_out: torch.Tensor


def parametrize(cells: list[Cell]) -> pytest.MarkDecorator:
    def name(cell: Cell) -> str:
        return f"{cell.isa}-{cell.name}-{cell.tokens}-{cell.shape[0]}x{cell.shape[1]}"

    return pytest.mark.parametrize("cell", cells, ids=name)


# Instruction sets change fastest: they share a reference, which takes longer than the kernels.
GRID = [Cell(name, isa, *case) for name in FORMATS for case in CASES for isa in ISAS]
DIAGONAL = [
    Cell(name, isa, *CASES[(row + column * (len(SHAPES) + 1)) % len(CASES)])
    for row, name in enumerate(FORMATS)
    for column, isa in enumerate(ISAS)
]

Open = Callable[[str], CpuDevice]


@pytest.fixture(scope="module")
def device() -> Iterator[Open]:
    with ExitStack() as stack:
        yield open_when_asked(stack)


@lru_cache(maxsize=2)
def batch(tokens: int, shape: tuple[int, int]) -> Batch:
    spec = MoeSpec(num_experts=EXPERTS, hidden_size=shape[0], intermediate_size=shape[1])
    generator = torch.Generator().manual_seed(tokens)
    experts = {e: reference.random_weights(spec, generator) for e in range(EXPERTS)}
    hidden, grad_out = torch.randn(2, tokens, shape[0], generator=generator).unbind()
    ids, weights = routed(tokens, 2, EXPERTS, generator)
    return Batch(spec, experts, hidden, ids, weights, grad_out)


@lru_cache(maxsize=2)
def layer(name: str, tokens: int, shape: tuple[int, int]) -> reference.Layer:
    asked = batch(tokens, shape)
    return reference.layer(asked.spec, FORMATS[name], asked.experts)


@lru_cache(maxsize=4)
def expected(
    name: str, tokens: int, shape: tuple[int, int], precision: ActivationPrecision
) -> tuple[torch.Tensor, torch.Tensor]:
    asked = batch(tokens, shape)
    pairs = (asked.hidden, asked.expert_ids, asked.weights)
    return reference.forward(layer(name, tokens, shape), *pairs, precision)


@lru_cache(maxsize=4)
def expected_gradients(
    name: str, tokens: int, shape: tuple[int, int], precision: ActivationPrecision
) -> dict[str, backward_reference.Bounded]:
    asked = batch(tokens, shape)
    pairs = (asked.hidden, asked.expert_ids, asked.weights, asked.grad_out)
    return backward_reference.backward(layer(name, tokens, shape), *pairs, precision)


def kernels(device: CpuDevice, cell: Cell) -> Iterator[tuple[ActivationPrecision, CpuExpertKernel]]:
    """A kernel with the cell's experts for each precision that its format has."""
    asked = batch(cell.tokens, cell.shape)
    for precision in precisions(FORMATS[cell.name]):
        descriptor = FORMATS[cell.name].descriptor
        kernel = device.expert_kernel(asked.spec, descriptor, precision=precision)
        for index, weights in asked.experts.items():
            kernel.load(index, weights)
        yield precision, kernel


def check_forward(device: CpuDevice, cell: Cell) -> None:
    asked = batch(cell.tokens, cell.shape)
    for precision, kernel in kernels(device, cell):
        got = kernel.submit(asked.hidden, asked.expert_ids, asked.weights).wait()
        want, allowed = expected(cell.name, cell.tokens, cell.shape, precision)
        error = (got.double() - want).abs()
        assert bool((error <= allowed).all()), (
            f"{precision}: {int((error > allowed).sum())} of {got.numel()} outputs are off, "
            f"the worst by {float((error / allowed).max()):.3g} times what rounding explains"
        )


def check_backward(device: CpuDevice, cell: Cell) -> None:
    asked = batch(cell.tokens, cell.shape)
    for precision, kernel in kernels(device, cell):
        got = kernel.backward(asked.hidden, asked.expert_ids, asked.weights, asked.grad_out)
        want = expected_gradients(cell.name, cell.tokens, cell.shape, precision)
        check_gradients(got, want, precision)


@parametrize(DIAGONAL)
def test_forward_of_the_diagonal(device: Open, cell: Cell) -> None:
    check_forward(device(cell.isa), cell)


@parametrize(DIAGONAL)
def test_backward_of_the_diagonal(device: Open, cell: Cell) -> None:
    check_backward(device(cell.isa), cell)


def test_the_diagonal_misses_nothing() -> None:
    """Each format meets each instruction set, and each number of tokens each shape."""
    assert {(c.name, c.isa) for c in DIAGONAL} == {(c.name, c.isa) for c in GRID}
    assert {(c.tokens, c.shape) for c in DIAGONAL} == {(c.tokens, c.shape) for c in GRID}


@pytest.mark.slow
@pytest.mark.grid
@parametrize(GRID)
def test_forward(device: Open, cell: Cell, record_property: Callable[[str, object], None]) -> None:
    record_property("grid", ("forward", cell.name, cell.isa))
    check_forward(device(cell.isa), cell)


@pytest.mark.slow
@pytest.mark.grid
@parametrize(GRID)
def test_backward(device: Open, cell: Cell, record_property: Callable[[str, object], None]) -> None:
    record_property("grid", ("backward", cell.name, cell.isa))
    check_backward(device(cell.isa), cell)
