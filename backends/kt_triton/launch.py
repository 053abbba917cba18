"""Start the kernels of one layer: what is known on the host decides, nothing waits for the device.

Numbers of tokens, experts and bytes are known when a call is made; which expert a token goes to is
not. So grids and workspaces depend on the former alone, and a captured graph is right for any
routing and any residency.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
import triton

from kt_core.packed.layout import PANEL
from kt_core.types import ActivationPrecision
from kt_triton.combine import combine
from kt_triton.layer import Layer, matrix_tile
from kt_triton.matrix import Matrix
from kt_triton.plan import plan_blocks
from kt_triton.products import down, gate_up
from kt_triton.tiles import INTERPRETED

WORKSPACE_BYTES = 256 << 20
"""What lies between the projections takes at most this: more tokens are computed in turns."""

_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}  # said, because Triton's default changes
_LEAST_SHARED_BYTES = 64 << 10  # of those with matrix units: CDNA3, RDNA3
_SUM_OUTPUTS = 512
_PLAN_PAIRS = 1024
# How many bfloat16 hold the digits of a number of a type: 8 each.
_PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


class Call(NamedTuple):
    """What is computed: see ``ExpertKernel.submit``. All contiguous, on one device.

    Attributes:
        hidden: ``[tokens, hidden]``.
        expert_ids: ``[tokens, k]``.
        weights: ``[tokens, k]``.
        table: ``[num_experts]`` int64: where each packed expert lies; 0 for nowhere.
        out: ``[tokens, hidden]``, which receives the result.
    """

    hidden: torch.Tensor
    expert_ids: torch.Tensor
    weights: torch.Tensor
    table: torch.Tensor
    out: torch.Tensor

    def turn(self, tokens: slice) -> Call:
        """Return the part of some tokens."""
        table, out = self.table, self.out[tokens]
        return Call(self.hidden[tokens], self.expert_ids[tokens], self.weights[tokens], table, out)


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
        gate_up: The first product.
        down: The second one.
    """

    rows: int
    is_planned: bool
    gate_up: Cut
    down: Cut


def plan_of(pairs: int, top_k: int, num_experts: int, *, is_nvidia: bool) -> Plan:
    """Choose by how many pairs an expert has on average.

    For NVIDIA as measured on an H100; for others, on which nothing was measured, so that no
    register is spilled: docs/decisions/0017.
    """
    is_planned = not suits_few(pairs, top_k, num_experts)
    average = pairs / num_experts
    if INTERPRETED.value:  # which pays by the program
        cut = Cut(256, 64, 4, 1)
        return Plan(16, is_planned, cut, cut)
    if not is_nvidia:
        if not is_planned or average <= 32:
            cut = Cut(64, 128, 4, 2)
            return Plan(16 if average <= 16 else 32, is_planned, cut, cut)
        cut = Cut(64, 64, 8, 2)
        return Plan(64, is_planned, cut, cut)
    if not is_planned:  # as many programs as there can be: nothing else keeps memory busy
        cut = Cut(16, 128, 1, 4)
        return Plan(16, is_planned, cut, cut)
    if average <= 8:
        cut = Cut(64, 128, 4, 4)
        return Plan(16, is_planned, cut, cut)
    if average <= 64:
        cut = Cut(64, 64, 4, 3)
        return Plan(32 if average <= 16 else 64, is_planned, cut, cut)
    return Plan(128, is_planned, Cut(64, 64, 4, 3), Cut(256, 64, 8, 4))


def compute(
    layer: Layer, call: Call, precision: ActivationPrecision, *, is_few: bool | None = None
) -> None:
    """Put the work into the current stream of the tensors' device.

    Args:
        layer: The experts.
        call: The arguments.
        precision: ``BF16``, for hidden states that are bfloat16 already, or ``FLOAT32``.
        is_few: Whether blocks are to be pairs; None for what suits.
    """
    is_bf16 = precision is ActivationPrecision.BF16
    assert not is_bf16 or call.hidden.dtype is torch.bfloat16
    tokens, top_k = call.expert_ids.shape
    inner_stride = -(-layer.up.outputs // PANEL) * PANEL
    pair_bytes = inner_stride * (2 if is_bf16 else 4) + layer.down.outputs * 4
    turn = max(1, WORKSPACE_BYTES // (top_k * pair_bytes))
    where = call.table.device
    with _current(where):
        for first in range(0, tokens, turn):
            part = call.turn(slice(first, first + turn))
            pairs = part.expert_ids.numel()
            plan = plan_of(pairs, top_k, layer.spec.num_experts, is_nvidia=is_nvidia(where))
            if is_few is not None:
                plan = plan._replace(is_planned=not is_few)
            new = part.hidden.new_empty
            inner = new((pairs, inner_stride), dtype=torch.bfloat16 if is_bf16 else torch.float32)
            outputs = new((pairs, layer.down.outputs), dtype=torch.float32)
            _multiply(layer, part, inner, outputs, plan)
            _combine(layer, part, outputs)


def suits_few(pairs: int, top_k: int, num_experts: int) -> bool:
    """Return whether so few pairs share an expert that reading it for each costs little.

    With ``num_experts / 2`` pairs at random, some 1.27 of them for each expert that has one.
    """
    return pairs <= max(top_k, num_experts // 2)


def _multiply(
    layer: Layer, call: Call, inner: torch.Tensor, outputs: torch.Tensor, plan: Plan
) -> None:
    """Both products of every pair."""
    spec, pairs = layer.spec, len(inner)
    ids = call.expert_ids
    order = blocks = ids  # not read where blocks are pairs
    num_blocks = pairs
    if plan.is_planned:
        num_blocks = pairs // plan.rows + spec.num_experts
        order = ids.new_empty((pairs,), dtype=torch.int32)
        blocks = ids.new_empty((3, num_blocks), dtype=torch.int32)
        plan_blocks[(spec.num_experts + 1,)](
            ids, order, blocks, pairs, num_blocks, NUM_EXPERTS=spec.num_experts,
            BLOCK=plan.rows, CHUNK=_PLAN_PAIRS, num_warps=4, **_OPTIONS,
        )  # fmt: skip
    shared = {
        "NUM_EXPERTS": spec.num_experts, "INNER_STRIDE": inner.stride(0), "ROWS": plan.rows,
        "IS_PLANNED": plan.is_planned, **_OPTIONS,
    }  # fmt: skip
    memory_bytes = shared_memory_bytes(call.table.device)
    matrices = 1 if layer.gate is None else 2
    cut = plan.gate_up.fitting(layer.up, matrices, plan.rows, memory_bytes)
    tile = matrix_tile(layer.up, cut.inputs)
    gate_up[(num_blocks, triton.cdiv(layer.up.outputs, cut.outputs))](
        call.hidden, ids, order, blocks, num_blocks, call.table, inner,
        GATE=layer.gate, UP=layer.up, ACTIVATION=spec.activation, GATE_BIAS=layer.gate_bias,
        UP_BIAS=layer.up_bias, TOP_K=ids.shape[1], PARTS=_PARTS[call.hidden.dtype],
        OUTPUTS=cut.outputs, STEP_GROUPS=tile.step_groups, GROUP_ROWS=tile.group_rows,
        num_warps=cut.num_warps, num_stages=cut.num_stages, **shared,
    )  # fmt: skip
    cut = plan.down.fitting(layer.down, 1, plan.rows, memory_bytes)
    tile = matrix_tile(layer.down, cut.inputs)
    down[(num_blocks, triton.cdiv(layer.down.outputs, cut.outputs))](
        inner, ids, order, blocks, num_blocks, call.table, outputs,
        DOWN=layer.down, DOWN_BIAS=layer.down_bias, PARTS=_PARTS[inner.dtype],
        OUTPUTS=cut.outputs, STEP_GROUPS=tile.step_groups, GROUP_ROWS=tile.group_rows,
        num_warps=cut.num_warps, num_stages=cut.num_stages, **shared,
    )  # fmt: skip


def is_nvidia(device: torch.device) -> bool:
    """Whether it is what torch calls ``cuda``, and not AMD's."""
    return device.type == "cuda" and torch.version.hip is None


@functools.cache
def shared_memory_bytes(device: torch.device) -> int:
    """Return the bytes of shared memory that a program may have: what every GPU has, or more."""
    if device.type == "cpu":
        return _LEAST_SHARED_BYTES
    properties = torch.get_device_module(device).get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", _LEAST_SHARED_BYTES))


def _combine(layer: Layer, call: Call, outputs: torch.Tensor) -> None:
    tokens, top_k = call.expert_ids.shape
    width = layer.down.outputs
    combine[(tokens, triton.cdiv(width, _SUM_OUTPUTS))](
        outputs, call.expert_ids, call.weights, call.table, call.out,
        NUM_EXPERTS=layer.spec.num_experts, TOP_K=top_k, WIDTH=width, OUTPUTS=_SUM_OUTPUTS,
        num_warps=4, **_OPTIONS,
    )  # fmt: skip


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Make the tensors' device the current one: Triton starts kernels there."""
    if device.type == "cpu":  # the interpreter
        return contextlib.nullcontext()
    return torch.accelerator.device_index(device.index)
