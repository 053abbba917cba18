"""A packed dense layer, ``x W^T + b``: the products of experts without a plan.

Rows come in order, all of them meet one matrix, and results are stored in the type of rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kt_triton.few_tokens import dot
from kt_triton.products import product
from kt_triton.tiles import add_bias, to_type


@triton.jit
def _outputs(number, OUTPUTS: tl.constexpr, MATRIX: tl.constexpr):
    """Return the outputs of a program: of 64 bits where bytes are too many to be counted with 32.

    An expert never has so many; an output head has.
    """
    outputs = number * OUTPUTS + tl.arange(0, OUTPUTS)
    if MATRIX.panels * MATRIX.stride >= 2147483648:
        return outputs.to(tl.int64)
    else:
        return outputs


# Every number of rows is served by the same code: a prompt compiles nothing.
@triton.jit(do_not_specialize=["num_rows"])
def linear(x, packed, out, num_rows, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
           PARTS: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
           STEP_GROUPS: tl.constexpr, GROUP_ROWS: tl.constexpr):  # fmt: skip
    """Blocks of rows, on the matrix units.

    Args:
        x: ``[num_rows, inputs]``.
        packed: The layer's first byte.
        out: ``[num_rows, outputs]``.
        num_rows: At least 1.
        WEIGHT: The matrix.
        BIAS: See ``add_bias``.
        PARTS: How many bfloat16 an element of ``x`` is the sum of.
        ROWS: Rows of a block.
        OUTPUTS: Outputs of a program.
        STEP_GROUPS: See ``load_words``, as ``GROUP_ROWS``.
        GROUP_ROWS: See ``STEP_GROUPS``.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    outputs = _outputs(tl.program_id(1), OUTPUTS, WEIGHT)
    x_rows = x + row[None, :] * WEIGHT.inputs
    result = product(x_rows, is_row, packed, outputs, WEIGHT, BIAS, PARTS, STEP_GROUPS, GROUP_ROWS)
    target = out + row[:, None] * WEIGHT.outputs + outputs[None, :]
    result = tl.trans(to_type(result, out.dtype.element_ty))
    tl.store(target, result, mask=is_row[:, None] & (outputs < WEIGHT.outputs)[None, :])


@triton.jit
def linear_few(x, packed, out, WEIGHT: tl.constexpr, BIAS: tl.constexpr, OUTPUTS: tl.constexpr,
               STEP_GROUPS: tl.constexpr, GROUP_ROWS: tl.constexpr):  # fmt: skip
    """Each row by itself, as ``few_tokens`` does it; see ``linear`` for the arguments."""
    row = tl.program_id(0).to(tl.int64)
    outputs = _outputs(tl.program_id(1), OUTPUTS, WEIGHT)
    result = dot(x + row * WEIGHT.inputs, packed, outputs, WEIGHT, STEP_GROUPS, GROUP_ROWS)
    result = add_bias(result, packed, outputs, BIAS, WEIGHT)
    target = out + row * WEIGHT.outputs + outputs[:, None]
    tl.store(
        target, to_type(result, out.dtype.element_ty), mask=(outputs < WEIGHT.outputs)[:, None]
    )
