"""Send tokens through a model on the meta device, and count what that would have been.

Operators are counted as they are dispatched, the tensors of the cache are looked at afterwards: so
there is no formula here for any kind of attention, and no name of one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from kt_core.plan import CacheLayer, DenseWork

# Long enough for what is done once per call not to count, short enough for a loop over chunks.
_SHORTEST_PROBE = 512
# at::internal::GRAIN_SIZE: torch shares out what has more elements.
_PARALLEL_ELEMENTS = 32768
_MATMULS = frozenset({"mm", "addmm", "bmm", "baddbmm", "convolution", "_grouped_mm"})


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts dispatched operators, the weights that they read, and the bytes that they move."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.threaded = self.others = 0
        self.moved_bytes = 0
        self._weights = {_storage(p): p.numel() * p.element_size() for p in model.parameters()}
        self._read: set[int] = set()

    @property
    def read_bytes(self) -> int:
        """Bytes of the parameters that were read."""
        return sum(self._weights[weight] for weight in self._read)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        # A view moves nothing; its result says that it is an alias of an argument.
        is_view = any(returned.alias_info is not None for returned in func._schema.returns)
        is_large = any(leaf.numel() >= _PARALLEL_ELEMENTS for leaf in _leaves(result))
        if name in _MATMULS or (is_large and not is_view):
            self.threaded += 1
        else:
            self.others += 1
        if not is_view:
            for leaf in _leaves((args, result)):
                if _storage(leaf) not in self._weights:
                    self.moved_bytes += leaf.numel() * leaf.element_size()
                elif name != "embedding":  # reads the rows of its tokens, not the table
                    self._read.add(_storage(leaf))
        return result


class _Attention(TorchFunctionMode):
    """Takes fused attention for the one operator that it is; on meta it would be taken apart."""

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self._counter = counter
        self.flops = 0.0
        self.read_bytes = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *args: Any,
        **options: Any,
    ) -> torch.Tensor:
        del args
        pairs = query[..., 0].numel() * key.shape[-2]
        is_half = options.get("is_causal", False) and query.shape[-2] == key.shape[-2]
        self.flops += 2 * pairs * (query.shape[-1] + value.shape[-1]) / (2 if is_half else 1)
        # Heads that share keys do not share the reading of them: so torch's kernel on the CPU.
        shared = query.shape[1] // key.shape[1]
        self.read_bytes += shared * (key.nbytes + value.nbytes)
        counted = self._counter.moved_bytes, self._counter.others, self._counter.threaded
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        self._counter.moved_bytes, self._counter.others, self._counter.threaded = counted
        self._counter.threaded += 1
        return output


def _storage(tensor: torch.Tensor) -> int:
    """What a tensor shares with its views."""
    return int(tensor.untyped_storage()._cdata)


def _leaves(values: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))


class _Pass(NamedTuple):
    """What one forward pass came to."""

    counter: _Counter
    flops: float
    attention_flops: float
    attention_bytes: float

    @property
    def moved_bytes(self) -> float:
        return float(self.counter.moved_bytes)


def _decode_work(short: _Pass, long: _Pass, length: int) -> DenseWork:
    """From a token after 1 and a token after ``length`` others: a line through both."""

    def per_pair(of: Callable[[_Pass], float]) -> float:
        return max(0.0, (of(long) - of(short)) / (length - 1))

    pair_flops, pair_bytes = per_pair(lambda p: p.flops), per_pair(lambda p: p.moved_bytes)
    return DenseWork(
        token_flops=max(0.0, short.flops - pair_flops),
        pair_flops=pair_flops,
        attention_flops=per_pair(lambda p: p.attention_flops),
        attention_bytes=per_pair(lambda p: p.attention_bytes),
        token_bytes=max(0.0, short.moved_bytes - pair_bytes),
        pair_bytes=pair_bytes,
        threaded_calls=long.counter.threaded,
        other_calls=long.counter.others,
    )


def _prefill_work(first: _Pass, second: _Pass, length: int) -> DenseWork:
    """From ``length`` tokens and twice as many: ``a n + b n^2`` through both."""

    def fit(of: Callable[[_Pass], float]) -> tuple[float, float]:
        pair = max(0.0, (of(second) - 2 * of(first)) / (2 * length**2))
        return max(0.0, of(first) / length - pair * length), pair

    token_flops, pair_flops = fit(lambda p: p.flops)
    token_bytes, pair_bytes = fit(lambda p: p.moved_bytes)
    return DenseWork(
        token_flops=token_flops,
        pair_flops=pair_flops,
        attention_flops=fit(lambda p: p.attention_flops)[1],
        attention_bytes=0.0,  # read once for many tokens: the operations take longer
        token_bytes=token_bytes,
        pair_bytes=pair_bytes,
        threaded_calls=second.counter.threaded,
        other_calls=second.counter.others,
    )


class Passes:
    """Forward passes of different lengths, and what can be concluded from them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        takes = inspect.signature(model.forward).parameters
        self._last_logits_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

    def run(self) -> dict[str, Any]:
        """Return the fields of ``ModelOutline`` that only a pass shows."""
        _, cache = self._forward(1, None)
        one = _cache_layers(cache)
        short, cache = self._forward(1, cache)
        two = _cache_layers(cache)
        windows = [getattr(layer, "sliding_window", None) or 0 for layer in _layers_of(cache)]
        length = max(_SHORTEST_PROBE, 2 * max(windows, default=0))
        first, cache = self._forward(length, None)
        at_length = _cache_layers(cache)
        long, _ = self._forward(1, cache)
        second, cache = self._forward(2 * length, None)
        at_double = _cache_layers(cache)
        sizes = zip(one, two, at_length, at_double, strict=True)
        return {
            "cache": tuple(_cache_line(length, *layer) for layer in sizes),
            "decode_read_bytes": short.counter.read_bytes,
            "decode": _decode_work(short, long, length),
            "prefill": _prefill_work(first, second, length),
        }

    def _forward(self, tokens: int, cache: Any) -> tuple[_Pass, Any]:
        """Send tokens through; return what was counted, and the cache."""
        counter = _Counter(self._model)
        flops, attention = FlopCounterMode(display=False), _Attention(counter)
        with torch.no_grad(), torch.device("meta"), flops, counter, attention:
            output = self._model(
                input_ids=torch.empty(1, tokens, dtype=torch.int64),
                past_key_values=cache,
                use_cache=True,
                **self._last_logits_only,
            )
        measured = _Pass(
            counter, float(flops.get_total_flops()), attention.flops, float(attention.read_bytes)
        )
        return measured, output.past_key_values


def _layers_of(cache: Any) -> list[Any]:
    return list(getattr(cache, "layers", None) or [cache])


def _cache_layers(cache: Any) -> list[int]:
    """Return the bytes of the tensors that each layer of a cache holds."""
    return [
        sum({id(t): t.numel() * t.element_size() for t in _tensors(layer)}.values())
        for layer in _layers_of(cache)
    ]


def _tensors(value: Any, depth: int = 4) -> Iterator[torch.Tensor]:
    """Yield the tensors in an object's attributes and in containers of them."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth:
        parts: Any = ()
        if isinstance(value, Mapping):
            parts = value.values()
        elif isinstance(value, list | tuple):
            parts = value
        elif hasattr(value, "__dict__"):
            parts = vars(value).values()
        for part in parts:
            yield from _tensors(part, depth - 1)


def _cache_line(length: int, one: int, two: int, at_length: int, at_double: int) -> CacheLayer:
    late = (at_double - at_length) / length
    return CacheLayer(
        fixed_bytes=one - (two - one),
        token_bytes=two - one,
        late_fixed_bytes=at_length - late * length,
        late_token_bytes=late,
    )
