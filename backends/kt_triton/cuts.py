"""How a call is cut into programs: what is known on the host decides, and the device's memory."""

from __future__ import annotations

from typing import NamedTuple

from kt_triton.layer import DenseLayer, Layer, matrix_tile
from kt_triton.matrix import Matrix
from kt_triton.tiles import INTERPRETED

# Programs of an H100, two for each of its processors: with fewer, some would have nothing to do.
_ENOUGH_PROGRAMS = 264


class Cut(NamedTuple):
    """How a product is cut into programs.

    Attributes:
        outputs: Outputs of a program, of each of gate and up.
        inputs: Inputs of a tile, if the format lets them be so many.
        num_warps: Of a program.
        num_stages: Tiles that are read ahead, and the one that is multiplied.
    """

    outputs: int
    inputs: int
    num_warps: int
    num_stages: int

    def fitting(
        self, matrix: Matrix, *, matrices: int, rows: int, row_bytes: int, memory_bytes: int
    ) -> Cut:
        """Return a cut that takes no more shared memory: fewer tiles ahead, then fewer outputs.

        Tiles ahead lie there as they are packed, with their activations; of the one in use, what is
        multiplied: activations, and weights that had to be taken apart. In the end results pass
        through.

        Args:
            matrix: What is multiplied.
            matrices: How many of the kind a program reads: gate and up are two.
            rows: Of a block.
            row_bytes: Of one activation.
            memory_bytes: What a program may have.
        """
        cut = self
        while True:
            inputs = matrix_tile(matrix, cut.inputs).inputs(matrix)
            words = matrices * 4 * cut.outputs * inputs // matrix.values_per_word
            ahead = (cut.num_stages - 1) * (words + row_bytes * rows * inputs)
            in_use = 2 * rows * inputs
            if matrix.values_per_word > 2:
                in_use += 2 * cut.outputs * inputs
            if max(ahead + in_use, 4 * cut.outputs * rows) <= memory_bytes:
                return cut
            if cut.num_stages > 2:
                cut = cut._replace(num_stages=cut.num_stages - 1)
            elif cut.outputs > 16 * cut.num_warps:
                cut = cut._replace(outputs=cut.outputs // 2)
            elif cut.num_stages > 1:
                cut = cut._replace(num_stages=1)
            else:
                return cut


_OF_INTERPRETER = Cut(256, 64, 4, 1)  # which pays by the program
_OF_FEW = Cut(16, 128, 1, 4)  # as many programs as there can be: nothing else keeps memory busy


class Plan(NamedTuple):
    """How a call is cut.

    Attributes:
        rows: Rows of a block, which a matrix unit multiplies at once.
        is_planned: Whether blocks are runs of one expert's pairs, and not pairs.
        streams: Whether pairs are left to the kernels of ``few_tokens``.
        gate_up: The first product.
        down: The second one.
    """

    rows: int
    is_planned: bool
    streams: bool
    gate_up: Cut
    down: Cut


def plan_of(layer: Layer, pairs: int, top_k: int, *, is_nvidia: bool, is_few: bool | None) -> Plan:
    """Choose by how many pairs an expert has on average.

    For NVIDIA as measured on an H100; for others, on which nothing was measured, so that no
    register is spilled: docs/decisions/0017.

    Args:
        layer: The experts.
        pairs: Of a turn.
        top_k: Experts of a token.
        is_nvidia: Whose GPU it is.
        is_few: Whether pairs are to be computed one by one; None for what suits.
    """
    num_experts = layer.spec.num_experts
    few = suits_few(pairs, top_k, num_experts) if is_few is None else is_few
    average = pairs / num_experts
    is_bf16 = layer.up.element == "bf16"
    if INTERPRETED.value:
        cut = _OF_INTERPRETER
        return Plan(16, is_planned=not few, streams=few and not is_bf16, gate_up=cut, down=cut)
    if few:
        streams = not (is_bf16 and is_nvidia)
        return Plan(16, is_planned=False, streams=streams, gate_up=_OF_FEW, down=_OF_FEW)
    rows, gate_up, down = _of_nvidia(average) if is_nvidia else _of_others(average)
    return Plan(rows, is_planned=True, streams=False, gate_up=gate_up, down=down)


class DensePlan(NamedTuple):
    """How a call of a dense layer is cut.

    Attributes:
        streams: Whether rows are left to ``linear_few``.
        rows: Rows of a block.
        cut: The product.
    """

    streams: bool
    rows: int
    cut: Cut


def dense_plan(layer: DenseLayer, rows: int, *, is_nvidia: bool, is_few: bool | None) -> DensePlan:
    """Choose by the number of rows, as for an expert that has so many pairs.

    The cuts are those that experts liked; what they reach on an H200 is in docs/performance.md. A
    dense layer is one matrix, and has fewer programs than experts together: with few rows these are
    the small ones of few tokens, and with many they are not made large before there are enough.

    Args:
        layer: The layer.
        rows: Of the call.
        is_nvidia: Whose GPU it is.
        is_few: Whether rows are to be computed one by one; None for what suits.
    """
    # A block of 16 reads weights once. Beside a row by itself it took 2.4 to 3.7 times as long with
    # int4, 1.5 times with mxfp4, 1.1 times with int8, and 0.9 times with fp8, on an H200.
    few = rows == 1 if is_few is None else is_few
    if few and not (is_nvidia and layer.weight.element in {"bf16", "fp8"}):
        return DensePlan(streams=True, rows=1, cut=_OF_FEW)
    if INTERPRETED.value:
        return DensePlan(streams=False, rows=16, cut=_OF_INTERPRETER)
    if rows <= 16:
        cut = _OF_FEW if is_nvidia else _OF_FEW._replace(num_stages=2)  # a gfx1100 spilled
        return DensePlan(streams=False, rows=16, cut=cut)
    block, narrow, wide = _of_nvidia(rows) if is_nvidia else _of_others(rows)
    block = min(block, 1 << (rows - 1).bit_length())  # that average has experts with more
    programs = -(-rows // block) * -(-layer.weight.outputs // wide.outputs)
    # Where groups scale their sums there are two tiles of sums, and the wide cut spills registers.
    is_wide = programs >= _ENOUGH_PROGRAMS and not layer.weight.scales_sums
    return DensePlan(streams=False, rows=block, cut=wide if is_wide else narrow)


def _of_nvidia(average: float) -> tuple[int, Cut, Cut]:
    """Return rows and cuts for so many pairs of an expert."""
    if average <= 8:
        cut = Cut(64, 128, 4, 4)
        return 16, cut, cut
    if average <= 64:
        cut = Cut(64, 64, 4, 3)
        return 32 if average <= 16 else 64, cut, cut
    return 128, Cut(64, 64, 4, 3), Cut(256, 64, 8, 4)


def _of_others(average: float) -> tuple[int, Cut, Cut]:
    """As ``_of_nvidia``."""
    if average <= 32:
        cut = Cut(64, 128, 4, 2)
        return 16 if average <= 16 else 32, cut, cut
    cut = Cut(64, 64, 8, 2)
    return 64, cut, cut


def suits_few(pairs: int, top_k: int, num_experts: int) -> bool:
    """Return whether so few pairs share an expert that reading it for each costs little.

    With ``num_experts / 2`` pairs at random, some 1.27 of them for each expert that has one.
    """
    return pairs <= max(top_k, num_experts // 2)
