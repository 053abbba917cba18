"""The weighted sum over a token's experts, in the order in which they stand."""

from __future__ import annotations

import triton
import triton.language as tl

from kt_triton.tiles import pair_address, to_type


@triton.jit
def combine(expert_outputs, expert_ids, weights, table, out,
            NUM_EXPERTS: tl.constexpr, TOP_K: tl.constexpr, WIDTH: tl.constexpr,
            OUTPUTS: tl.constexpr):  # fmt: skip
    """``out[token] = sum_k weights[token, k] * expert_outputs[token * TOP_K + k]``.

    Rows of pairs that are not ours are not read: nobody has written them.

    Args:
        expert_outputs: ``[tokens * TOP_K, WIDTH]`` float32.
        expert_ids: ``[tokens, TOP_K]`` integers.
        weights: ``[tokens, TOP_K]`` floating point.
        table: ``[NUM_EXPERTS]`` int64 addresses, 0 where an expert is not resident.
        out: ``[tokens, WIDTH]`` of any floating type.
        NUM_EXPERTS: Of the layer.
        TOP_K: Experts of a token.
        WIDTH: The hidden size.
        OUTPUTS: Outputs of a program.
    """
    token = tl.program_id(0)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = outputs < WIDTH
    sums = tl.zeros([OUTPUTS], tl.float32)
    for k in range(TOP_K):
        pair = token * TOP_K + k
        if pair_address(table, expert_ids, pair, NUM_EXPERTS) != 0:
            weight = tl.load(weights + pair).to(tl.float32)
            row = expert_outputs + pair.to(tl.int64) * WIDTH
            sums += weight * tl.load(row + outputs, mask=inside, other=0.0)
    tl.store(
        out + token.to(tl.int64) * WIDTH + outputs, to_type(sums, out.dtype.element_ty), mask=inside
    )
