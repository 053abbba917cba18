"""How much packed models differ from their source on a text: perplexity, and KL divergence."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from kt_core.engine.engine import Engine, load
from kt_core.engine.text_windows import token_windows
from kt_core.interfaces import Progress
from kt_core.plugins import Registry

TOKENS = 2048
"""Of the text: more are left out."""
# Neighbours in a text are not independent: what is averaged for an error is blocks of so many.
_BLOCK_TOKENS = 32


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
        kl_error: Standard error of that mean.
        kl_p99: What 99 of 100 tokens do not exceed: where one number in a thousand makes the mean.
        loss_change: Mean of the packed model's negative log-likelihood less the source's, in nats.
        loss_change_error: Standard error of that mean: of the differences token by token, which
            are far smaller than those between tokens.
        same_best: Part of the tokens where both find the same one likeliest.
    """

    tokens: int
    source_format: str
    source_perplexity: float
    perplexity: float
    kl: float
    kl_error: float
    kl_p99: float
    loss_change: float
    loss_change_error: float
    same_best: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two models on one text, token by token, in its order.

    Attributes:
        divergence: ``[tokens]`` float64, nats.
        source_loss: ``[tokens]`` float64: negative log-likelihoods of the source.
        loss: ``[tokens]`` float64: of the packed model.
        same_best: ``[tokens]`` bool.
        source_format: What the source's experts were.
    """

    divergence: torch.Tensor
    source_loss: torch.Tensor
    loss: torch.Tensor
    same_best: torch.Tensor
    source_format: str

    def summary(self) -> Evaluation:
        """Average it."""
        change = self.loss - self.source_loss
        return Evaluation(
            tokens=len(self.loss),
            source_format=self.source_format,
            source_perplexity=math.exp(float(self.source_loss.mean())),
            perplexity=math.exp(float(self.loss.mean())),
            kl=float(self.divergence.mean()),
            kl_error=standard_error(self.divergence),
            kl_p99=float(self.divergence.quantile(0.99)),
            loss_change=float(change.mean()),
            loss_change_error=standard_error(change),
            same_best=float(self.same_best.double().mean()),
        )


@dataclass(frozen=True, slots=True)
class SourcePredictions:
    """What a source says of each token of a text; made by ``source_predictions``."""

    windows: list[list[int]]
    logs: list[torch.Tensor]
    source_format: str

    def compare(
        self, packed: Path, registry: Registry, *, threads: int | None, progress: Progress
    ) -> Comparison:
        """Let another model read the same text.

        Raises:
            KtError: It cannot be loaded.
        """
        divergence, losses, source_losses, same = [], [], [], []
        with (
            load(packed, threads=threads, registry=registry, progress=progress) as engine,
            torch.inference_mode(),
        ):
            for number, logs in enumerate(_predictions(engine, self.windows, progress)):
                truth, window = self.logs[number], self.windows[number]
                divergence.append((truth.exp() * (truth - logs)).sum(dim=-1))
                losses.append(_losses(logs, window))
                source_losses.append(_losses(truth, window))
                same.append(truth.argmax(dim=-1) == logs.argmax(dim=-1))
        return Comparison(
            divergence=torch.cat(divergence).double(),
            source_loss=torch.cat(source_losses).double(),
            loss=torch.cat(losses).double(),
            same_best=torch.cat(same),
            source_format=self.source_format,
        )


@contextmanager
def source_predictions(
    source: Path,
    text: str,
    folder: Path,
    registry: Registry,
    *,
    threads: int | None,
    progress: Progress,
    tokens: int = TOKENS,
) -> Iterator[SourcePredictions]:
    """Let a source read the beginning of a text, and keep what it says.

    It runs in the format that it is stored in. What it says is kept in temporary files in
    ``folder``: 4 bytes for each token and each of the vocabulary.

    Raises:
        KtError: It cannot be loaded, or the text is too short.
    """
    with tempfile.TemporaryDirectory(prefix=".kt-eval.", dir=folder) as temporary:
        stored = []
        with (
            load(source, threads=threads, registry=registry, progress=progress) as engine,
            torch.inference_mode(),
        ):
            source_format = engine.stats().format
            windows = token_windows(engine, text, tokens)
            for number, logs in enumerate(_predictions(engine, windows, progress)):
                file = str(Path(temporary) / str(number))
                kept = torch.from_file(file, shared=True, size=logs.numel()).view(logs.shape)
                kept.copy_(logs)
                stored.append(kept)
        yield SourcePredictions(windows, stored, source_format)


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

    Raises:
        KtError: One of them cannot be loaded, or the text is too short.
    """
    with source_predictions(
        source, text, packed.parent, registry, threads=threads, progress=progress
    ) as predictions:
        compared = predictions.compare(packed, registry, threads=threads, progress=progress)
    return compared.summary()


def standard_error(values: torch.Tensor) -> float:
    """Return the standard error of the mean of numbers of consecutive tokens; NaN of few.

    From the means of blocks (the method of batch means), so that what a token has in common with
    its neighbours does not count as many times as there are neighbours.
    """
    count = len(values) // _BLOCK_TOKENS
    blocks = values[: count * _BLOCK_TOKENS].reshape(count, _BLOCK_TOKENS).mean(dim=1)
    return float(blocks.std() / count**0.5) if count > 1 else math.nan


def _predictions(
    engine: Engine, windows: list[list[int]], progress: Progress
) -> Iterator[torch.Tensor]:
    """Yield, for each window, log-probabilities ``[tokens - 1, vocabulary]`` of the next tokens."""
    for number, window in enumerate(windows):
        progress("reading the text", number / len(windows))
        output = engine.model(input_ids=torch.tensor([window]), use_cache=False)
        yield torch.log_softmax(output.logits[0, :-1].float(), dim=-1)


def _losses(logs: torch.Tensor, window: list[int]) -> torch.Tensor:
    """``[tokens - 1]``: negative log-likelihoods of the window's tokens."""
    return -logs.gather(1, torch.tensor(window[1:])[:, None])[:, 0]
