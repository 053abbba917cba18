"""Many tokens: a matrix product for each block of rows of one expert, on the matrix units.

Weights enter as the bfloat16 that their codes are, exactly; scales that would not fit multiply the
sums in float32. Activations that are no bfloat16 enter as a sum of two or three, exactly too. So
nothing is rounded but sums, as in the kernels for few tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kt_triton.activations import activate
from kt_triton.tiles import (
    INTERPRETED,
    add_bias,
    decode,
    expert_address,
    load_minimums,
    load_scales,
    load_words,
    load_zeros,
    scale_outputs,
    tile_groups,
    to_type,
)


@triton.jit
def _multiply_bf16(x, weights, sums):
    if INTERPRETED:  # it would multiply bfloat16 as the integers that it keeps them in
        return tl.dot(x.to(tl.float32), weights.to(tl.float32), sums)
    else:
        return tl.dot(x, weights, sums)


@triton.jit
def _upper_half(x):
    """float32 cut off to what bfloat16 holds: what is left over is exact."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _multiply(x, weights, sums, PARTS: tl.constexpr):
    """Add ``x @ weights`` to sums; ``x`` is the sum of ``PARTS`` bfloat16 for each element."""
    if PARTS == 1:
        return _multiply_bf16(x.to(tl.bfloat16), weights, sums)
    else:
        rest = x.to(tl.float32)
        for _ in tl.static_range(PARTS - 1):
            part = _upper_half(rest)
            sums = _multiply_bf16(part.to(tl.bfloat16), weights, sums)
            rest -= part
        return _multiply_bf16(_upper_half(rest).to(tl.bfloat16), weights, sums)


@triton.jit
def _weight(words, zero, scale, VALUE: tl.constexpr, MATRIX: tl.constexpr):
    """One of the inputs of each word, as the bfloat16 that is multiplied."""
    number = decode(words, VALUE, zero, MATRIX)
    if MATRIX.folds_scale:
        number *= scale
    return number.to(tl.bfloat16)


@triton.jit
def _every(words, zero, scale, VALUE: tl.constexpr, DISTANCE: tl.constexpr, MATRIX: tl.constexpr):
    """Two inputs of each word, ``DISTANCE`` apart: joined, so that one thread has both."""
    first = _weight(words, zero, scale, VALUE, MATRIX)
    return tl.join(first, _weight(words, zero, scale, VALUE + DISTANCE, MATRIX))


@triton.jit
def _every_second(words, zero, scale, VALUE: tl.constexpr, MATRIX: tl.constexpr):
    """The four even or the four odd inputs of each word, in their order."""
    low = _every(words, zero, scale, VALUE, 4, MATRIX)
    return tl.join(low, _every(words, zero, scale, VALUE + 2, 4, MATRIX))


@triton.jit
def _step(sums, x, address, outputs, step, MATRIX: tl.constexpr, PARTS: tl.constexpr,
          STEP_GROUPS: tl.constexpr, GROUP_ROWS: tl.constexpr):  # fmt: skip
    """Add the products of one tile of inputs, ``x[rows, inputs]``, to ``sums[rows, outputs]``."""
    values: tl.constexpr = MATRIX.values_per_word
    group = tile_groups(step, STEP_GROUPS, GROUP_ROWS, MATRIX)
    words = load_words(address, outputs, step, STEP_GROUPS, GROUP_ROWS, MATRIX)
    zero = load_zeros(address, outputs, group, MATRIX)[:, :, None]
    scale = zero
    if MATRIX.folds_scale:
        scale = load_scales(address, outputs, group, MATRIX)[:, :, None]
    if values == 2:
        numbers = _every(words, zero, scale, 0, 1, MATRIX)
    elif values == 4:
        numbers = _every(words, zero, scale, 0, 2, MATRIX)
        numbers = tl.join(numbers, _every(words, zero, scale, 1, 2, MATRIX))
    else:
        numbers = _every_second(words, zero, scale, 0, MATRIX)
        numbers = tl.join(numbers, _every_second(words, zero, scale, 1, MATRIX))
    inputs: tl.constexpr = STEP_GROUPS * GROUP_ROWS * values
    weights = tl.trans(tl.reshape(numbers, [outputs.shape[0], inputs]))
    if MATRIX.scales_sums:
        products = _multiply(x, weights, tl.zeros_like(sums), PARTS)
        sums += products * tl.trans(load_scales(address, outputs, group, MATRIX))
        if MATRIX.offset == "minimum":
            of_inputs = tl.sum(x.to(tl.float32), axis=1)[:, None]
            sums -= of_inputs * tl.trans(load_minimums(address, outputs, group, MATRIX))
        return sums
    else:
        return _multiply(x, weights, sums, PARTS)


@triton.jit
def gate_up_many(hidden, order, blocks, num_blocks, table, inner,
                 GATE: tl.constexpr, UP: tl.constexpr, ACTIVATION: tl.constexpr,
                 GATE_BIAS: tl.constexpr, UP_BIAS: tl.constexpr, TOP_K: tl.constexpr,
                 INNER_STRIDE: tl.constexpr, PARTS: tl.constexpr,
                 ROWS: tl.constexpr, OUTPUTS: tl.constexpr, STEP_GROUPS: tl.constexpr,
                 GROUP_ROWS: tl.constexpr):  # fmt: skip
    """Gate, up, and the activation between: ``inner[pair]``, for a block of one expert's pairs.

    Args:
        hidden: ``[tokens, inputs]``.
        order: See ``plan_blocks``, as ``blocks``.
        blocks: See ``order``.
        num_blocks: How many.
        table: ``[experts]`` int64 addresses, 0 where an expert is not resident.
        inner: ``[pairs, INNER_STRIDE]``.
        GATE: The gate matrix; None where there is none.
        UP: The up matrix.
        ACTIVATION: See ``activate``.
        GATE_BIAS: See ``add_bias``, as ``UP_BIAS``.
        UP_BIAS: See ``GATE_BIAS``.
        TOP_K: Experts of a token.
        INNER_STRIDE: Elements from a row of ``inner`` to the next.
        PARTS: How many bfloat16 an element of ``hidden`` is the sum of.
        ROWS: Rows of a block.
        OUTPUTS: Outputs of a program.
        STEP_GROUPS: See ``load_words``, as ``GROUP_ROWS``.
        GROUP_ROWS: See ``STEP_GROUPS``.
    """
    block = tl.program_id(0)
    expert = tl.load(blocks + block)
    if expert < 0:
        return
    address = expert_address(table, expert)
    if address == 0:
        return
    place = tl.load(blocks + num_blocks + block) + tl.arange(0, ROWS)
    is_row = place < tl.load(blocks + 2 * num_blocks + block)
    pair = tl.load(order + place, mask=is_row, other=0).to(tl.int64)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    inputs: tl.constexpr = STEP_GROUPS * GROUP_ROWS * UP.values_per_word
    x_rows = hidden + (pair // TOP_K)[:, None] * UP.inputs
    up = tl.zeros([ROWS, OUTPUTS], tl.float32)
    gate = up
    for step in range(UP.padded_inputs // inputs):
        k = step * inputs + tl.arange(0, inputs)
        inside = is_row[:, None] & (k < UP.inputs)[None, :]
        x = tl.load(x_rows + k[None, :], mask=inside, other=0.0)
        up = _step(up, x, address, outputs, step, UP, PARTS, STEP_GROUPS, GROUP_ROWS)
        if GATE is not None:
            gate = _step(gate, x, address, outputs, step, GATE, PARTS, STEP_GROUPS, GROUP_ROWS)
    up = add_bias(scale_outputs(up, address, outputs, UP), address, outputs, UP_BIAS, UP)
    if GATE is not None:
        gate = scale_outputs(gate, address, outputs, GATE)
        gate = add_bias(gate, address, outputs, GATE_BIAS, GATE)
    else:
        gate = up
    result = activate(gate, up, ACTIVATION)
    target = inner + pair[:, None] * INNER_STRIDE + outputs[None, :]
    inside = is_row[:, None] & (outputs < UP.outputs)[None, :]
    tl.store(target, to_type(result, inner.dtype.element_ty), mask=inside)


@triton.jit
def down_many(inner, order, blocks, num_blocks, table, expert_outputs,
              DOWN: tl.constexpr, DOWN_BIAS: tl.constexpr, INNER_STRIDE: tl.constexpr,
              PARTS: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
              STEP_GROUPS: tl.constexpr, GROUP_ROWS: tl.constexpr):  # fmt: skip
    """The down projection: ``expert_outputs[pair]``, ``[pairs, outputs]`` float32, not weighted.

    See ``gate_up_many`` for the other arguments.
    """
    block = tl.program_id(0)
    expert = tl.load(blocks + block)
    if expert < 0:
        return
    address = expert_address(table, expert)
    if address == 0:
        return
    place = tl.load(blocks + num_blocks + block) + tl.arange(0, ROWS)
    is_row = place < tl.load(blocks + 2 * num_blocks + block)
    pair = tl.load(order + place, mask=is_row, other=0).to(tl.int64)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    inputs: tl.constexpr = STEP_GROUPS * GROUP_ROWS * DOWN.values_per_word
    x_rows = inner + pair[:, None] * INNER_STRIDE
    sums = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for step in range(DOWN.padded_inputs // inputs):
        k = step * inputs + tl.arange(0, inputs)
        inside = is_row[:, None] & (k < DOWN.inputs)[None, :]
        x = tl.load(x_rows + k[None, :], mask=inside, other=0.0)
        sums = _step(sums, x, address, outputs, step, DOWN, PARTS, STEP_GROUPS, GROUP_ROWS)
    result = scale_outputs(sums, address, outputs, DOWN)
    result = add_bias(result, address, outputs, DOWN_BIAS, DOWN)
    target = expert_outputs + pair[:, None] * DOWN.outputs + outputs[None, :]
    inside = is_row[:, None] & (outputs < DOWN.outputs)[None, :]
    tl.store(target, result, mask=inside)
