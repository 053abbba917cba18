"""Start the kernels of one layer: what is known on the host decides, nothing waits for the device.

Numbers of tokens, experts and bytes are known when a call is made; which expert a token goes to is
not. So grids and workspaces depend on the former alone, and a captured graph is right for any
routing and any residency.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton

from kt_core.packed.layout import PANEL
from kt_core.types import ActivationPrecision
from kt_triton.combine import combine
from kt_triton.few_tokens import down_few, gate_up_few
from kt_triton.layer import Layer, matrix_tile, streaming_tile
from kt_triton.many_tokens import down_many, gate_up_many
from kt_triton.plan import plan_blocks
from kt_triton.tiles import INTERPRETED

WORKSPACE_BYTES = 256 << 20
"""What lies between the projections takes at most this: more tokens are computed in turns."""

_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}  # said, because Triton's default changes
# Outputs of a program that streams weights: one panel. The interpreter pays by the program.
_STREAM_OUTPUTS = 256 if INTERPRETED.value else PANEL
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


def compute(
    layer: Layer, call: Call, precision: ActivationPrecision, *, is_few: bool | None = None
) -> None:
    """Put the work into the current stream of the tensors' device.

    Args:
        layer: The experts.
        call: The arguments.
        precision: ``BF16``, for hidden states that are bfloat16 already, or ``FLOAT32``.
        is_few: Whether to take the kernels for few tokens; None for those that suit.
    """
    is_bf16 = precision is ActivationPrecision.BF16
    assert not is_bf16 or call.hidden.dtype is torch.bfloat16
    tokens, top_k = call.expert_ids.shape
    inner_stride = -(-layer.up.outputs // PANEL) * PANEL
    pair_bytes = inner_stride * (2 if is_bf16 else 4) + layer.down.outputs * 4
    turn = max(1, WORKSPACE_BYTES // (top_k * pair_bytes))
    with _current(call.table.device):
        for first in range(0, tokens, turn):
            part = call.turn(slice(first, first + turn))
            pairs = part.expert_ids.numel()
            few = suits_few(pairs, top_k, layer.spec.num_experts) if is_few is None else is_few
            new = part.hidden.new_empty
            inner = new((pairs, inner_stride), dtype=torch.bfloat16 if is_bf16 else torch.float32)
            outputs = new((pairs, layer.down.outputs), dtype=torch.float32)
            (_few if few else _many)(layer, part, inner, outputs)
            _combine(layer, part, outputs)


def suits_few(pairs: int, top_k: int, num_experts: int) -> bool:
    """Return whether so few pairs share an expert that reading it for each costs little.

    With ``num_experts / 2`` pairs at random, some 1.27 of them for each expert that has one. Not
    measured on a GPU: docs/decisions/0017.
    """
    return pairs <= max(top_k, num_experts // 2)


def _few(layer: Layer, call: Call, inner: torch.Tensor, outputs: torch.Tensor) -> None:
    spec, pairs = layer.spec, len(inner)
    up, down = streaming_tile(layer.up), streaming_tile(layer.down)
    gate_up_few[(triton.cdiv(layer.up.outputs, _STREAM_OUTPUTS), pairs)](
        call.hidden, call.expert_ids, call.table, inner,
        GATE=layer.gate, UP=layer.up, ACTIVATION=spec.activation, GATE_BIAS=layer.gate_bias,
        UP_BIAS=layer.up_bias, NUM_EXPERTS=spec.num_experts, TOP_K=call.expert_ids.shape[1],
        INNER_STRIDE=inner.stride(0), OUTPUTS=_STREAM_OUTPUTS,
        STEP_GROUPS=up.step_groups, GROUP_ROWS=up.group_rows, num_warps=4, **_OPTIONS,
    )  # fmt: skip
    down_few[(triton.cdiv(layer.down.outputs, _STREAM_OUTPUTS), pairs)](
        inner, call.expert_ids, call.table, outputs,
        DOWN=layer.down, DOWN_BIAS=layer.down_bias, NUM_EXPERTS=spec.num_experts,
        INNER_STRIDE=inner.stride(0), OUTPUTS=_STREAM_OUTPUTS,
        STEP_GROUPS=down.step_groups, GROUP_ROWS=down.group_rows, num_warps=4, **_OPTIONS,
    )  # fmt: skip


class Blocking(NamedTuple):
    """How a product is cut for the matrix units.

    Attributes:
        rows: Pairs of a block.
        outputs: Outputs of a program, of each of gate and up.
        num_warps: Of a program.
    """

    rows: int
    outputs: int
    num_warps: int


def blocking(pairs: int, num_experts: int, tile_inputs: int) -> Blocking:
    """Choose by how many pairs an expert has on average.

    With 128 rows registers spill on RDNA; not measured otherwise: docs/decisions/0017.

    Args:
        pairs: Of a turn.
        num_experts: Of the layer.
        tile_inputs: Inputs multiplied at once. From 64 rows on Triton 3.9 takes Hopper's wgmma,
            for which it finds no layout of 16 or 32 inputs, and ends the compilation.
    """
    average = pairs / num_experts
    if INTERPRETED.value:
        return Blocking(16, 256, 4)
    if average <= 16:
        return Blocking(16, 64, 4)
    if average <= 32 or tile_inputs < 64:
        return Blocking(32, 64, 4)
    return Blocking(64, 64, 8)


def _many(layer: Layer, call: Call, inner: torch.Tensor, outputs: torch.Tensor) -> None:
    spec, pairs = layer.spec, len(inner)
    up, down = matrix_tile(layer.up), matrix_tile(layer.down)
    cut = blocking(pairs, spec.num_experts, up.inputs(layer.up))
    num_blocks = pairs // cut.rows + spec.num_experts
    order = call.expert_ids.new_empty((pairs,), dtype=torch.int32)
    blocks = call.expert_ids.new_empty((3, num_blocks), dtype=torch.int32)
    plan_blocks[(spec.num_experts + 1,)](
        call.expert_ids, order, blocks, pairs, num_blocks,
        NUM_EXPERTS=spec.num_experts, BLOCK=cut.rows, CHUNK=_PLAN_PAIRS, num_warps=4, **_OPTIONS,
    )  # fmt: skip
    gate_up_many[(num_blocks, triton.cdiv(layer.up.outputs, cut.outputs))](
        call.hidden, order, blocks, num_blocks, call.table, inner,
        GATE=layer.gate, UP=layer.up, ACTIVATION=spec.activation, GATE_BIAS=layer.gate_bias,
        UP_BIAS=layer.up_bias, TOP_K=call.expert_ids.shape[1], INNER_STRIDE=inner.stride(0),
        PARTS=_PARTS[call.hidden.dtype], ROWS=cut.rows, OUTPUTS=cut.outputs,
        STEP_GROUPS=up.step_groups, GROUP_ROWS=up.group_rows, num_warps=cut.num_warps, **_OPTIONS,
    )  # fmt: skip
    down_many[(num_blocks, triton.cdiv(layer.down.outputs, cut.outputs))](
        inner, order, blocks, num_blocks, call.table, outputs,
        DOWN=layer.down, DOWN_BIAS=layer.down_bias, INNER_STRIDE=inner.stride(0),
        PARTS=_PARTS[inner.dtype], ROWS=cut.rows, OUTPUTS=cut.outputs,
        STEP_GROUPS=down.step_groups, GROUP_ROWS=down.group_rows, num_warps=cut.num_warps,
        **_OPTIONS,
    )  # fmt: skip


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
