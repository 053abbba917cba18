"""The attention cache of a sequence whose steps a graph can compute: buffers with room to grow.

An eager pass sees what transformers' ``DynamicCache`` would show it, the tokens so far and no more,
as views. A step of fixed shape sees whole buffers, and where its token goes is read on the device,
as with ``StaticCache``: so it can be captured once and replayed for every token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, cache_utils
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

if TYPE_CHECKING:
    from kt_core.engine.decode_step import DecodeStep

# Buffers hold a power of two of tokens up to _STRIDE, then a multiple of it: a graph is captured
# seldom, and no more than _STRIDE tokens of memory lie idle.
_SMALLEST, _STRIDE = 256, 2048


MASKED_ATTENTION = ("sdpa", "eager")
"""What reads the mask of a step of fixed shape. Flash attention sees whole buffers."""


@dataclass(slots=True)
class _Shared:
    """What the layers of a cache have in common.

    Attributes:
        capacity: Tokens that buffers hold.
        place: ``[1]`` int64 on the device, where the next token goes, while a step of fixed shape
            is put together; else None.
    """

    capacity: int = 0
    place: torch.Tensor | None = None


class DecodeLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one layer, ``[1, heads, capacity, size]`` each.

    Attributes:
        length: Tokens it holds.
    """

    is_sliding = False  # it keeps everything; the mask of a window does the rest
    is_croppable = True

    def __init__(self, shared: _Shared) -> None:
        """Start empty; memory is taken with the first token."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.length = 0
        self._shared = shared

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take memory of the type, on the device and for the heads that the first tokens have."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = self._buffer(key_states), self._buffer(value_states)
        self.is_initialized = True

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        # Zeros, because a masked place counts for nothing only if it is no NaN.
        return like.new_zeros(*like.shape[:2], self._shared.capacity, like.shape[3])

    def fit(self) -> None:
        """Move to buffers of the shared capacity, if these are not of it."""
        for name in ("keys", "values"):
            held: torch.Tensor | None = getattr(self, name)
            if held is not None and held.shape[2] != self._shared.capacity:
                larger = self._buffer(held)
                larger[:, :, : self.length] = held[:, :, : self.length]
                setattr(self, name, larger)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append tokens, and return the keys and values that attention shall see."""
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        if (place := self._shared.place) is not None:
            self.keys.index_copy_(2, place, key_states)
            self.values.index_copy_(2, place, value_states)
            return self.keys, self.values
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys there will be, and the position of the first one."""
        if self._shared.place is not None:
            return self._shared.capacity, 0
        return self.length + query_length, 0

    def get_seq_length(self) -> Any:
        """Return the tokens it holds: a number, or a tensor of it in a step of fixed shape."""
        return self.length if self._shared.place is None else self._shared.place[0]

    def get_max_length(self) -> int:
        """Return -1: it grows."""
        return -1

    def reset(self) -> None:
        """Forget all tokens."""
        self.length = 0


class DecodeCache(Cache):
    """The cache of one sequence, and the step that was captured over its buffers.

    Whoever calls the model makes room first: see ``reserve``.

    Attributes:
        step: The step of fixed shape over these buffers; None before the first, and after they
            have grown.
    """

    def __init__(self, layers: Sequence[Any], shared: _Shared) -> None:
        """Made by ``decode_cache``."""
        super().__init__(layers=list(layers))
        self.step: DecodeStep | None = None
        self._shared = shared
        self._is_fitting = False  # buffers may be of several capacities

    @property
    def is_compileable(self) -> bool:
        """Whether a step of fixed shape is being put together: masks must then be tensors."""
        return self._shared.place is not None

    @property
    def length(self) -> int:
        """Tokens it holds."""
        return next((layer.length for layer in self._growing()), 0)

    @property
    def capacity(self) -> int:
        """Tokens it has room for."""
        return self._shared.capacity

    def set_length(self, tokens: int) -> None:
        """Forget what comes behind so many tokens, or count what a step has added."""
        for layer in self._growing():
            layer.length = tokens

    def reserve(self, tokens: int, limit: int | None) -> None:
        """Make room for so many tokens in all. The captured step goes if buffers have to grow.

        Args:
            tokens: Of the sequence.
            limit: More than these it will never hold; None where nobody knows.

        Raises:
            torch.OutOfMemoryError: There is no memory for it. A smaller number may be asked for.
        """
        if tokens <= self._shared.capacity and not self._is_fitting:
            return
        self.drop_step()
        self._is_fitting = True
        self._shared.capacity = capacity_for(tokens, limit)
        for layer in self._growing():
            layer.fit()
        self._is_fitting = False

    def drop_step(self) -> None:
        """Give the captured step's memory back; the tokens stay."""
        step, self.step = self.step, None
        if step is not None:
            step.close()

    @contextmanager
    def fixed(self, place: torch.Tensor) -> Iterator[None]:
        """Within the block, a pass has a fixed shape.

        Args:
            place: ``[1]`` int64 on the device: where its token goes, and how many are before it.
        """
        self._shared.place = place
        try:
            yield
        finally:
            self._shared.place = None

    def _growing(self) -> Iterator[DecodeLayer]:
        return (layer for layer in self.layers if isinstance(layer, DecodeLayer))


def capacity_for(tokens: int, limit: int | None) -> int:
    """Return how many tokens buffers hold that must hold so many."""
    if tokens > _STRIDE:
        capacity = -(-tokens // _STRIDE) * _STRIDE
    else:
        capacity = max(_SMALLEST, 1 << (tokens - 1).bit_length())
    return capacity if limit is None else max(tokens, min(capacity, limit))


def attention_of(model: PreTrainedModel) -> str:
    """Return the name of a model's attention, as ``attn_implementation`` of transformers has it."""
    return str(model.config.get_text_config(decoder=True)._attn_implementation)


def why_no_decode_cache(model: PreTrainedModel) -> str | None:
    """Return why a model's steps cannot have a fixed shape, or None if they can."""
    kind = model.config.model_type
    # What a model's authors say of StaticCache holds here: a step of fixed shape does the same.
    if not getattr(model, "_can_compile_fullgraph", False):
        return f"transformers does not run {kind!r} with a cache of fixed size"
    if (attention := attention_of(model)) not in MASKED_ATTENTION:
        return f"attention {attention!r} takes no mask for what a buffer does not hold yet"
    others = {type(layer).__name__ for layer in _layers_of(model)} - _PLAIN
    if others:
        return f"{kind!r} keeps something else than keys and values ({', '.join(sorted(others))})"
    return None


def decode_cache(model: PreTrainedModel) -> DecodeCache:
    """Make an empty cache for a model that ``why_no_decode_cache`` has nothing against."""
    shared = _Shared()
    layers = [
        DecodeLayer(shared) if isinstance(layer, DynamicLayer) else layer
        for layer in _layers_of(model)
    ]
    return DecodeCache(layers, shared)


# Of layers that keep nothing, transformers has a class since 5.23; before, it leaves them out.
_NOTHING: tuple[type, ...] = tuple(filter(None, [getattr(cache_utils, "DummyLayer", None)]))
_PLAIN = {kind.__name__ for kind in (DynamicLayer, DynamicSlidingWindowLayer, *_NOTHING)}


def _layers_of(model: PreTrainedModel) -> list[Any]:
    layers: list[Any] = DynamicCache(config=model.config).layers
    return layers
