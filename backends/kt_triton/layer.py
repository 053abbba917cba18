"""What the kernels are compiled for: the matrices of one layer's experts, and how they are cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kt_core.types import ActivationPrecision, Format, MoeSpec
from kt_triton.matrix import COLUMN_PAD, ROW_BYTES, Matrix


class Tile(NamedTuple):
    """How much of a matrix a kernel reads at once.

    Attributes:
        step_groups: Groups of inputs.
        group_rows: Rows of 64 bytes of each of them.
    """

    step_groups: int
    group_rows: int


@dataclass(frozen=True)
class Layer:
    """The experts of a layer as a kernel sees them.

    Attributes:
        spec: Shape and activation.
        gate: None where there is none.
        up: ``[intermediate, hidden]``.
        down: ``[hidden, intermediate]``.
        gate_bias: First byte of the bias, from the expert's first; -1 where there is none.
        up_bias: As ``gate_bias``.
        down_bias: As ``gate_bias``.
        expert_bytes: Of one packed expert.
    """

    spec: MoeSpec
    gate: Matrix | None
    up: Matrix
    down: Matrix
    gate_bias: int
    up_bias: int
    down_bias: int
    expert_bytes: int


def streaming_tile(matrix: Matrix, rows: int = 64) -> Tile:
    """Return a tile of about ``rows`` rows, for sums in float32: any number of groups."""
    if matrix.is_grouped:
        group_rows = matrix.group // matrix.values_per_word
        groups = matrix.padded_inputs // matrix.group
        return Tile(_power_of_two(min(groups, max(1, rows // group_rows))), group_rows)
    return Tile(1, _power_of_two(min(rows, matrix.padded_inputs // matrix.values_per_word)))


def matrix_tile(matrix: Matrix) -> Tile:
    """Return a tile for the matrix units: 64 inputs, or the group whose scale multiplies sums.

    Inputs are padded to a multiple of it, and a unit multiplies at least 16 inputs at once, which
    is the smallest group.
    """
    if not matrix.is_grouped:
        return Tile(1, COLUMN_PAD // matrix.values_per_word)
    group_rows = matrix.group // matrix.values_per_word
    if matrix.scales_sums:
        return Tile(1, group_rows)
    return Tile(max(1, COLUMN_PAD // matrix.group), group_rows)


def _power_of_two(number: int) -> int:
    """The largest that is not greater."""
    return 1 << (number.bit_length() - 1)
