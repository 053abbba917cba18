"""Matrix products of blocks of rows with one expert each, on the matrix units.

Weights are the left operand: they enter as the bfloat16 that their codes are, exactly, from the
registers that they were taken apart in. Scales that would not fit multiply the sums in float32.
Activations that are no bfloat16 enter as a sum of two or three, exactly too. So nothing is rounded
but sums. Dense layers are multiplied so, too: ``linear``.

A block is a pair of token and expert where there are few, and a run of one expert's pairs, as
``plan_blocks`` finds them, where there are many.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kt_triton.activations import activate
from kt_triton.tiles import (
    INTERPRETED,
    add_bias,
    expert_address,
    load_minimums,
    load_scales,
    load_words,
    load_zeros,
    pair_address,
    scale_outputs,
    tile_groups,
    to_type,
)
from kt_triton.weights import weights_of


@triton.jit
def _multiply_bf16(weights, x, sums):
    if INTERPRETED:  # it would multiply bfloat16 as the integers that it keeps them in
        return tl.dot(weights.to(tl.float32), x.to(tl.float32), sums)
    else:
        return tl.dot(weights, x, sums)


@triton.jit
def _upper_half(x):
    """float32 cut off to what bfloat16 holds: what is left over is exact."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _multiply(weights, x, sums, PARTS: tl.constexpr):
    """Add ``weights @ x`` to sums; ``x`` is the sum of ``PARTS`` bfloat16 for each element."""
    if PARTS == 1:
        return _multiply_bf16(weights, x.to(tl.bfloat16), sums)
    else:
        rest = x.to(tl.float32)
        for _ in tl.static_range(PARTS - 1):
            part = _upper_half(rest)
            sums = _multiply_bf16(weights, part.to(tl.bfloat16), sums)
            rest -= part
        return _multiply_bf16(weights, _upper_half(rest).to(tl.bfloat16), sums)


@triton.jit
def _group_numbers(address, outputs, group, MATRIX: tl.constexpr):
    """Return what groups have beside their words: scales, zero points and minimums, float32.

    ``[outputs, groups]`` each; 0 where the format has none.
    """
    scale = tl.zeros([outputs.shape[0], group.shape[0]], tl.float32)
    minimum = scale
    if MATRIX.folds_scale or MATRIX.scales_sums:
        scale = load_scales(address, outputs, group, MATRIX)
    if MATRIX.offset == "minimum":
        minimum = load_minimums(address, outputs, group, MATRIX)
    return scale, load_zeros(address, outputs, group, MATRIX), minimum


@triton.jit
def _step(sums, x, words, scale, zero, minimum, MATRIX: tl.constexpr, PARTS: tl.constexpr):
    """Add the products of one tile of inputs, ``x[inputs, rows]``, to ``sums[outputs, rows]``."""
    numbers = weights_of(words, zero[:, :, None], scale[:, :, None], MATRIX)
    weights = tl.reshape(numbers, [sums.shape[0], x.shape[0]])
    if MATRIX.scales_sums:
        sums += _multiply(weights, x, tl.zeros_like(sums), PARTS) * scale
        if MATRIX.offset == "minimum":
            sums -= tl.sum(x.to(tl.float32), axis=0)[None, :] * minimum
        return sums
    else:
        return _multiply(weights, x, sums, PARTS)


@triton.jit
def product(x_rows, is_row, address, outputs, MATRIX: tl.constexpr, BIAS: tl.constexpr,
            PARTS: tl.constexpr, STEP_GROUPS: tl.constexpr, GROUP_ROWS: tl.constexpr):  # fmt: skip
    """Return the products of a block of rows with some rows of one matrix, and their bias.

    ``[outputs, rows]`` float32; 0 and the bias for rows that are none.

    Args:
        x_rows: ``[1, rows]`` pointers, to the first elements of rows.
        is_row: ``[rows]``; what is no row is not read.
        address: See ``load_words``, as ``outputs``.
        outputs: See ``address``.
        MATRIX: The matrix.
        BIAS: See ``add_bias``.
        PARTS: How many bfloat16 an element of a row is the sum of.
        STEP_GROUPS: See ``load_words``, as ``GROUP_ROWS``.
        GROUP_ROWS: See ``STEP_GROUPS``.
    """
    inputs: tl.constexpr = STEP_GROUPS * GROUP_ROWS * MATRIX.values_per_word
    sums = tl.zeros([outputs.shape[0], x_rows.shape[1]], tl.float32)
    group = tile_groups(0, STEP_GROUPS, GROUP_ROWS, MATRIX)
    # Of the next step: nobody but this reads them ahead.
    scale, zero, minimum = _group_numbers(address, outputs, group, MATRIX)
    for step in range(MATRIX.padded_inputs // inputs):
        k = step * inputs + tl.arange(0, inputs)
        inside = is_row[None, :] & (k < MATRIX.inputs)[:, None]
        x = tl.load(x_rows + k[:, None], mask=inside, other=0.0)
        words = load_words(address, outputs, step, STEP_GROUPS, GROUP_ROWS, MATRIX)
        group = tile_groups(step + 1, STEP_GROUPS, GROUP_ROWS, MATRIX)
        next_scale, next_zero, next_minimum = _group_numbers(address, outputs, group, MATRIX)
        sums = _step(sums, x, words, scale, zero, minimum, MATRIX, PARTS)
        scale, zero, minimum = next_scale, next_zero, next_minimum
    sums = scale_outputs(sums, address, outputs, MATRIX)
    return add_bias(sums, address, outputs, BIAS, MATRIX)


@triton.jit
def _block_of(number, expert_ids, order, blocks, num_blocks, table, NUM_EXPERTS: tl.constexpr,
              ROWS: tl.constexpr, IS_PLANNED: tl.constexpr):  # fmt: skip
    """Return where a block's expert lies, 0 for none, its pairs, and which rows have one."""
    row = tl.arange(0, ROWS)
    if IS_PLANNED:
        expert = tl.load(blocks + number)
        address = expert_address(table, tl.maximum(expert, 0))
        place = tl.load(blocks + num_blocks + number) + row
        is_row = place < tl.load(blocks + 2 * num_blocks + number)
        pair = tl.load(order + place, mask=is_row, other=0)
        return tl.where(expert < 0, 0, address), pair.to(tl.int64), is_row
    else:
        address = pair_address(table, expert_ids, number, NUM_EXPERTS)
        return address, (row * 0 + number).to(tl.int64), row == 0


@triton.jit
def gate_up(hidden, expert_ids, order, blocks, num_blocks, table, inner,
            GATE: tl.constexpr, UP: tl.constexpr, ACTIVATION: tl.constexpr,
            GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, NUM_EXPERTS: tl.constexpr,
            TOP_K: tl.constexpr, INNER_STRIDE: tl.constexpr, PARTS: tl.constexpr,
            ROWS: tl.constexpr, OUTPUTS: tl.constexpr, STEP_GROUPS: tl.constexpr,
            GROUP_ROWS: tl.constexpr, IS_PLANNED: tl.constexpr):  # fmt: skip
    """Gate, up, and the activation between: ``inner[pair]``, for the pairs of a block.

    Args:
        hidden: ``[tokens, inputs]``.
        expert_ids: ``[tokens, TOP_K]`` integers.
        order: See ``plan_blocks``, as ``blocks``; not read where blocks are pairs.
        blocks: See ``order``.
        num_blocks: How many.
        table: ``[NUM_EXPERTS]`` int64 addresses, 0 where an expert is not resident.
        inner: ``[pairs, INNER_STRIDE]``; rows of pairs that are not ours stay as they are.
        GATE: The gate matrix; None where there is none.
        UP: The up matrix.
        ACTIVATION: See ``activate``.
        GATE_BIAS: See ``add_bias``, as ``UP_BIAS``.
        UP_BIAS: See ``GATE_BIAS``.
        NUM_EXPERTS: Of the layer.
        TOP_K: Experts of a token.
        INNER_STRIDE: Elements from a row of ``inner`` to the next.
        PARTS: How many bfloat16 an element of ``hidden`` is the sum of.
        ROWS: Rows of a block.
        OUTPUTS: Outputs of a program.
        STEP_GROUPS: See ``load_words``, as ``GROUP_ROWS``.
        GROUP_ROWS: See ``STEP_GROUPS``.
        IS_PLANNED: Whether blocks are ``plan_blocks``'s, and not pairs.
    """
    address, pair, is_row = _block_of(
        tl.program_id(0), expert_ids, order, blocks, num_blocks, table,
        NUM_EXPERTS, ROWS, IS_PLANNED,
    )  # fmt: skip
    if address == 0:
        return
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    inputs: tl.constexpr = STEP_GROUPS * GROUP_ROWS * UP.values_per_word
    x_rows = hidden + (pair // TOP_K)[None, :] * UP.inputs
    up = tl.zeros([OUTPUTS, ROWS], tl.float32)
    gate = up
    group = tile_groups(0, STEP_GROUPS, GROUP_ROWS, UP)
    # Of the next step: nobody but this reads them ahead.
    up_scale, up_zero, up_minimum = _group_numbers(address, outputs, group, UP)
    if GATE is not None:
        gate_scale, gate_zero, gate_minimum = _group_numbers(address, outputs, group, GATE)
    for step in range(UP.padded_inputs // inputs):
        k = step * inputs + tl.arange(0, inputs)
        inside = is_row[None, :] & (k < UP.inputs)[:, None]
        x = tl.load(x_rows + k[:, None], mask=inside, other=0.0)
        group = tile_groups(step + 1, STEP_GROUPS, GROUP_ROWS, UP)
        words = load_words(address, outputs, step, STEP_GROUPS, GROUP_ROWS, UP)
        scale, zero, minimum = _group_numbers(address, outputs, group, UP)
        up = _step(up, x, words, up_scale, up_zero, up_minimum, UP, PARTS)
        up_scale, up_zero, up_minimum = scale, zero, minimum
        if GATE is not None:
            words = load_words(address, outputs, step, STEP_GROUPS, GROUP_ROWS, GATE)
            scale, zero, minimum = _group_numbers(address, outputs, group, GATE)
            gate = _step(gate, x, words, gate_scale, gate_zero, gate_minimum, GATE, PARTS)
            gate_scale, gate_zero, gate_minimum = scale, zero, minimum
    up = add_bias(scale_outputs(up, address, outputs, UP), address, outputs, UP_BIAS, UP)
    if GATE is not None:
        gate = scale_outputs(gate, address, outputs, GATE)
        gate = add_bias(gate, address, outputs, GATE_BIAS, GATE)
    else:
        gate = up
    result = tl.trans(to_type(activate(gate, up, ACTIVATION), inner.dtype.element_ty))
    target = inner + pair[:, None] * INNER_STRIDE + outputs[None, :]
    tl.store(target, result, mask=is_row[:, None] & (outputs < UP.outputs)[None, :])


@triton.jit
def down(inner, expert_ids, order, blocks, num_blocks, table, expert_outputs,
         DOWN: tl.constexpr, DOWN_BIAS: tl.constexpr, NUM_EXPERTS: tl.constexpr,
         INNER_STRIDE: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
         OUTPUTS: tl.constexpr, STEP_GROUPS: tl.constexpr, GROUP_ROWS: tl.constexpr,
         IS_PLANNED: tl.constexpr):  # fmt: skip
    """The down projection: ``expert_outputs[pair]``, ``[pairs, outputs]`` float32, not weighted.

    See ``gate_up`` for the other arguments.
    """
    address, pair, is_row = _block_of(
        tl.program_id(0), expert_ids, order, blocks, num_blocks, table,
        NUM_EXPERTS, ROWS, IS_PLANNED,
    )  # fmt: skip
    if address == 0:
        return
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    x_rows = inner + pair[None, :] * INNER_STRIDE
    result = tl.trans(product(
        x_rows, is_row, address, outputs, DOWN, DOWN_BIAS, PARTS, STEP_GROUPS, GROUP_ROWS
    ))  # fmt: skip
    target = expert_outputs + pair[:, None] * DOWN.outputs + outputs[None, :]
    tl.store(target, result, mask=is_row[:, None] & (outputs < DOWN.outputs)[None, :])
