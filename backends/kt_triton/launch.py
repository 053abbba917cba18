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
from kt_triton.cuts import Plan, dense_plan, plan_of
from kt_triton.few_tokens import down_few, gate_up_few
from kt_triton.layer import DenseLayer, Layer, matrix_tile, streaming_tile
from kt_triton.linear import linear, linear_few
from kt_triton.plan import plan_blocks
from kt_triton.products import down, gate_up
from kt_triton.tiles import INTERPRETED

WORKSPACE_BYTES = 256 << 20
"""What lies between the projections takes at most this: more tokens are computed in turns."""

_OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}  # said, because Triton's default changes
_LEAST_SHARED_BYTES = 64 << 10  # of those with matrix units: CDNA3, RDNA3
_SUM_OUTPUTS = 512
_PLAN_PAIRS = 1024
# Outputs of a program that streams weights: one panel. The interpreter pays by the program.
_STREAM_OUTPUTS = 256 if INTERPRETED.value else PANEL
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
        is_few: Whether pairs are to be computed one by one; None for what suits.
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
            plan = plan_of(layer, pairs, top_k, is_nvidia=is_nvidia(where), is_few=is_few)
            new = part.hidden.new_empty
            inner = new((pairs, inner_stride), dtype=torch.bfloat16 if is_bf16 else torch.float32)
            outputs = new((pairs, layer.down.outputs), dtype=torch.float32)
            if plan.streams:
                _stream(layer, part, inner, outputs)
            else:
                _multiply(layer, part, inner, outputs, plan)
            _combine(layer, part, outputs)


def _stream(layer: Layer, call: Call, inner: torch.Tensor, outputs: torch.Tensor) -> None:
    """Both products of every pair, each by itself."""
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
    room = {"rows": plan.rows, "memory_bytes": shared_memory_bytes(call.table.device)}
    cut = plan.gate_up.fitting(
        layer.up, matrices=1 if layer.gate is None else 2, row_bytes=call.hidden.itemsize, **room
    )
    tile = matrix_tile(layer.up, cut.inputs)
    gate_up[(num_blocks, triton.cdiv(layer.up.outputs, cut.outputs))](
        call.hidden, ids, order, blocks, num_blocks, call.table, inner,
        GATE=layer.gate, UP=layer.up, ACTIVATION=spec.activation, GATE_BIAS=layer.gate_bias,
        UP_BIAS=layer.up_bias, TOP_K=ids.shape[1], PARTS=_PARTS[call.hidden.dtype],
        OUTPUTS=cut.outputs, STEP_GROUPS=tile.step_groups, GROUP_ROWS=tile.group_rows,
        num_warps=cut.num_warps, num_stages=cut.num_stages, **shared,
    )  # fmt: skip
    cut = plan.down.fitting(layer.down, matrices=1, row_bytes=inner.itemsize, **room)
    tile = matrix_tile(layer.down, cut.inputs)
    down[(num_blocks, triton.cdiv(layer.down.outputs, cut.outputs))](
        inner, ids, order, blocks, num_blocks, call.table, outputs,
        DOWN=layer.down, DOWN_BIAS=layer.down_bias, PARTS=_PARTS[inner.dtype],
        OUTPUTS=cut.outputs, STEP_GROUPS=tile.step_groups, GROUP_ROWS=tile.group_rows,
        num_warps=cut.num_warps, num_stages=cut.num_stages, **shared,
    )  # fmt: skip


def compute_dense(
    layer: DenseLayer,
    x: torch.Tensor,
    packed: torch.Tensor,
    out: torch.Tensor,
    *,
    is_few: bool | None = None,
) -> None:
    """Put a dense layer into the current stream of the tensors' device.

    Args:
        layer: The layer.
        x: ``[rows, in_features]``, contiguous; no element is rounded.
        packed: ``[bytes]`` uint8, the layer.
        out: ``[rows, out_features]``, contiguous, which receives the result.
        is_few: Whether rows are to be computed one by one; None for what suits.
    """
    weight, rows, where = layer.weight, len(x), packed.device
    plan = dense_plan(layer, rows, is_nvidia=is_nvidia(where), is_few=is_few)
    with _current(where):
        if plan.streams:
            tile = streaming_tile(weight)
            linear_few[(rows, triton.cdiv(weight.outputs, _STREAM_OUTPUTS))](
                x, packed, out, WEIGHT=weight, BIAS=layer.bias, OUTPUTS=_STREAM_OUTPUTS,
                STEP_GROUPS=tile.step_groups, GROUP_ROWS=tile.group_rows, num_warps=4, **_OPTIONS,
            )  # fmt: skip
            return
        cut = plan.cut.fitting(
            weight, matrices=1, rows=plan.rows, row_bytes=x.itemsize,
            memory_bytes=shared_memory_bytes(where),
        )  # fmt: skip
        tile = matrix_tile(weight, cut.inputs)
        linear[(triton.cdiv(rows, plan.rows), triton.cdiv(weight.outputs, cut.outputs))](
            x, packed, out, rows, WEIGHT=weight, BIAS=layer.bias, PARTS=_PARTS[x.dtype],
            ROWS=plan.rows, OUTPUTS=cut.outputs, STEP_GROUPS=tile.step_groups,
            GROUP_ROWS=tile.group_rows, num_warps=cut.num_warps, num_stages=cut.num_stages,
            **_OPTIONS,
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
