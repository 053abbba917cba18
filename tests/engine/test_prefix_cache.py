"""The next turn of a conversation computes what is new, and says the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kt_core
from kt_core.engine import Completion, Engine

STORIES = Path(__file__).parents[1] / "data" / "stories-moe"
PROMPT = list(range(40, 60))
ANSWER = {"temperature": 0, "max_new_tokens": 12}


@pytest.fixture
def engine() -> Engine:
    return kt_core.load(STORIES, format="bf16", dtype=torch.float32)


def fresh(prompt: list[int]) -> Completion:
    with kt_core.load(STORIES, format="bf16", dtype=torch.float32) as other:
        return other.generate(prompt, **ANSWER)


def test_a_longer_prompt_continues_the_cache(engine: Engine) -> None:
    first = engine.generate(PROMPT, **ANSWER)
    longer = [*PROMPT, *first.token_ids, 70, 71]
    again = engine.generate(longer, **ANSWER)
    assert again.token_ids == fresh(longer).token_ids
    # The last token of an answer is never computed, unless the next turn asks for it.
    assert again.timing.cached_tokens >= len(PROMPT) + len(first.token_ids) - 1


def test_a_prompt_that_leaves_the_old_one_cuts_the_cache_back(engine: Engine) -> None:
    engine.generate(PROMPT, **ANSWER)
    other = [*PROMPT[:7], 99, 98, 97]
    again = engine.generate(other, **ANSWER)
    assert again.timing.cached_tokens == 7
    assert again.token_ids == fresh(other).token_ids


def test_the_same_prompt_computes_its_last_token_again(engine: Engine) -> None:
    first = engine.generate(PROMPT, **ANSWER)
    again = engine.generate(PROMPT, **ANSWER)
    assert again.token_ids == first.token_ids
    assert again.timing.cached_tokens == len(PROMPT) - 1


def test_two_streams_at_once_do_not_share_a_cache(engine: Engine) -> None:
    engine.generate(PROMPT, **ANSWER)
    one = engine.stream(PROMPT, **ANSWER)
    two = engine.stream(PROMPT, **ANSWER)
    pairs = list(zip(one, two, strict=True))
    assert all(a.token == b.token for a, b in pairs)


def test_an_answer_that_was_stopped_can_be_continued(engine: Engine) -> None:
    stream = engine.stream(PROMPT, **ANSWER)
    head = [next(stream).token for _ in range(4)]
    stream.close()  # type: ignore[attr-defined]
    longer = [*PROMPT, *(token for token in head if token is not None), 70]
    again = engine.generate(longer, **ANSWER)
    assert again.timing.cached_tokens > len(PROMPT)
    assert again.token_ids == fresh(longer).token_ids


def test_a_forward_pass_that_was_interrupted_leaves_no_cache(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = engine.stream(PROMPT, **ANSWER)
    next(stream)

    def interrupted(*args: object, **kwargs: object) -> object:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert engine.generate(PROMPT, **ANSWER).timing.cached_tokens == 0


def test_recurrent_states_are_not_reused(tmp_path: Path) -> None:
    import tiny

    from kt_core.engine.generation import GenerationOptions, TokenStream
    from kt_core.engine.prefix_cache import PrefixCache

    tiny.save_tiny("qwen3_next", tmp_path)
    options = GenerationOptions(temperature=0, max_new_tokens=4)
    with kt_core.load(tmp_path, format="bf16", dtype=torch.float32) as engine:
        prefixes = PrefixCache()
        first = list(TokenStream(engine.model, PROMPT, options, prefixes))
        longer = [*PROMPT, *first, 5]
        again = TokenStream(engine.model, longer, options, prefixes)
        assert list(again) == list(TokenStream(engine.model, longer, options))
        assert again.timing.cached_tokens == 0
