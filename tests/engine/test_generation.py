"""Sampling, the ends of an answer, text from tokens, and engines that are interrupted or closed."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

import kt_core
from kt_core.engine import Engine, GenerationOptions, Timing
from kt_core.engine.generation import (
    TokenStream,
    context_length,
    end_tokens,
    token_budget,
)
from kt_core.engine.sampling import Sampler
from kt_core.engine.text_stream import TextStream
from kt_core.errors import ContextLengthError, InvalidRequestError, TokenizerError

STORIES = Path(__file__).parents[1] / "data" / "stories-moe"
PROMPT = "Once upon a time"
GREEDY = {"temperature": 0, "max_new_tokens": 40}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with kt_core.load(STORIES, format="bf16", threads=1, dtype=torch.float32) as engine:
        yield engine


@pytest.fixture(scope="module")
def tokenizer(engine: Engine) -> PreTrainedTokenizerBase:
    assert engine.tokenizer is not None
    return engine.tokenizer


# --- the dice ----------------------------------------------------------------------------------


def sampler(
    temperature: float = 1, top_p: float = 1, top_k: int = 0, seed: int | None = 0
) -> Sampler:
    return Sampler(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)


def draw(dice: Sampler, logits: torch.Tensor, count: int) -> list[int]:
    so_far = torch.tensor([[1, 2]])
    return [dice.choose(logits, so_far) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_largest(dtype: torch.dtype) -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    logits[617] = 9
    assert draw(sampler(temperature=0, top_p=0.1, top_k=3), logits.to(dtype), 3) == 3 * [617]


def test_a_seed_fixes_the_draws_whatever_torch_does() -> None:
    logits = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    first = draw(sampler(seed=7), logits, 50)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert draw(sampler(seed=7), logits, 50) == first
    assert torch.equal(torch.get_rng_state(), before)  # and takes nothing from torch's own dice
    assert draw(sampler(seed=8), logits, 50) != first


def test_without_a_seed_each_answer_has_its_own_dice() -> None:
    logits = torch.zeros(1000)
    torch.manual_seed(1)
    first = draw(sampler(seed=None), logits, 20)
    torch.manual_seed(1)
    assert draw(sampler(seed=None), logits, 20) != first


@pytest.mark.parametrize(
    ("options", "want"),
    [
        # softmax of log(p) is p; temperature 2 takes its square root, 0.5 its square.
        ({}, [0.5, 0.25, 0.15, 0.1]),
        ({"temperature": 0.5}, [0.25, 0.0625, 0.0225, 0.01]),
        ({"temperature": 2}, [math.sqrt(p) for p in (0.5, 0.25, 0.15, 0.1)]),
        ({"top_k": 2}, [0.5, 0.25, 0, 0]),
        ({"top_k": 9}, [0.5, 0.25, 0.15, 0.1]),
        ({"top_p": 0.76}, [0.5, 0.25, 0.15, 0]),  # the one that crosses the bound stays
        ({"top_p": 0.4}, [0.5, 0, 0, 0]),
        # top_p is applied to what top_k left: 0.5 / 0.75 = 0.67
        ({"top_k": 2, "top_p": 0.66}, [0.5, 0, 0, 0]),
        ({"temperature": 0.5, "top_p": 0.9}, [0.25, 0.0625, 0, 0]),
    ],
)
def test_distribution(options: dict[str, Any], want: list[float]) -> None:
    """Frequencies of 4000 draws, within five standard deviations."""
    count = 4000
    logits = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.1]))
    seen = Counter(draw(sampler(**options), logits, count))
    for token, weight in enumerate(want):
        p = weight / sum(want)
        assert abs(seen[token] - count * p) <= 5 * math.sqrt(count * p * (1 - p))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "top_p": 0.95, "top_k": 0},
        {"temperature": 1.3, "top_p": 0.5, "top_k": 50},
        {"temperature": 1.0, "top_p": 1.0, "top_k": 5},
    ],
)
def test_distribution_is_that_of_generate(
    engine: Engine, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = engine.encode(PROMPT + ", there was a brave dog named")
    output = engine.model.generate(
        input_ids=torch.tensor([tokens]),
        max_new_tokens=1,
        do_sample=True,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    want = torch.softmax(output.scores[0][0], dim=-1)
    thrown: list[torch.Tensor] = []
    multinomial = torch.multinomial

    def spied(probabilities: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        thrown.append(probabilities)
        return multinomial(probabilities, *args, **kwargs)

    monkeypatch.setattr(torch, "multinomial", spied)
    list(TokenStream(engine.model, tokens, GenerationOptions(max_new_tokens=1, **options)))
    torch.testing.assert_close(thrown[0], want)
    assert 1 < int((want > 0).sum()) < len(want)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0},
        {"top_p": 1.01},
        {"top_p": math.nan},
        {"top_k": -1},
        {"seed": -1},
        {"seed": 2**63},
        {"max_new_tokens": 0},
        {"stop": "a string"},
        {"max_tokens": 5},
    ],
)
def test_invalid_options_are_refused_before_anything_runs(
    engine: Engine, options: dict[str, Any]
) -> None:
    (name,) = options
    with pytest.raises(InvalidRequestError, match=name):
        engine.stream(PROMPT, **options)  # on the call, not on the first token


# --- where an answer ends ----------------------------------------------------------------------


def _model(generation: object, config: object) -> Any:
    text = SimpleNamespace(eos_token_id=config)
    return SimpleNamespace(
        generation_config=SimpleNamespace(eos_token_id=generation),
        config=SimpleNamespace(get_text_config=lambda decoder: text),
    )


@pytest.mark.parametrize(
    ("generation", "config", "want"),
    [
        (2, 3, {2}),
        ([2, 5], 3, {2, 5}),
        ((2,), None, {2}),
        (None, 3, {3}),
        (None, [3, 4], {3, 4}),
        (0, 3, {0}),
        (None, None, set()),
    ],
)
def test_end_tokens(generation: object, config: object, want: set[int]) -> None:
    assert end_tokens(_model(generation, config)) == want


@pytest.mark.parametrize("as_list", [False, True])
def test_an_end_token_ends_the_answer(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, *, as_list: bool
) -> None:
    whole = engine.generate(PROMPT, **GREEDY)
    end = whole.token_ids[9]
    at = whole.token_ids.index(end)
    ends = [end, 900] if as_list else end
    monkeypatch.setattr(engine.model.generation_config, "eos_token_id", ends)

    answer = engine.generate(PROMPT, **GREEDY)

    assert answer.token_ids == whole.token_ids[:at]
    assert answer.finish_reason == "stop"
    assert answer.timing.new_tokens == at + 1  # the end token took its time, too
    assert whole.finish_reason == "length"


def test_the_models_own_end_token(engine: Engine) -> None:
    answer = engine.generate(PROMPT, temperature=0, max_new_tokens=400)
    assert answer.finish_reason == "stop"
    assert answer.timing.new_tokens == len(answer.token_ids) + 1
    assert 0 not in answer.token_ids
    assert answer.text.endswith(".")


def test_context_length_of_models() -> None:
    def of(**values: object) -> int | None:
        text = SimpleNamespace(**values)
        config = SimpleNamespace(get_text_config=lambda decoder: text)
        return context_length(SimpleNamespace(config=config))  # type: ignore[arg-type]

    assert of(max_position_embeddings=512) == 512
    assert of(max_seq_len=64) == 64
    assert of(max_position_embeddings=None, n_positions=32) == 32
    assert of(max_position_embeddings=-1) is None
    assert of() is None


def test_prompt_longer_than_the_context(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.model.config, "max_position_embeddings", 16)
    for length, excess in ((16, 1), (20, 5)):
        wanted = f"has {length} tokens, the model's context holds 16.* at least {excess}$"
        with pytest.raises(ContextLengthError, match=wanted):
            engine.stream(length * [5])
    assert len(engine.generate(15 * [5], temperature=0).token_ids) == 1


@pytest.mark.parametrize(("wanted", "got"), [(3, 3), (6, 6), (7, 6), (512, 6), (None, 6)])
def test_new_tokens_are_limited_by_the_context(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, wanted: int | None, got: int
) -> None:
    monkeypatch.setattr(engine.model.config, "max_position_embeddings", 16)
    answer = engine.generate(10 * [70], temperature=0, max_new_tokens=wanted)
    assert len(answer.token_ids) == got
    assert answer.finish_reason == "length"


def test_no_context_length_means_no_limit() -> None:
    config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace())
    model: Any = SimpleNamespace(config=config)
    assert token_budget(model, 10**6, 7) == 7
    assert token_budget(model, 10**6, None) > 10**6


def test_empty_prompt(engine: Engine) -> None:
    for prompt in ("", []):
        with pytest.raises(InvalidRequestError, match="no tokens"):
            engine.stream(prompt, raw=True)


# --- stop strings ------------------------------------------------------------------------------


def test_stop_strings_cut_the_answer(engine: Engine) -> None:
    whole = engine.generate(PROMPT, **GREEDY)
    tokens = len(whole.token_ids)
    for begin, end in ((0, 1), (5, 9), (11, 30), (len(whole.text) - 3, len(whole.text))):
        stop = whole.text[begin:end]
        answer = engine.generate(PROMPT, **GREEDY, stop=(stop,))
        assert answer.text == whole.text[: whole.text.index(stop)]
        assert answer.finish_reason == "stop"
        assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
        assert len(answer.token_ids) < tokens or end == len(whole.text)


def test_what_only_begins_like_a_stop_string_is_not_lost(engine: Engine) -> None:
    whole = engine.generate(PROMPT, **GREEDY)
    answer = engine.generate(PROMPT, **GREEDY, stop=(whole.text[-4:] + "#", "", "###"))
    assert answer.text == whole.text
    assert answer.finish_reason == "length"


class ByteDecoder:
    """A tokenizer of bytes: each token stands for some of them; token 0 is special."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        data = b"".join(self.pieces[token - 1] for token in token_ids if token)
        return data.decode("utf-8", errors="replace")


def cut(dice: random.Random, data: bytes, longest: int) -> list[bytes]:
    """Cut bytes anywhere, in the middle of characters too."""
    pieces = []
    while data:
        size = dice.randint(1, longest)
        pieces.append(data[:size])
        data = data[size:]
    return pieces


def pushed(stream: TextStream, tokens: Sequence[int]) -> Iterator[str]:
    for token in tokens:
        yield stream.push(token)
        if stream.is_stopped:
            return
    yield stream.finish()


ALPHABETS = {
    "ascii": "ab",
    "wide": "aé日🎉\u200d\ufffd",
    "emoji": "👩‍👧🏽",
}


@pytest.mark.parametrize("alphabet", ALPHABETS.values(), ids=ALPHABETS.keys())
def test_pieces_add_up_to_the_text(alphabet: str) -> None:
    dice = random.Random(0)
    for _ in range(300):
        text = "".join(dice.choices(alphabet, k=dice.randint(0, 12)))
        decoder = ByteDecoder(cut(dice, text.encode(), 3))
        tokens = list(range(1, len(decoder.pieces) + 1))
        for _ in range(dice.randint(0, 2)):
            tokens.insert(dice.randint(0, len(tokens)), 0)
        stream = TextStream(decoder)
        pieces = list(pushed(stream, tokens))
        assert "".join(pieces) == text == stream.text
        if "\ufffd" not in text:  # no half character was ever shown
            assert not any("\ufffd" in piece for piece in pieces)


def test_pieces_of_broken_characters_add_up_too() -> None:
    dice = random.Random(1)
    for _ in range(300):
        data = bytes(dice.choices(b"a\xe2\x82\xac\xf0\x9f\xff", k=dice.randint(1, 10)))
        decoder = ByteDecoder(cut(dice, data, 3))
        stream = TextStream(decoder)
        pieces = pushed(stream, range(1, len(decoder.pieces) + 1))
        assert "".join(pieces) == data.decode("utf-8", errors="replace")


@pytest.mark.parametrize("alphabet", ALPHABETS.values(), ids=ALPHABETS.keys())
def test_text_ends_before_the_first_stop_string_however_tokens_cut_it(alphabet: str) -> None:
    dice = random.Random(2)
    met = 0
    for _ in range(1000):
        text = "".join(dice.choices(alphabet, k=dice.randint(0, 12)))
        stop = ["".join(dice.choices(alphabet, k=dice.randint(1, 4))) for _ in range(3)]
        decoder = ByteDecoder(cut(dice, text.encode(), 4))
        stream = TextStream(decoder, stop)
        want = before_first(text, stop)
        so_far = ""
        for piece in pushed(stream, range(1, len(decoder.pieces) + 1)):
            so_far += piece
            assert want.startswith(so_far), "a part of a stop string was shown"
        assert so_far == want == stream.text
        assert stream.is_stopped == (want != text or any(s in text for s in stop))
        met += stream.is_stopped
    assert met > 100


def before_first(text: str, stop: Sequence[str]) -> str:
    """Grow the text by one character until it ends with a stop string; the longest counts."""
    for end in range(len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))]
    return text


class WordDecoder:
    """Like SentencePiece: a word begins with a mark, and the first space of a text is dropped."""

    words = ("", "▁one", "▁", "two", "▁▁three")

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(self.words[token] for token in token_ids).replace("▁", " ").removeprefix(" ")


def test_spaces_between_words_stay() -> None:
    dice = random.Random(4)
    for _ in range(100):
        tokens = dice.choices(range(5), k=8)
        stream = TextStream(WordDecoder())
        want = WordDecoder().decode(tokens, skip_special_tokens=True)
        assert "".join(pushed(stream, tokens)) == want


def test_characters_of_several_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "Lily's café — 日本語 🎉 👩‍👩‍👧\n\n  end "
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) > len(text)  # characters of several tokens are among them
    stream = TextStream(tokenizer)
    pieces = list(pushed(stream, tokens))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_random_tokens_add_up_to_what_the_tokenizer_decodes(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    dice = random.Random(3)
    for _ in range(100):
        tokens = dice.choices(range(len(tokenizer)), k=20)
        text = "".join(pushed(TextStream(tokenizer), tokens))
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)


# --- an answer ---------------------------------------------------------------------------------


def test_events_and_completion_say_the_same(
    engine: Engine, tokenizer: PreTrainedTokenizerBase
) -> None:
    events = list(engine.stream(PROMPT, **GREEDY))
    answer = engine.generate(PROMPT, **GREEDY)
    *steps, last = events
    assert all(e.token is not None and e.finish_reason is None and e.timing is None for e in steps)
    assert last.token is None
    assert last.finish_reason == answer.finish_reason == "length"
    assert tuple(e.token for e in steps) == answer.token_ids
    assert "".join(e.text for e in events) == answer.text == tokenizer.decode(answer.token_ids)
    assert len(answer.token_ids) == 40


def test_a_prompt_can_be_text_or_its_tokens(engine: Engine) -> None:
    by_text = engine.generate(PROMPT, **GREEDY)
    by_tokens = engine.generate(engine.encode(PROMPT), **GREEDY)
    assert by_text.token_ids == by_tokens.token_ids


def test_a_seed_repeats_an_answer(engine: Engine) -> None:
    options = {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 20}
    first = engine.generate(PROMPT, **options, seed=1)
    torch.manual_seed(99)
    assert engine.generate(PROMPT, **options, seed=1).token_ids == first.token_ids
    others = {engine.generate(PROMPT, **options, seed=seed).token_ids for seed in range(2, 6)}
    assert len(others | {first.token_ids}) == 5


def test_timing(engine: Engine) -> None:
    prompt = [*range(30, 60)]  # nobody asked this before: nothing of it is cached
    start = time.perf_counter()
    timing = engine.generate(prompt, temperature=0, max_new_tokens=10).timing
    wall = time.perf_counter() - start
    assert (timing.prompt_tokens, timing.cached_tokens, timing.new_tokens) == (30, 0, 10)
    assert timing.ttft_s > 0
    assert timing.decode_s > 0
    assert timing.ttft_s + timing.decode_s <= wall
    assert timing.prefill_tokens_per_s == pytest.approx(30 / timing.ttft_s)
    assert timing.decode_tokens_per_s == pytest.approx(9 / timing.decode_s)


def test_timing_of_a_single_token(engine: Engine) -> None:
    timing = engine.generate(PROMPT, temperature=0, max_new_tokens=1).timing
    assert timing.new_tokens == 1
    assert timing.decode_s == timing.decode_tokens_per_s == 0
    assert Timing(prompt_tokens=3, new_tokens=0, ttft_s=0, decode_s=0).prefill_tokens_per_s == 0


def test_chat_template(
    engine: Engine, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    with pytest.raises(TokenizerError, match=r"no chat template.*--raw"):
        engine.stream(messages)
    assert tokenizer.decode(engine.encode("Hi")) == "Hi"  # without a template: as it is
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    assert tokenizer.decode(engine.encode("Hi")) == "[user]Hi[assistant]"
    assert tokenizer.decode(engine.encode("Hi", raw=True)) == "Hi"
    assert tokenizer.decode(engine.encode(messages)) == "[system]Be kind.[user]Hi[assistant]"


# --- interrupted, interleaved, closed ----------------------------------------------------------


def test_a_stream_that_is_left_early_leaves_the_engine_usable(engine: Engine) -> None:
    want = engine.generate(PROMPT, **GREEDY).token_ids
    for event in engine.stream(PROMPT, **GREEDY):
        if event.text:
            break
    stream = engine.stream(PROMPT, **GREEDY)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    engine.stream(PROMPT, **GREEDY)  # never begun
    assert engine.generate(PROMPT, **GREEDY).token_ids == want


def test_two_streams_in_turns_do_not_disturb_each_other(engine: Engine) -> None:
    prompts = (PROMPT, "The little dog was")
    alone = [engine.generate(prompt, **GREEDY).token_ids for prompt in prompts]
    streams = [engine.stream(prompt, **GREEDY) for prompt in prompts]
    together = list(zip(*streams, strict=True))
    assert [tuple(step[i].token for step in together[:-1]) for i in range(2)] == alone


@pytest.mark.parametrize("after_layers", [0, 2])
def test_ctrl_c_in_a_forward_pass_leaves_the_engine_usable(
    engine: Engine, after_layers: int
) -> None:
    want = engine.generate(PROMPT, **GREEDY).token_ids
    calls = 0

    def interrupt(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt

    handle = engine.model.model.layers[after_layers].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPT, **GREEDY)
    handle.remove()
    assert calls == 5
    assert engine.generate(PROMPT, **GREEDY).token_ids == want


def test_closed_engine() -> None:
    with kt_core.load(STORIES, format="int8", threads=1) as engine:
        stats = engine.stats()
        under_way = engine.stream(PROMPT, **GREEDY)
        next(under_way)
    for use in (
        lambda: engine.generate(PROMPT),
        lambda: engine.stream(PROMPT),
        lambda: engine.model,
        engine.stats,
    ):
        with pytest.raises(InvalidRequestError, match="the engine is closed; load the model again"):
            use()
    assert len(list(under_way)) == 40  # what was begun holds what it needs
    assert engine.encode(PROMPT)
    engine.close()
    assert stats.format == "int8"
    assert stats.placement == {"cpu": 4 * 16}


def test_leaving_the_block_closes_after_an_error_too() -> None:
    engine = kt_core.load(STORIES, format="int8", threads=1)
    with pytest.raises(ZeroDivisionError), engine:
        raise ZeroDivisionError
    with pytest.raises(InvalidRequestError, match="closed"):
        engine.generate(PROMPT)
