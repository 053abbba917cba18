"""How a call is cut into programs: what is known on the host decides, and the device's memory."""

from __future__ import annotations

from typing import NamedTuple

from kt_triton.layer import Layer, matrix_tile
from kt_triton.matrix import Matrix
from kt_triton.tiles import INTERPRETED


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

    def fitting(self, matrix: Matrix, matrices: int, rows: int, memory_bytes: int) -> Cut:
        """Return a cut that takes no more shared memory: fewer tiles ahead, then fewer outputs.

        Tiles ahead lie there as they are packed, as do the activations' of the one in use; what
        was taken apart passes through, unless it is bfloat16 already; and so do results, in part.
        """
        cut = self
        while True:
            inputs = matrix_tile(matrix, cut.inputs).inputs(matrix)
            taken_apart = 0 if matrix.values_per_word == 2 else 2 * cut.outputs * inputs
            activations = 2 * rows * inputs
            words = matrices * 4 * cut.outputs * inputs // matrix.values_per_word
            tiles = (cut.num_stages - 1) * (words + activations) + taken_apart + activations
            if max(tiles, 4 * cut.outputs * rows) <= memory_bytes:
                return cut
            if cut.num_stages > 2:
                cut = cut._replace(num_stages=cut.num_stages - 1)
            elif cut.outputs > 16 * cut.num_warps:
                cut = cut._replace(outputs=cut.outputs // 2)
            elif cut.num_stages > 1:
                cut = cut._replace(num_stages=1)
            else:
                return cut


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
    if INTERPRETED.value:  # which pays by the program
        cut = Cut(256, 64, 4, 1)
        return Plan(16, not few, few and not is_bf16, cut, cut)
    if few:  # as many programs as there can be: nothing else keeps memory busy
        cut = Cut(16, 128, 1, 4)
        return Plan(16, False, not (is_bf16 and is_nvidia), cut, cut)
    if not is_nvidia:
        cut = Cut(64, 128, 4, 2) if average <= 32 else Cut(64, 64, 8, 2)
        rows = 16 if average <= 16 else 32
        return Plan(rows if average <= 32 else 64, True, False, cut, cut)
    if average <= 8:
        cut = Cut(64, 128, 4, 4)
        return Plan(16, True, False, cut, cut)
    if average <= 64:
        cut = Cut(64, 64, 4, 3)
        return Plan(32 if average <= 16 else 64, True, False, cut, cut)
    return Plan(128, True, False, Cut(64, 64, 4, 3), Cut(256, 64, 8, 4))


def suits_few(pairs: int, top_k: int, num_experts: int) -> bool:
    """Return whether so few pairs share an expert that reading it for each costs little.

    With ``num_experts / 2`` pairs at random, some 1.27 of them for each expert that has one.
    """
    return pairs <= max(top_k, num_experts // 2)
