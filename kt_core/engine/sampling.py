"""Choose the next token. Filters are transformers' own; the dice are the request's."""

from __future__ import annotations

import math
from typing import cast

import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kt_core.errors import InvalidRequestError


class Sampler:
    """Greedy at temperature 0, else temperature, then top-k, then top-p."""

    def __init__(self, *, temperature: float, top_p: float, top_k: int, seed: int | None) -> None:
        """Take the parameters; ``seed`` None means one from the operating system.

        Raises:
            InvalidRequestError: A parameter is out of its range.
        """
        if not 0 <= temperature < math.inf:
            msg = f"temperature must be >= 0 and finite, got {temperature}"
            raise InvalidRequestError(msg)
        if not 0 < top_p <= 1:
            msg = f"top_p must be within (0, 1], got {top_p}"
            raise InvalidRequestError(msg)
        if top_k < 0:
            msg = f"top_k must be >= 0 (0: no limit), got {top_k}"
            raise InvalidRequestError(msg)
        if seed is not None and not 0 <= seed < 2**63:
            msg = f"seed must be within 0..2**63-1, got {seed}"
            raise InvalidRequestError(msg)
        self._is_greedy = temperature == 0
        self._filters = LogitsProcessorList()
        if not self._is_greedy:
            self._filters.append(TemperatureLogitsWarper(float(temperature)))
        if top_k > 0:
            self._filters.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self._filters.append(TopPLogitsWarper(float(top_p)))
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def choose(self, logits: torch.Tensor, token_ids: torch.Tensor) -> int:
        """Return the next token.

        Args:
            logits: ``[vocabulary]`` of the last position, any floating type.
            token_ids: ``[1, length]``, everything so far.
        """
        if self._is_greedy:
            # As float32, which keeps their order: five times as fast as torch's argmax of bfloat16.
            return int(logits.float().argmax())
        scores: torch.Tensor = self._filters(
            cast("torch.LongTensor", token_ids), logits.float()[None].cpu()
        )
        probabilities = torch.softmax(scores[0], dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))
