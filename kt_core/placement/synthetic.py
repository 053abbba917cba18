"""Traces that no model made, for what recorded ones cannot show: known popularity, known shifts."""

from __future__ import annotations

import itertools

import numpy as np

from kt_core.interfaces import ExpertGrid
from kt_core.placement.trace import RoutingTrace


def zipf_trace(
    grid: ExpertGrid,
    *,
    top_k: int,
    tokens: int,
    exponent: float,
    seed: int,
    shifts: int = 0,
    prompt_tokens: int = 0,
    expert_weights: int = 1,
) -> RoutingTrace:
    """Draw experts independently, by Zipf's law: the r-th most popular has weight ``r^-exponent``.

    Which expert has which rank is drawn for each layer, and anew at each shift. A token takes
    ``top_k`` different experts of a layer (drawn without replacement: Gumbel's trick, Kool 2019,
    arXiv:1903.06059).

    Args:
        grid: Layers and experts.
        top_k: Experts of a token, at most those of the narrowest layer.
        tokens: How many in all.
        exponent: 0 for experts that are used alike; the larger, the more uneven.
        seed: Of the dice.
        shifts: How often popularity changes all at once, at even distances.
        prompt_tokens: Tokens of a prefill before the decode steps of each part between shifts.
        expert_weights: Elements of one expert.
    """
    generator = np.random.default_rng(seed)
    ends = np.linspace(0, tokens, shifts + 2).astype(int)
    ids = np.empty((tokens, grid.num_layers, top_k), dtype=np.uint16)
    step_tokens: list[int] = []
    is_decode: list[int] = []
    prompt_steps: list[int] = []
    for start, stop in itertools.pairwise(ends):
        for layer, count in enumerate(grid.num_experts):
            ranks = generator.permutation(count) + 1.0
            keys = -exponent * np.log(ranks) + generator.gumbel(size=(stop - start, count))
            ids[start:stop, layer] = np.argpartition(-keys, top_k - 1, axis=1)[:, :top_k]
        prompt = min(prompt_tokens, stop - start)
        prompt_steps.append(len(step_tokens))
        step_tokens += [prompt] * (prompt > 0) + [1] * (stop - start - prompt)
        is_decode += [0] * (prompt > 0) + [1] * (stop - start - prompt)
    return RoutingTrace(
        model=f"synthetic: Zipf exponent {exponent:g}, {shifts} shifts, seed {seed}",
        grid=grid,
        expert_weights=(expert_weights,) * grid.num_layers,
        dense_bytes=0,
        expert_ids=ids,
        step_tokens=np.array(step_tokens, dtype=np.int64),
        step_is_decode=np.array(is_decode, dtype=np.uint8),
        prompt_steps=np.array(prompt_steps, dtype=np.int64),
    )
