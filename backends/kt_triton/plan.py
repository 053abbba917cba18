"""Many tokens: which pairs of token and expert are computed together. No host, no atomics.

Pairs are sorted by expert and cut into blocks of ``BLOCK`` rows, each of one expert. Expert e, with
``before`` pairs ahead of its own, has the blocks from ``before // BLOCK + e`` on: as many as it can
need, wherever the others' are, so that each program works out its part alone. There are at most
``pairs // BLOCK + NUM_EXPERTS`` blocks; those left over are empty.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def plan_blocks(expert_ids, order, blocks, pairs, num_blocks,
                NUM_EXPERTS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """Sort, stably, and write the blocks: one program for each expert, one for no expert's pairs.

    Args:
        expert_ids: ``[pairs]`` integers.
        order: ``[pairs]`` int32: receives the pairs, sorted by expert.
        blocks: ``[3, num_blocks]`` int32: receives expert (-1 for none), first and last row, which
            are places in ``order``.
        pairs: How many.
        num_blocks: How many.
        NUM_EXPERTS: Of the layer.
        BLOCK: Rows of a block.
        CHUNK: Pairs looked at together.
    """
    mine = tl.program_id(0)
    before = 0
    count = 0
    for start in range(0, pairs, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        expert = tl.load(expert_ids + pair, mask=pair < pairs, other=-1)
        is_known = (expert >= 0) & (expert < NUM_EXPERTS)
        before += tl.sum((is_known & (expert < mine)).to(tl.int32), axis=0)
        count += tl.sum((is_known & (expert == mine)).to(tl.int32), axis=0)
    if mine == NUM_EXPERTS:
        end = num_blocks
    else:
        end = (before + count) // BLOCK + mine + 1
    for block in range(before // BLOCK + mine, end):
        first = before + (block - (before // BLOCK + mine)) * BLOCK
        is_used = first < before + count
        tl.store(blocks + block, tl.where(is_used, mine, -1))
        tl.store(blocks + num_blocks + block, first)
        tl.store(blocks + 2 * num_blocks + block, before + count)
    if count == 0:
        return
    for start in range(0, pairs, CHUNK):
        pair = start + tl.arange(0, CHUNK)
        expert = tl.load(expert_ids + pair, mask=pair < pairs, other=-1)
        is_mine = (expert == mine).to(tl.int32)
        place = before + tl.cumsum(is_mine, axis=0) - 1
        tl.store(order + place, pair, mask=is_mine != 0)
        before += tl.sum(is_mine, axis=0)
