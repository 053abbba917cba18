"""What the kernels are compiled for: the matrices of one layer, and how they are cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from kt_core.packed import ExpertLayout, LinearLayout
from kt_core.packed.layout import COLUMN_PAD
from kt_core.types import Format, LinearSpec, MoeSpec
from kt_triton.matrix import Matrix


class Tile(NamedTuple):
    """How much of a matrix a kernel reads at once.

    Attributes:
        step_groups: Groups of inputs.
        group_rows: Rows of 64 bytes of each of them.
    """

    step_groups: int
    group_rows: int

    def inputs(self, matrix: Matrix) -> int:
        """Return how many inputs of a matrix that is."""
        return self.step_groups * self.group_rows * matrix.values_per_word


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
    """

    spec: MoeSpec
    gate: Matrix | None
    up: Matrix
    down: Matrix
    gate_bias: int
    up_bias: int
    down_bias: int

    @classmethod
    def of(cls, spec: MoeSpec, weight_format: Format) -> Layer:
        """Describe the packed experts of a layer."""
        expert = ExpertLayout.of(spec, weight_format)
        has_gate_bias = expert.has_gate and expert.has_bias
        after_gate = expert.up.panel_bytes if expert.has_gate else 0
        return cls(
            spec=spec,
            gate=Matrix.of(expert.up, 0, expert.up_stride) if expert.has_gate else None,
            up=Matrix.of(expert.up, after_gate, expert.up_stride),
            down=Matrix.of(expert.down, expert.down_offset, expert.down.panel_bytes),
            gate_bias=expert.gate_bias_at if has_gate_bias else -1,
            up_bias=expert.up_bias_at if expert.has_bias else -1,
            down_bias=expert.down_bias_at if expert.has_bias else -1,
        )


@dataclass(frozen=True)
class DenseLayer:
    """A dense layer as a kernel sees it.

    Attributes:
        weight: ``[out_features, in_features]``.
        bias: First byte of the bias, from the layer's first; -1 where there is none.
    """

    weight: Matrix
    bias: int

    @classmethod
    def of(cls, spec: LinearSpec, weight_format: Format) -> DenseLayer:
        """Describe a packed dense layer."""
        packed = LinearLayout.of(spec, weight_format)
        return cls(
            weight=Matrix.of(packed.weight, 0, packed.weight.panel_bytes),
            bias=packed.bias_offset if packed.has_bias else -1,
        )


def streaming_tile(matrix: Matrix, rows: int = 64) -> Tile:
    """Return a tile of about ``rows`` rows, for sums in float32: any number of groups."""
    if matrix.is_grouped:
        group_rows = matrix.group // matrix.values_per_word
        groups = matrix.padded_inputs // matrix.group
        return Tile(_power_of_two(min(groups, max(1, rows // group_rows))), group_rows)
    return Tile(1, _power_of_two(min(rows, matrix.padded_inputs // matrix.values_per_word)))


def matrix_tile(matrix: Matrix, inputs: int = COLUMN_PAD) -> Tile:
    """Return a tile of ``inputs``, or the part of a group, or groups, that come nearest below.

    A group that scales its sum is a tile, or several are one. Inputs are padded to whole groups of
    more than 64, and a unit multiplies at least 16 inputs at once, which is the smallest group.
    """
    rows = COLUMN_PAD // matrix.values_per_word
    wanted = max(rows, inputs // matrix.values_per_word)
    while wanted > rows and matrix.padded_inputs % (wanted * matrix.values_per_word):
        wanted //= 2
    if not matrix.is_grouped:
        return Tile(1, wanted)
    in_group = matrix.group // matrix.values_per_word
    if in_group >= wanted or matrix.scales_sums:
        return Tile(1, min(wanted, in_group))
    return Tile(wanted // in_group, in_group)


def _power_of_two(number: int) -> int:
    """The largest that is not greater."""
    return 1 << (number.bit_length() - 1)
