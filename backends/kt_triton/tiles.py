"""How packed bytes become numbers: the one loader that every kernel reads weights through.

A tile is ``[outputs, groups, rows]`` words of four bytes: a few consecutive inputs each,
``values_per_word`` of them. Which bits are whose is what csrc/format/ says, element by element.
Outputs come first because inputs then come last when words are taken apart: a thread that has a
word has neighbours in the order of a product's shared memory.
Formats are constants of compilation: what a format does not have costs nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

# Fixed when the kernels are defined, as it is by triton.jit itself.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))

# 2^23 + n has n in its last bits, for every n < 2^23.
_MAGIC_BITS = tl.constexpr(0x4B000000)
_MAGIC = tl.constexpr(8388608.0)


@triton.jit
def expert_address(table, expert):
    """Return where a packed expert lies; 0 where it is not resident."""
    return tl.load(table + expert)


@triton.jit
def pair_address(table, expert_ids, pair, NUM_EXPERTS: tl.constexpr):
    """Return where the expert of a pair lies; 0 for a pair that is not ours."""
    expert = tl.load(expert_ids + pair)
    is_known = (expert >= 0) & (expert < NUM_EXPERTS)
    # As int32: an offset of eight bits would count from -128.
    address = expert_address(table, tl.where(is_known, expert, 0).to(tl.int32))
    return tl.where(is_known, address, 0)


@triton.jit
def _pointer(address, TYPE: tl.constexpr):
    """An address, or a pointer to bytes, as one to a row of 64 bytes: so 16 are read at once."""
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)), 64)


@triton.jit
def _word_shift(value, MATRIX: tl.constexpr):
    """By how many bits the ``value``-th input of a word is shifted."""
    if MATRIX.element == "bf16":
        return value * 16
    elif MATRIX.element == "int8":
        return value * 8
    elif MATRIX.element == "int4":  # low nibbles first, then high ones
        return (value & 3) * 8 + (value >> 2) * 4
    elif MATRIX.element == "fp8":  # even inputs in the low half
        return (value >> 1) * 8 + (value & 1) * 16
    else:
        return (value >> 1) * 4 + (value & 1) * 16


@triton.jit
def _small_float(bits, SIGN: tl.constexpr, MANTISSA: tl.constexpr, FACTOR: tl.constexpr):
    """A float8 or float4 by way of float16, which has its subnormals: its bits, moved up.

    Portable, where types of eight bits are not: an sm_80 has no e4m3, a gfx942 another one.
    """
    sign = (bits & (1 << SIGN)) << (15 - SIGN)
    magnitude = (bits & ((1 << SIGN) - 1)) << (10 - MANTISSA)
    half = (sign | magnitude).to(tl.uint16).to(tl.float16, bitcast=True)
    return half.to(tl.float32) * FACTOR


@triton.jit
def decode(words, value, zero, MATRIX: tl.constexpr):
    """Return the ``value``-th inputs of words as float32, unscaled, less their zero point.

    Args:
        words: int32.
        value: Which of the inputs of a word: an int, or a tensor that is broadcast.
        zero: Zero points, float32, where the format has them.
        MATRIX: The matrix.
    """
    bits = words >> _word_shift(value, MATRIX)
    if MATRIX.element == "bf16":
        return (bits << 16).to(tl.float32, bitcast=True)
    elif MATRIX.element == "fp8":
        return _small_float(bits & 255, 7, 3, 256.0)
    elif MATRIX.element == "fp4":
        return _small_float(bits & 15, 3, 1, 16384.0)
    elif MATRIX.element == "int8":
        code = ((bits & 255) | _MAGIC_BITS).to(tl.float32, bitcast=True)
        return code - (_MAGIC + 128.0)
    else:
        code = ((bits & 15) | _MAGIC_BITS).to(tl.float32, bitcast=True)
        if MATRIX.offset == "none":
            return code - (_MAGIC + 8.0)
        elif MATRIX.offset == "zero_point":
            return code - (zero + _MAGIC)
        else:
            return code - _MAGIC


@triton.jit
def _panel(outputs, SIZE: tl.constexpr, MATRIX: tl.constexpr):
    """First element of each output's panel and its lane there, in elements of ``SIZE`` bytes."""
    panel = (outputs // 16) * (MATRIX.stride // SIZE) + MATRIX.start // SIZE
    return panel + outputs % 16


@triton.jit
def _in_panel(group, SIZE: tl.constexpr, FIRST: tl.constexpr, BYTES: tl.constexpr,
              MATRIX: tl.constexpr):  # fmt: skip
    """Where a group has something of ``BYTES`` bytes, from its panel's first byte."""
    if MATRIX.is_grouped:
        block = (group // MATRIX.block_groups) * (MATRIX.block_bytes // SIZE)
        within = (group % MATRIX.block_groups) * (BYTES // SIZE)
        return block + within + (MATRIX.front + FIRST) // SIZE
    else:
        return group * 0 + (MATRIX.front + FIRST) // SIZE


@triton.jit
def _is_group(group, MATRIX: tl.constexpr):
    """Whether there is such a group: a tile may have more than are left."""
    return group * MATRIX.group < MATRIX.padded_inputs


@triton.jit
def tile_groups(step, STEP_GROUPS: tl.constexpr, GROUP_ROWS: tl.constexpr, MATRIX: tl.constexpr):
    """Return the groups of a step's tile, ``[STEP_GROUPS]``: see ``load_words``."""
    group = tl.arange(0, STEP_GROUPS)
    if MATRIX.is_grouped:
        parts: tl.constexpr = MATRIX.group // MATRIX.values_per_word // GROUP_ROWS
        return group + (step // parts) * STEP_GROUPS
    else:
        return group


@triton.jit
def load_words(
    address,
    outputs,
    step,
    STEP_GROUPS: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    MATRIX: tl.constexpr,
):
    """Return the words of one step over the inputs, ``[outputs, STEP_GROUPS, GROUP_ROWS]`` int32.

    A tile is some whole groups or a part of one.

    Args:
        address: First byte of the expert, int64, or of the dense layer, a pointer.
        outputs: Which outputs, consecutive from a multiple of 16; those beyond the last are 0.
        step: How many tiles have gone before.
        STEP_GROUPS: Groups of a tile: 1, or ``GROUP_ROWS`` covers the group.
        GROUP_ROWS: Rows of a group that the tile has.
        MATRIX: The matrix.
    """
    group = tile_groups(step, STEP_GROUPS, GROUP_ROWS, MATRIX)
    row = tl.arange(0, GROUP_ROWS)
    at = _in_panel(group, 4, MATRIX.header, MATRIX.group_bytes, MATRIX)
    rows: tl.constexpr = MATRIX.padded_inputs // MATRIX.values_per_word
    inside = (outputs < MATRIX.panels * 16)[:, None, None]
    if MATRIX.is_grouped:
        parts: tl.constexpr = MATRIX.group // MATRIX.values_per_word // GROUP_ROWS
        at += step % parts * (GROUP_ROWS * 16)
        inside = inside & (_is_group(group, MATRIX)[None, :, None] & (row >= 0)[None, None, :])
    else:
        at += step * (GROUP_ROWS * 16)
        inside = inside & (step * GROUP_ROWS + row < rows)[None, None, :]
    first = _pointer(address, tl.int32)
    lanes = _panel(outputs, 4, MATRIX)
    offsets = lanes[:, None, None] + at[None, :, None] + (row * 16)[None, None, :]
    return tl.load(first + offsets, mask=inside, other=0)


@triton.jit
def _load_scaled(address, outputs, group, FIRST: tl.constexpr, BYTES: tl.constexpr,
                 MATRIX: tl.constexpr):  # fmt: skip
    """Numbers of the scales' type: the scales or the minimums of groups, ``[outputs, groups]``."""
    inside = (outputs < MATRIX.panels * 16)[:, None] & _is_group(group, MATRIX)[None, :]
    if MATRIX.scale == "float32":
        kind: tl.constexpr = tl.float32
    elif MATRIX.scale == "bf16":
        kind: tl.constexpr = tl.int16
    elif MATRIX.scale == "float16":
        kind: tl.constexpr = tl.float16
    else:
        kind: tl.constexpr = tl.uint8
    size: tl.constexpr = kind.primitive_bitwidth // 8
    first = _pointer(address, kind)
    at = _in_panel(group, size, FIRST, BYTES, MATRIX)
    stored = tl.load(
        first + _panel(outputs, size, MATRIX)[:, None] + at[None, :], mask=inside, other=0
    )
    if MATRIX.scale == "bf16":
        return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif MATRIX.scale == "e8m0":
        return (stored.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    elif MATRIX.scale == "e4m3":  # as e5m3 of bias 10: see csrc/format/layout.hpp
        return ((stored.to(tl.int32) << 20) + (117 << 23)).to(tl.float32, bitcast=True)
    else:
        return stored.to(tl.float32)


@triton.jit
def load_scales(address, outputs, group, MATRIX: tl.constexpr):
    """Return the scales of groups, ``[outputs, groups]`` float32."""
    return _load_scaled(address, outputs, group, 0, MATRIX.scale_bytes, MATRIX)


@triton.jit
def load_minimums(address, outputs, group, MATRIX: tl.constexpr):
    """Return the minimums of groups, ``[outputs, groups]`` float32."""
    first: tl.constexpr = MATRIX.block_groups * MATRIX.scale_bytes
    return _load_scaled(address, outputs, group, first, MATRIX.offset_bytes, MATRIX)


@triton.jit
def load_zeros(address, outputs, group, MATRIX: tl.constexpr):
    """Return the zero points of groups, ``[outputs, groups]`` float32; 0 where there are none."""
    if MATRIX.offset == "zero_point":
        inside = (outputs < MATRIX.panels * 16)[:, None] & _is_group(group, MATRIX)[None, :]
        first: tl.constexpr = MATRIX.block_groups * MATRIX.scale_bytes
        at = _in_panel(group, 1, first, MATRIX.offset_bytes, MATRIX)
        start = _pointer(address, tl.uint8)
        zeros = tl.load(
            start + _panel(outputs, 1, MATRIX)[:, None] + at[None, :], mask=inside, other=0
        )
        return zeros.to(tl.float32)
    else:
        return tl.zeros([outputs.shape[0], group.shape[0]], tl.float32)


@triton.jit
def scale_outputs(sums, address, outputs, MATRIX: tl.constexpr):
    """Multiply ``[outputs, rows]`` by what an output has one scale of."""
    if MATRIX.scales_outputs:
        if MATRIX.front > 0:
            first = _pointer(address, tl.float32)
            inside = outputs < MATRIX.panels * 16
            scale = tl.load(first + _panel(outputs, 4, MATRIX), mask=inside, other=0.0)
            return sums * scale[:, None]
        else:
            return sums * load_scales(address, outputs, tl.arange(0, 1), MATRIX)
    else:
        return sums


@triton.jit
def add_bias(sums, address, outputs, START: tl.constexpr, MATRIX: tl.constexpr):
    """Add a bias to ``[outputs, rows]``; ``START`` is its first byte, -1 where there is none."""
    if START >= 0:
        first = _pointer(address, tl.float32) + START // 4
        inside = outputs < MATRIX.outputs
        return sums + tl.load(first + outputs, mask=inside, other=0.0)[:, None]
    else:
        return sums


@triton.jit
def to_type(x, TYPE: tl.constexpr):
    """Round float32 to the nearest number of a type, ties to even.

    To bfloat16 in integers, because the interpreter's own conversion cuts off.
    """
    if tl.bfloat16 == TYPE:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        is_number = x == x  # noqa: PLR0124
        x = tl.where(is_number, rounded.to(tl.float32, bitcast=True), x)
    return x.to(TYPE)
