"""The plan for many tokens: every pair of a known expert in exactly one block, in order."""

from __future__ import annotations

import pytest
import torch

from gpu.kernels import WHERE
from kt_triton.plan import plan_blocks

EXPERTS, BLOCK = 7, 4


def plan(expert_ids: torch.Tensor, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``order`` and ``blocks``, filled with rubbish before."""
    pairs = expert_ids.numel()
    num_blocks = pairs // BLOCK + EXPERTS
    order = torch.full((pairs,), 10**6, dtype=torch.int32, device=WHERE)
    blocks = torch.full((3, num_blocks), 10**6, dtype=torch.int32, device=WHERE)
    plan_blocks[(EXPERTS + 1,)](
        expert_ids.to(WHERE),
        order,
        blocks,
        pairs,
        num_blocks,
        NUM_EXPERTS=EXPERTS,
        BLOCK=BLOCK,
        CHUNK=chunk,
    )
    return order.cpu(), blocks.cpu()


@pytest.mark.parametrize("pairs", [1, 5, 63, 64, 200])
@pytest.mark.parametrize("spread", ["uniform", "one", "none", "foreign"])
def test_plan(pairs: int, spread: str) -> None:
    """Blocks cover the sorted pairs without gap or overlap; what is left over is empty."""
    generator = torch.Generator().manual_seed(pairs)
    ids = torch.randint(0, EXPERTS, (pairs,), generator=generator)
    if spread == "one":
        ids.fill_(EXPERTS - 1)
    elif spread == "none":
        ids.fill_(-1)
    elif spread == "foreign":
        ids = torch.randint(-2, EXPERTS + 2, (pairs,), generator=generator)
    order, blocks = plan(ids, chunk=64)
    rows: dict[int, list[int]] = {expert: [] for expert in range(EXPERTS)}
    for expert, first, last in blocks.T.tolist():
        assert -1 <= expert < EXPERTS
        if expert >= 0:
            assert first < last
            rows[expert] += order[first : min(first + BLOCK, last)].tolist()
    for expert, got in rows.items():
        assert got == torch.where(ids == expert)[0].tolist(), f"expert {expert}"
