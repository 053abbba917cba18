"""Keep the attention cache of a conversation: its next turn then computes only what is new."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kt_core.engine.decode_cache import DecodeCache


class PrefixCache:
    """The cache of one finished sequence. Whoever takes it out owns it: streams never share one.

    Only plain attention caches are kept: they can be cut back to any length and be continued by
    more than one token. Recurrent and compressed states cannot, and models that have them compute
    every turn from its first token.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._tokens: list[int] = []
        self._cache: Any = None

    def take(self, prompt: Sequence[int]) -> tuple[Any, int]:
        """Return a cache for the beginning of ``prompt`` and how many tokens it holds.

        At least one token is left to compute. ``(None, 0)`` where nothing can be reused; buffers
        that a graph was captured over can be, whatever they hold.
        """
        cache, tokens = self._cache, self._tokens
        self._cache, self._tokens = None, []
        if cache is None:
            return None, 0
        shared = 0
        for ours, theirs in zip(tokens, prompt[:-1], strict=False):
            if ours != theirs:
                break
            shared += 1
        if isinstance(cache, DecodeCache):
            cache.set_length(shared)
            return cache, shared
        if shared == 0:
            return None, 0
        if shared < len(tokens):
            cache.crop(shared - len(tokens))  # negative: that many from the end
        return cache, shared

    def close(self) -> None:
        """Give the memory back."""
        if isinstance(self._cache, DecodeCache):
            self._cache.drop_step()
        self._tokens, self._cache = [], None

    def put(self, tokens: Sequence[int], cache: Any) -> None:
        """Keep the cache that holds exactly these tokens, if it is one that can be continued.

        Of a ``DecodeCache`` they may be the first ones.
        """
        if isinstance(cache, DecodeCache):
            cache.set_length(len(tokens))
            self._cache, self._tokens = cache, list(tokens)
        elif isinstance(cache, DynamicCache) and all(type(x) is DynamicLayer for x in cache.layers):
            self._cache, self._tokens = cache, list(tokens)
