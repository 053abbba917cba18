"""Steps of a fixed shape give what eager steps give, for every family: it is what graphs replay."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from transformers import PreTrainedModel

from kt_core.engine.decode_cache import (
    DecodeCache,
    capacity_for,
    decode_cache,
    why_no_decode_cache,
)
from kt_core.engine.decode_step import DecodeStep
from kt_core.engine.prefix_cache import PrefixCache

PROMPT, STEPS = 5, 16  # past the windows and chunks of the tiny models, which are of 8 tokens
TOLERANCE = 2e-6
"""As in test_families: max|d| / max|logit| of two float32 runs that differ in the order of sums."""

FIXED = (
    "qwen3_moe",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "kimi_k25",
    "minimax_m2",
    "gpt_oss",  # every other layer sees a window
    "mixtral",
    "llama4",  # chunks
    "gemma4",  # layers that share keys and values
    "qwen3_vl_moe",  # three positions a token
)
EAGER = {
    "qwen3_next": "LinearAttentionLayer",
    "qwen3_5_moe": "LinearAttentionLayer",
    "deepseek_v32": "DynamicIndexedLayer",
    "glm_moe_dsa": "DynamicIndexedLayer",
    "deepseek_v4": "cache of fixed size",
}

Pass = Callable[[int], torch.Tensor]


def options_of(model: PreTrainedModel) -> dict[str, Any]:
    takes = inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in takes else {}


def call(model: PreTrainedModel, ids: list[int], cache: Any) -> Any:
    with torch.inference_mode():
        return model(
            input_ids=torch.tensor([ids]),
            past_key_values=cache,
            use_cache=True,
            **options_of(model),
        )


def tokens_of(model: PreTrainedModel) -> list[int]:
    ids: list[int] = tiny.sample_input_ids(model.config, length=PROMPT + STEPS)[0].tolist()
    return ids


def with_dynamic_cache(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    output = call(model, ids[:PROMPT], None)
    logits = [output.logits[0, -1]]
    for token in ids[PROMPT:]:
        output = call(model, [token], output.past_key_values)
        logits.append(output.logits[0, -1])
    return torch.stack(logits)


def read_prompt(model: PreTrainedModel, ids: list[int]) -> tuple[DecodeCache, torch.Tensor]:
    cache = decode_cache(model)
    cache.reserve(PROMPT, None)
    return cache, call(model, ids[:PROMPT], cache).logits[0, -1].clone()


def difference(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("family", FIXED)
def test_a_fixed_step_computes_what_an_eager_one_does(family: str) -> None:
    """Both over the growing buffers, against transformers' own cache."""
    model = tiny.build_tiny(family).eval()
    ids = tokens_of(model)
    want = with_dynamic_cache(model, ids)
    cache, first = read_prompt(model, ids)
    step, fixed = DecodeStep(model, options_of(model), 0), [first]
    other, first = read_prompt(model, ids)
    eager = [first]
    for token in ids[PROMPT:]:
        fixed.append(step.run(model, cache, token).clone())
        cache.set_length(cache.length + 1)
        eager.append(call(model, [token], other).logits[0, -1])
    assert difference(torch.stack(eager), want) <= TOLERANCE
    assert difference(torch.stack(fixed), want) <= TOLERANCE
    assert cache.length == other.length == len(ids)


@pytest.mark.parametrize("family", EAGER)
def test_what_is_not_plain_attention_decodes_eagerly(family: str) -> None:
    why = why_no_decode_cache(tiny.build_tiny(family))
    assert why is not None
    assert EAGER[family] in why


def test_attention_that_takes_no_mask_decodes_eagerly() -> None:
    model = tiny.build_tiny("qwen3_moe")
    assert why_no_decode_cache(model) is None
    model.config._attn_implementation = "flash_attention_2"
    why = why_no_decode_cache(model)
    assert why is not None
    assert "flash_attention_2" in why


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_growing_keeps_what_was_there(family: str) -> None:
    model = tiny.build_tiny(family).eval()
    ids = tokens_of(model)
    want = with_dynamic_cache(model, ids)
    cache, _ = read_prompt(model, ids)
    options, got = options_of(model), []
    for count, token in enumerate(ids[PROMPT:], PROMPT + 1):
        if count % 4 == 0:
            cache.reserve(cache.capacity + 1, None)
            assert cache.step is None
        if cache.step is None:
            cache.step = DecodeStep(model, options, 0)
        got.append(cache.step.run(model, cache, token).clone())
        cache.set_length(cache.length + 1)
    assert difference(torch.stack(got), want[1:]) <= TOLERANCE


def test_what_was_cut_off_is_forgotten() -> None:
    """Also when it is still in the buffers, behind the tokens that count."""
    model = tiny.build_tiny("qwen3_moe").eval()
    ids = tokens_of(model)
    want = with_dynamic_cache(model, ids)
    cache, _ = read_prompt(model, ids)
    step = DecodeStep(model, options_of(model), 0)
    for token in (7, 99, 3):
        step.run(model, cache, token)
        cache.set_length(cache.length + 1)
    prefixes = PrefixCache()
    prefixes.put([*ids[:PROMPT], 7, 99, 3], cache)
    taken, shared = prefixes.take(ids)
    assert taken is cache
    assert shared == cache.length == PROMPT
    got = [step.run(model, cache, ids[PROMPT]).clone()]
    cache.set_length(PROMPT + 1)
    got.append(call(model, [ids[PROMPT + 1]], cache).logits[0, -1])
    assert difference(torch.stack(got), want[1:3]) <= TOLERANCE


def test_buffers_are_used_again_whatever_they_hold() -> None:
    model = tiny.build_tiny("qwen3_moe").eval()
    cache, _ = read_prompt(model, tokens_of(model))
    prefixes = PrefixCache()
    prefixes.put([1, 2, 3, 4, 5], cache)
    assert prefixes.take([9, 8, 7]) == (cache, 0)
    assert cache.length == 0
    assert prefixes.take([9, 8, 7]) == (None, 0)


@pytest.mark.parametrize(
    ("tokens", "limit", "capacity"),
    [
        (1, None, 256),
        (256, None, 256),
        (257, None, 512),
        (2048, None, 2048),
        (2049, None, 4096),
        (4097, None, 6144),
        (300, 384, 384),
        (300, 100, 300),
    ],
)
def test_capacity(tokens: int, limit: int | None, capacity: int) -> None:
    assert capacity_for(tokens, limit) == capacity
