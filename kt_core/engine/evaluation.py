"""How much a packed model differs from its source on a text: perplexity, and KL divergence."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kt_core.engine.engine import Engine, load
from kt_core.engine.text_windows import token_windows
from kt_core.interfaces import Progress
from kt_core.plugins import Registry

TOKENS = 2048
"""Of the text: more are left out."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Two models on one text.

    Attributes:
        tokens: Tokens that were foretold.
        source_format: What the source's experts were.
        source_perplexity: ``exp`` of the mean negative log-likelihood of the source.
        perplexity: Of the packed model.
        kl: Mean Kullback-Leibler divergence of the packed model's distribution of the next token
            from the source's, in nats.
        kl_p99: What 99 of 100 tokens do not exceed: where one number in a thousand makes the mean.
        same_best: Part of the tokens where both find the same one likeliest.
    """

    tokens: int
    source_format: str
    source_perplexity: float
    perplexity: float
    kl: float
    kl_p99: float
    same_best: float


def evaluate(
    source: Path,
    packed: Path,
    text: str,
    registry: Registry,
    *,
    threads: int | None,
    progress: Progress,
) -> Evaluation:
    """Run both over the beginning of a text, one after the other.

    The source runs in the format that it is stored in; what it says of each token is kept in a
    temporary file beside the packed model: 4 bytes for each of 2048 tokens and each of the
    vocabulary.

    Raises:
        KtError: One of them cannot be loaded, or the text is too short.
    """
    with (
        tempfile.TemporaryDirectory(prefix=".kt-eval.", dir=packed.parent) as folder,
        torch.inference_mode(),
    ):
        stored = []
        with load(source, threads=threads, registry=registry, progress=progress) as engine:
            source_format = engine.stats().format
            windows = token_windows(engine, text, TOKENS)
            source_loss = 0.0
            for number, logs in enumerate(_predictions(engine, windows, progress)):
                source_loss += _loss(logs, windows[number])
                file = str(Path(folder) / str(number))
                kept = torch.from_file(file, shared=True, size=logs.numel()).view(logs.shape)
                kept.copy_(logs)
                stored.append(kept)
        loss = 0.0
        same = tokens = 0
        divergences = []
        with load(packed, threads=threads, registry=registry, progress=progress) as engine:
            for number, logs in enumerate(_predictions(engine, windows, progress)):
                truth = stored[number]
                loss += _loss(logs, windows[number])
                divergences.append((truth.exp() * (truth - logs)).sum(dim=-1))
                same += int((truth.argmax(dim=-1) == logs.argmax(dim=-1)).sum())
                tokens += len(logs)
        del stored
    divergence = torch.cat(divergences).double()
    return Evaluation(
        tokens=tokens,
        source_format=source_format,
        source_perplexity=math.exp(source_loss / tokens),
        perplexity=math.exp(loss / tokens),
        kl=float(divergence.mean()),
        kl_p99=float(divergence.quantile(0.99)),
        same_best=same / tokens,
    )


def _predictions(
    engine: Engine, windows: list[list[int]], progress: Progress
) -> Iterator[torch.Tensor]:
    """Yield, for each window, log-probabilities ``[tokens - 1, vocabulary]`` of the next tokens."""
    for number, window in enumerate(windows):
        progress("reading the text", number / len(windows))
        output = engine.model(input_ids=torch.tensor([window]), use_cache=False)
        yield torch.log_softmax(output.logits[0, :-1].float(), dim=-1)


def _loss(logs: torch.Tensor, window: list[int]) -> float:
    """Negative log-likelihood of the window's tokens, all together."""
    return -float(logs.gather(1, torch.tensor(window[1:])[:, None]).double().sum())
