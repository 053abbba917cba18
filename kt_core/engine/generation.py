"""The decode loop: one prompt through the model, one token after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from kt_core.engine.decode_cache import DecodeCache
from kt_core.engine.forward_passes import ForwardPasses, context_length
from kt_core.engine.prefix_cache import PrefixCache
from kt_core.engine.sampling import Sampler
from kt_core.errors import ContextLengthError, InvalidRequestError

FinishReason = Literal["stop", "length"]

# New tokens that a cache has room for from the start: it seldom grows, and little lies idle.
_TOKENS_AHEAD = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """How to answer one prompt.

    Attributes:
        max_new_tokens: Tokens at most; None for as many as the context holds.
        temperature: 0 takes the likeliest token each time.
        top_p: Keep the likeliest tokens that together reach this probability; 1 keeps all.
        top_k: Keep that many of the likeliest tokens; 0 keeps all.
        seed: Of the dice; the same seed gives the same answer. None for a new one each time.
        stop: The text ends before the first of these strings that is complete.
    """

    max_new_tokens: int | None = 512
    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            msg = f"max_new_tokens must be >= 1, got {self.max_new_tokens}"
            raise InvalidRequestError(msg)
        if isinstance(self.stop, str):
            msg = f"stop must be a tuple of strings, got {self.stop!r}: write ({self.stop!r},)"
            raise InvalidRequestError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Where the time of one answer went.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        cached_tokens: Those of them that an earlier turn had computed already.
        new_tokens: Tokens generated.
        ttft_s: Seconds from the start of the prefill to the first token.
        decode_s: Seconds from the first token to the last.
    """

    prompt_tokens: int
    cached_tokens: int = 0
    new_tokens: int
    ttft_s: float
    decode_s: float

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens computed per second until the first new token."""
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.ttft_s if self.ttft_s > 0 else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens per second after the first; 0 where there is one only."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """One step of an answer.

    Attributes:
        token: The token; None in the last event.
        text: Text that became certain with it; often empty.
        finish_reason: Set in the last event only.
        timing: Set in the last event only.
    """

    token: int | None
    text: str
    finish_reason: FinishReason | None = None
    timing: Timing | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer.

    Attributes:
        text: Its text, before any stop string.
        token_ids: Its tokens, the end-of-sequence token not among them.
        finish_reason: ``stop`` for an end token or a stop string, ``length`` for the limit.
        timing: Where the time went.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    timing: Timing


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Return every token that ends a sequence."""
    for owner in (model.generation_config, model.config.get_text_config(decoder=True)):
        ids = getattr(owner, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids if isinstance(ids, Sequence) else [ids])
    return frozenset()


def token_budget(model: PreTrainedModel, prompt_tokens: int, wanted: int | None) -> int:
    """Return how many tokens may be generated.

    Raises:
        ContextLengthError: The prompt leaves no room.
    """
    limit = context_length(model)
    if prompt_tokens < 1:
        msg = "the prompt has no tokens; give at least one"
        raise InvalidRequestError(msg)
    if limit is None:
        return wanted if wanted is not None else 2**31
    if prompt_tokens >= limit:
        msg = (
            f"the prompt has {prompt_tokens} tokens, the model's context holds {limit}: "
            f"shorten it by at least {prompt_tokens - limit + 1}"
        )
        raise ContextLengthError(msg)
    return min(wanted if wanted is not None else limit, limit - prompt_tokens)


class TokenStream:
    """Iterates over the tokens of one answer; then ``timing`` and ``finish_reason`` are set."""

    def __init__(
        self,
        model: PreTrainedModel,
        prompt: Sequence[int],
        options: GenerationOptions,
        prefixes: PrefixCache | None = None,
        after_step: Callable[[int, float], None] | None = None,
        *,
        passes: ForwardPasses | None = None,
    ) -> None:
        """Check the request.

        Args:
            model: The model.
            prompt: Its tokens.
            options: How to answer.
            prefixes: Where the cache of an earlier turn may be.
            after_step: Told of each forward pass, its tokens and its seconds.
            passes: Calls the model; None for eager passes.

        Raises:
            ContextLengthError: The prompt is too long.
            InvalidRequestError: An option is out of range.
        """
        self._prompt = list(prompt)
        self._budget = token_budget(model, len(self._prompt), options.max_new_tokens)
        self._sampler = Sampler(
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            seed=options.seed,
        )
        self._end = end_tokens(model)
        self._prefixes = prefixes or PrefixCache()
        self._after_step = after_step
        self._passes = passes or ForwardPasses(model)
        self.finish_reason: FinishReason = "length"
        self.timing = Timing(prompt_tokens=len(self._prompt), new_tokens=0, ttft_s=0, decode_s=0)

    def __iter__(self) -> Generator[int, None, None]:
        """Yield one token after the other, without the end token."""
        start = time.perf_counter()
        first_token_s = 0.0
        everything = torch.tensor([self._prompt])
        cache, computed = self._prefixes.take(self._prompt)
        cached = computed
        ahead = min(self._budget, _TOKENS_AHEAD)
        cache = self._passes.begin(len(self._prompt) + ahead, cache)
        try:
            for count in range(1, self._budget + 1):
                step = everything[:, computed:]
                if not isinstance(cache, DecodeCache):
                    computed = 0  # until the pass is through: an interrupt leaves the cache torn
                step_start = time.perf_counter()
                logits, cache = self._passes.run(step, cache)
                if self._after_step:
                    self._after_step(step.shape[1], time.perf_counter() - step_start)
                computed = everything.shape[1]
                token = self._sampler.choose(logits, everything)
                now = time.perf_counter() - start
                first_token_s = first_token_s or now
                self.timing = Timing(
                    prompt_tokens=len(self._prompt),
                    cached_tokens=cached,
                    new_tokens=count,
                    ttft_s=first_token_s,
                    decode_s=now - first_token_s,
                )
                if token in self._end:
                    self.finish_reason = "stop"
                    return
                everything = torch.cat([everything, torch.tensor([[token]])], dim=1)
                yield token
        except Exception:
            computed = 0  # what failed may have left anything behind
            raise
        finally:
            if computed:
                self._prefixes.put(everything[0, :computed].tolist(), cache)
