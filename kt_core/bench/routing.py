"""Which experts the tokens of successive calls go to, so that their weights come from memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Call:
    """Where the tokens of one call go.

    Attributes:
        layer: Which layer it is for.
        expert_ids: ``[tokens, top_k]`` int64, no expert twice in a row.
        weights: ``[tokens, top_k]`` float32, of sum 1.
        num_active: Number of distinct experts.
    """

    layer: int
    expert_ids: torch.Tensor
    weights: torch.Tensor
    num_active: int


class Routing:
    """Random routing whose experts come round as late as possible.

    Each token draws its experts at random, so as many tokens meet as they would in a model. Which
    experts these are is decided by a walk round a random order of the layer's experts: a call takes
    those that have not been read for the longest time.
    """

    def __init__(self, num_experts: int, top_k: int, layers: int, *, seed: int = 0) -> None:
        """Start with the first layer; successive calls go through the layers in turn."""
        self._generator = torch.Generator().manual_seed(seed)
        self._num_experts, self._top_k = num_experts, top_k
        self._order = [self._shuffled() for _ in range(layers)]
        self._next = [0] * layers
        self._layer = 0

    def next_call(self, tokens: int) -> Call:
        """Return the next call, of that many tokens."""
        layer, self._layer = self._layer, (self._layer + 1) % len(self._order)
        shape = tokens, self._num_experts
        drawn = torch.rand(shape, generator=self._generator).argsort(dim=1)[:, : self._top_k]
        is_drawn = torch.zeros(self._num_experts, dtype=torch.int64).index_fill_(
            0, drawn.flatten(), 1
        )
        num_active, first = int(is_drawn.sum()), self._next[layer]
        walk = (is_drawn.cumsum(0) - 1 + first) % self._num_experts  # of those that are drawn
        self._next[layer] = (first + num_active) % self._num_experts
        weights = torch.rand(tokens, self._top_k, generator=self._generator) + 0.1
        return Call(
            layer=layer,
            expert_ids=self._order[layer][walk[drawn]],
            weights=weights / weights.sum(1, keepdim=True),
            num_active=num_active,
        )

    def _shuffled(self) -> torch.Tensor:
        return torch.randperm(self._num_experts, generator=self._generator)
