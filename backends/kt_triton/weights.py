"""The weights of a tile as the bfloat16 that a matrix unit multiplies, exactly.

Each word is taken apart by itself and its inputs are joined in their order, so that a thread that
has a word has neighbours of one output: what a matrix unit wants of its left operand.

NVIDIA's processors compute with two bfloat16 in a register. There weights are taken apart two at a
time, without a way by float32: two or three instructions for a weight, not five or more.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import target_info

from kt_triton.tiles import INTERPRETED, decode

# Pairs of bfloat16. The seven bits of fraction of 128 are the numbers 0..127, added to 128.
_128 = tl.constexpr(0x43004300)
_MINUS_128 = tl.constexpr(-0x3CFF3D00)  # 0xC300C300 as int32
_MINUS_136 = tl.constexpr(-0x3CF73CF8)
_MINUS_256 = tl.constexpr(-0x3C7F3C80)
_ONE = tl.constexpr(0x3F803F80)
_MINUS_0 = tl.constexpr(-0x7FFF8000)
_SIGNS = tl.constexpr(-0x7FFF8000)
# What bits of e2m1 and e4m3 that were moved to bfloat16's places lack, for its larger bias.
_2_TO_126 = tl.constexpr(0x7E807E80)
_2_TO_120 = tl.constexpr(0x7B807B80)


@triton.jit
def weights_of(words, zero, scale, MATRIX: tl.constexpr):
    """Return the inputs of words in order, bfloat16, along axes that are added behind.

    Args:
        words: int32.
        zero: Zero points, float32, where the format has them; broadcast.
        scale: Float32, where the format's scales are folded into weights; broadcast.
        MATRIX: The matrix.
    """
    if MATRIX.element == "bf16":
        return tl.join(_lower(words), _upper(words))
    elif not INTERPRETED and target_info.is_cuda():
        if MATRIX.element == "int8":
            return _in_order_of_4(_int8_pair(words, 0x4140), _int8_pair(words, 0x4342))
        elif MATRIX.element == "fp8":
            front = _scaled(_fp8_pair(words << 8, words << 4), scale, MATRIX)
            return _in_order_of_4(front, _scaled(_fp8_pair(words, words >> 4), scale, MATRIX))
        elif MATRIX.element == "int4":
            return _int4(words, zero, MATRIX)
        else:
            return _fp4(words, scale, MATRIX)
    elif MATRIX.values_per_word == 4:
        even = _two(words, zero, scale, 0, 2, MATRIX)
        return tl.join(even, _two(words, zero, scale, 1, 2, MATRIX))
    else:
        even = _four(words, zero, scale, 0, MATRIX)
        return tl.join(even, _four(words, zero, scale, 1, MATRIX))


@triton.jit
def _weight(words, zero, scale, VALUE: tl.constexpr, MATRIX: tl.constexpr):
    """One of the inputs of each word."""
    number = decode(words, VALUE, zero, MATRIX)
    if MATRIX.folds_scale:
        number *= scale
    return number.to(tl.bfloat16)


@triton.jit
def _two(words, zero, scale, VALUE: tl.constexpr, DISTANCE: tl.constexpr, MATRIX: tl.constexpr):
    """Two inputs of each word, ``DISTANCE`` apart."""
    first = _weight(words, zero, scale, VALUE, MATRIX)
    return tl.join(first, _weight(words, zero, scale, VALUE + DISTANCE, MATRIX))


@triton.jit
def _four(words, zero, scale, VALUE: tl.constexpr, MATRIX: tl.constexpr):
    """The four even or the four odd inputs of each word, in their order."""
    low = _two(words, zero, scale, VALUE, 4, MATRIX)
    return tl.join(low, _two(words, zero, scale, VALUE + 2, 4, MATRIX))


# From here on int32 are pairs of bfloat16, the first input in the lower half.


@triton.jit
def _lower(pair):
    return pair.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _upper(pair):
    return (pair >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _in_order_of_4(a, b):
    """Pairs of inputs 0 and 1, 2 and 3."""
    return tl.join(tl.join(_lower(a), _lower(b)), tl.join(_upper(a), _upper(b)))


@triton.jit
def _in_order_of_8(a, b, c, d):
    """Pairs of inputs 0 and 1, 2 and 3, 4 and 5, 6 and 7."""
    even = tl.join(tl.join(_lower(a), _lower(c)), tl.join(_lower(b), _lower(d)))
    odd = tl.join(tl.join(_upper(a), _upper(c)), tl.join(_upper(b), _upper(d)))
    return tl.join(even, odd)


@triton.jit
def _multiply_add(a, b, c):
    """``a * b + c``, rounded once."""
    return tl.inline_asm_elementwise(
        "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c],
        dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _and_or(bits, mask, others):
    """``(bits & mask) | others``, which the compiler would make two instructions of."""
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [bits, mask, others],
        dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _bytes(words, CHOICE: tl.constexpr):
    """Put two bytes of a word, or zeros for byte 4, where ``CHOICE`` says: the lowest first."""
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, 0, $2;", "=r,r,r", [words, CHOICE], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _int4(words, zero, MATRIX: tl.constexpr):
    if MATRIX.offset == "none":
        offset = _MINUS_136
    elif MATRIX.offset == "minimum":
        offset = _MINUS_128
    else:
        code = zero.to(tl.int32)
        offset = code | (code << 16) | _MINUS_128
    # The low nibbles of bytes are inputs 0 to 3, the high ones 4 to 7.
    front, back = _bytes(words, 0x4140), _bytes(words, 0x4342)
    return _in_order_of_8(
        _int4_pair(front, offset),
        _int4_pair(back, offset),
        _int4_pair(front >> 4, offset),
        _int4_pair(back >> 4, offset),
    )


@triton.jit
def _int4_pair(nibbles, offset):
    return _multiply_add(_and_or(nibbles, 0x000F000F, _128), _ONE, offset)


@triton.jit
def _int8_pair(words, CHOICE: tl.constexpr):
    """Bytes are codes and 128: seven bits of them to 128, from which 128 or 256 is taken."""
    codes = _bytes(words, CHOICE)
    offset = tl.inline_asm_elementwise(  # (codes & 0x00800080) ^ _MINUS_256
        "lop3.b32 $0, $1, $2, $3, 0x6A;", "=r,r,r,r", [codes, 0x00800080, _MINUS_256],
        dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip
    return _multiply_add(_and_or(codes, 0x007F007F, _128), _ONE, offset)


@triton.jit
def _fp8_pair(signs, rest):
    """Sign, exponent and fraction, moved to their places; subnormals come right by themselves."""
    return _multiply_add(_and_or(signs, _SIGNS, rest & 0x07F007F0), _2_TO_120, _MINUS_0)


@triton.jit
def _fp4(words, scale, MATRIX: tl.constexpr):
    return _in_order_of_8(
        _scaled(_fp4_pair(words << 12, words << 6), scale, MATRIX),
        _scaled(_fp4_pair(words << 8, words << 2), scale, MATRIX),
        _scaled(_fp4_pair(words << 4, words >> 2), scale, MATRIX),
        _scaled(_fp4_pair(words, words >> 6), scale, MATRIX),
    )


@triton.jit
def _fp4_pair(signs, rest):
    """As ``_fp8_pair``."""
    return _multiply_add(_and_or(signs, _SIGNS, rest & 0x01C001C0), _2_TO_126, _MINUS_0)


@triton.jit
def _scaled(pair, scale, MATRIX: tl.constexpr):
    """A pair times a scale that is folded into weights: bfloat16 holds every bit of both."""
    if MATRIX.folds_scale:
        upper = scale.to(tl.int32, bitcast=True)
        both = (upper & -65536) | ((upper >> 16) & 0xFFFF)
        pair = _multiply_add(pair, both, _MINUS_0)
    return pair
