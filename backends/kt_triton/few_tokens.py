"""Few tokens and small weights: a program for each pair of token and expert and each panel.

The inputs are split over a program's threads, and their sums are added at the end, so that as many
words as there are threads are under way; with weights of eight bits or fewer a matrix unit's tiles
were measured to be too few for that (docs/decisions/0017). Products and sums are float32. A row
through a dense layer is computed so, too: ``linear_few``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kt_triton.activations import activate
from kt_triton.tiles import (
    add_bias,
    decode,
    load_minimums,
    load_scales,
    load_words,
    load_zeros,
    pair_address,
    scale_outputs,
    tile_groups,
    to_type,
)


@triton.jit
def dot(x, address, outputs, MATRIX: tl.constexpr, STEP_GROUPS: tl.constexpr,
        GROUP_ROWS: tl.constexpr):  # fmt: skip
    """Return the products of one row with ``outputs`` rows of a matrix, ``[outputs, 1]``."""
    values: tl.constexpr = MATRIX.values_per_word
    step_inputs: tl.constexpr = STEP_GROUPS * GROUP_ROWS * values
    sums = tl.zeros([outputs.shape[0], STEP_GROUPS, GROUP_ROWS], tl.float32)
    row = tl.arange(0, STEP_GROUPS)[:, None] * GROUP_ROWS + tl.arange(0, GROUP_ROWS)[None, :]
    for step in range(tl.cdiv(MATRIX.padded_inputs, step_inputs)):
        words = load_words(address, outputs, step, STEP_GROUPS, GROUP_ROWS, MATRIX)
        group = tile_groups(step, STEP_GROUPS, GROUP_ROWS, MATRIX)
        zero = load_zeros(address, outputs, group, MATRIX)[:, :, None]
        products = tl.zeros_like(sums)
        inputs = tl.zeros([STEP_GROUPS, GROUP_ROWS], tl.float32)
        for value in tl.static_range(values):
            k = step * step_inputs + row * values + value
            activation = tl.load(x + k, mask=k < MATRIX.inputs, other=0.0).to(tl.float32)
            products += decode(words, value, zero, MATRIX) * activation[None, :, :]
            if MATRIX.offset == "minimum":
                inputs += activation
        if MATRIX.folds_scale or MATRIX.scales_sums:
            products *= load_scales(address, outputs, group, MATRIX)[:, :, None]
        if MATRIX.offset == "minimum":
            minimum = load_minimums(address, outputs, group, MATRIX)
            products -= inputs[None, :, :] * minimum[:, :, None]
        sums += products
    flat = tl.reshape(sums, [outputs.shape[0], STEP_GROUPS * GROUP_ROWS])
    return scale_outputs(tl.sum(flat, axis=1)[:, None], address, outputs, MATRIX)


@triton.jit
def gate_up_few(hidden, expert_ids, table, inner,
                GATE: tl.constexpr, UP: tl.constexpr, ACTIVATION: tl.constexpr,
                GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr,
                NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, INNER_STRIDE: tl.constexpr,
                OUTPUTS: tl.constexpr, STEP_GROUPS: tl.constexpr,
                GROUP_ROWS: tl.constexpr):  # fmt: skip
    """Gate, up, and the activation between: ``inner[pair]`` of one token through one expert.

    Args:
        hidden: ``[tokens, inputs]``.
        expert_ids: ``[tokens, TOP_K]`` integers.
        table: ``[NUM_EXPERTS]`` int64 addresses.
        inner: ``[tokens * TOP_K, INNER_STRIDE]``; rows of pairs that are not ours stay as they are.
        GATE: The gate matrix; None where there is none.
        UP: The up matrix.
        ACTIVATION: See ``activate``.
        GATE_BIAS: See ``add_bias``, as ``UP_BIAS``.
        UP_BIAS: See ``GATE_BIAS``.
        NUM_EXPERTS: Of the layer.
        TOP_K: Experts of a token.
        INNER_STRIDE: Elements from a row of ``inner`` to the next.
        OUTPUTS: Outputs of a program.
        STEP_GROUPS: See ``load_words``, as ``GROUP_ROWS``.
        GROUP_ROWS: See ``STEP_GROUPS``.
    """
    pair = tl.program_id(1)
    address = pair_address(table, expert_ids, pair, NUM_EXPERTS)
    if address == 0:
        return
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    x = hidden + (pair // TOP_K).to(tl.int64) * UP.inputs
    up = dot(x, address, outputs, UP, STEP_GROUPS, GROUP_ROWS)
    up = add_bias(up, address, outputs, UP_BIAS, UP)
    gate = up
    if GATE is not None:
        gate = dot(x, address, outputs, GATE, STEP_GROUPS, GROUP_ROWS)
        gate = add_bias(gate, address, outputs, GATE_BIAS, GATE)
    result = activate(gate, up, ACTIVATION)
    target = inner + pair.to(tl.int64) * INNER_STRIDE + outputs[:, None]
    tl.store(target, to_type(result, inner.dtype.element_ty), mask=(outputs < UP.outputs)[:, None])


@triton.jit
def down_few(inner, expert_ids, table, expert_outputs,
             DOWN: tl.constexpr, DOWN_BIAS: tl.constexpr, NUM_EXPERTS: tl.constexpr,
             INNER_STRIDE: tl.constexpr, OUTPUTS: tl.constexpr, STEP_GROUPS: tl.constexpr,
             GROUP_ROWS: tl.constexpr):  # fmt: skip
    """The down projection: ``expert_outputs[pair]``, ``[pairs, outputs]`` float32, not weighted.

    See ``gate_up_few`` for the other arguments.
    """
    pair = tl.program_id(1)
    address = pair_address(table, expert_ids, pair, NUM_EXPERTS)
    if address == 0:
        return
    outputs = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    x = inner + pair.to(tl.int64) * INNER_STRIDE
    result = dot(x, address, outputs, DOWN, STEP_GROUPS, GROUP_ROWS)
    result = add_bias(result, address, outputs, DOWN_BIAS, DOWN)
    target = expert_outputs + pair.to(tl.int64) * DOWN.outputs + outputs[:, None]
    tl.store(target, result, mask=(outputs < DOWN.outputs)[:, None])
