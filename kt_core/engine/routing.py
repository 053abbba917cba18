"""Record the routing of an engine, through torch's own hooks; the model is not changed.

The prediction asked for with ``predicts`` is that of Eliseev & Mazur 2023 (arXiv:2312.17238): the
next layer's router applied to this layer's hidden state. How a family routes is not known here, so
the block that holds the next experts is run on this block's input until it calls its experts, and
the call is stopped there: what it would have sent where is the prediction.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kt_core.engine.engine import Engine, Prompt
from kt_core.errors import UnsupportedModelError
from kt_core.interfaces import ExpertGrid, Progress, RoutingStatistics, no_progress
from kt_core.moe.hybrid_experts import HybridExperts
from kt_core.placement.statistics import (
    load_statistics,
    merge,
    save_statistics,
    statistics_file,
)
from kt_core.placement.trace import NO_EXPERT, RoutingTrace


class _StopHere(Exception):
    """Raised where a block calls its experts, when only its routing is wanted."""


class RoutingRecorder:
    """Collects what ``recording`` sees. ``begin_prompt`` says that the next step is a prefill."""

    def __init__(self, layers: int, *, predicts: bool = False) -> None:
        """Start empty."""
        self.predicts = predicts
        self._ids: list[list[torch.Tensor]] = [[] for _ in range(layers)]
        self._weights: list[list[torch.Tensor]] = [[] for _ in range(layers)]
        self._predicted: list[list[torch.Tensor]] = [[] for _ in range(layers)]
        self._step_tokens: list[int] = []
        self._is_decode: list[int] = []
        self._prompt_steps: list[int] = []
        self._is_prompt_due = True

    def begin_prompt(self) -> None:
        """Say that the next step belongs to another prompt."""
        self._is_prompt_due = True

    def begin_step(self, tokens: int) -> None:
        """Take note of a forward pass."""
        if self._is_prompt_due:
            self._prompt_steps.append(len(self._step_tokens))
        self._is_decode.append(0 if self._is_prompt_due else 1)
        self._is_prompt_due = False
        self._step_tokens.append(tokens)

    def add(self, layer: int, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """Take note of where a layer sends its tokens."""
        tokens = self._step_tokens[-1]
        self._ids[layer].append(ids.detach().reshape(tokens, -1).cpu())
        self._weights[layer].append(weights.detach().float().reshape(tokens, -1).cpu())

    def add_prediction(self, layer: int, ids: torch.Tensor) -> None:
        """Take note of where the layer before says that this one will send its tokens."""
        self._predicted[layer].append(ids.detach().reshape(self._step_tokens[-1], -1).cpu())

    @property
    def num_tokens(self) -> int:
        """Tokens recorded so far."""
        return sum(self._step_tokens)

    def trace(self, engine: Engine) -> RoutingTrace:
        """Return what was recorded.

        Raises:
            InvalidRequestError: The engine is closed.
        """
        stats, modules = engine.stats(), expert_modules(engine)
        top_k = max(ids[0].shape[1] for ids in self._ids)
        kernels = [module.kernels[0] for module in modules]
        return RoutingTrace(
            model=f"{Path(stats.model).name} ({stats.model_type}, {stats.format})",
            grid=ExpertGrid(
                num_experts=tuple(module.spec.num_experts for module in modules),
                expert_bytes=tuple(kernel.bytes_per_expert for kernel in kernels),
            ),
            expert_weights=tuple(module.spec.weights_per_expert for module in modules),
            dense_bytes=stats.dense_bytes,
            expert_ids=_joined(self._ids, top_k, np.uint16, NO_EXPERT),
            weights=_joined(self._weights, top_k, np.float16, 0),
            predicted_ids=self._predictions(top_k) if self.predicts else None,
            step_tokens=np.array(self._step_tokens, dtype=np.int64),
            step_is_decode=np.array(self._is_decode, dtype=np.uint8),
            prompt_steps=np.array(self._prompt_steps, dtype=np.int64),
        )

    def _predictions(self, top_k: int) -> Any:
        nothing = [torch.full((self.num_tokens, top_k), -1)]  # nobody foretells the first layer
        return _joined([nothing, *self._predicted[1:]], top_k, np.uint16, NO_EXPERT)


def _joined(layers: list[list[torch.Tensor]], top_k: int, dtype: Any, missing: int) -> Any:
    """``[tokens, layers, top_k]``; ids below 0 (somebody else's pairs) become ``missing``."""
    rows = [torch.cat(steps).numpy() for steps in layers]
    out = np.full((len(rows[0]), len(rows), top_k), missing, dtype=dtype)
    for layer, values in enumerate(rows):
        out[:, layer, : values.shape[1]] = np.where(values < 0, missing, values).astype(dtype)
    return out


def expert_modules(engine: Engine) -> list[HybridExperts]:
    """Return the routed experts of every layer, in order of the layers."""
    return [m for m in engine.model.modules() if isinstance(m, HybridExperts)]


@contextmanager
def recording(engine: Engine, *, predicts: bool = False) -> Iterator[RoutingRecorder]:
    """Record every forward pass of the model within the block. Batches of one sequence only.

    Args:
        engine: Whose model runs.
        predicts: Also ask the next layer's router early, and record what it says.

    Raises:
        UnsupportedModelError: Predictions are asked for, and the model's blocks take more than
            hidden states.
    """
    modules = expert_modules(engine)
    recorder = RoutingRecorder(len(modules), predicts=predicts)
    position = {module: layer for layer, module in enumerate(modules)}
    prophet = _Prophet(engine, modules, recorder) if predicts else None
    handles = [
        engine.model.register_forward_pre_hook(
            lambda _, args, kwargs: recorder.begin_step(_input_tokens(args, kwargs)),
            with_kwargs=True,
        )
    ]

    def on_experts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(module, HybridExperts)
        bound = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        if prophet is not None and prophet.is_asking:
            prophet.answer = bound["top_k_index"]
            raise _StopHere
        recorder.add(position[module], bound["top_k_index"], bound["top_k_weights"])

    try:
        handles += [m.register_forward_pre_hook(on_experts, with_kwargs=True) for m in modules]
        if prophet is not None:
            handles += prophet.listen()
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


def _input_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    ids: torch.Tensor = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
    return ids.numel()


class _Prophet:
    """Asks the next layer's router early."""

    def __init__(
        self, engine: Engine, modules: list[HybridExperts], recorder: RoutingRecorder
    ) -> None:
        names = {module: name for name, module in engine.model.named_modules()}
        paths = (names[module].rpartition(".")[0] for module in modules)
        self._blocks = [engine.model.get_submodule(path) for path in paths]
        self._recorder = recorder
        self.is_asking = False
        self.answer: torch.Tensor | None = None
        for block in self._blocks:
            parameters = list(inspect.signature(block.forward).parameters.values())
            needed = [p.name for p in parameters if p.default is p.empty]
            if len(needed) != 1:
                msg = (
                    f"{type(block).__name__} routes by {', '.join(needed)}, so its router cannot "
                    "be asked early with hidden states alone: leave out --predict"
                )
                raise UnsupportedModelError(msg)

    def listen(self) -> list[Any]:
        """Ask the next block whenever one runs."""
        return [
            block.register_forward_pre_hook(self._asker(layer + 1), with_kwargs=True)
            for layer, block in enumerate(self._blocks[:-1])
        ]

    def _asker(self, layer: int) -> Any:
        block = self._blocks[layer]

        def ask(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.is_asking:
                return
            self.is_asking = True
            try:
                block(*args, **kwargs)
            except _StopHere:
                assert self.answer is not None
                self._recorder.add_prediction(layer, self.answer)
            finally:
                self.is_asking = False

        return ask


def record(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    raw: bool = False,
    predicts: bool = False,
    progress: Progress = no_progress,
    **options: Any,
) -> RoutingTrace:
    """Answer prompts and return how they and their answers were routed.

    The beginning that a prompt shares with the one before is not computed again, as ever, and so
    is in the trace once.

    Args:
        engine: Whom to ask.
        prompts: One after the other.
        raw: As for ``Engine.encode``.
        predicts: As for ``recording``.
        progress: Told how many prompts are done.
        options: Fields of ``GenerationOptions``.

    Raises:
        kt_core.errors.KtError: As ``Engine.stream`` and ``recording``.
    """
    with recording(engine, predicts=predicts) as recorder:
        for done, prompt in enumerate(prompts):
            progress(f"prompt {done + 1} of {len(prompts)}", done / len(prompts))
            recorder.begin_prompt()
            for _ in engine.stream(prompt, raw=raw, **options):
                pass
        return recorder.trace(engine)


def saved_statistics(engine: Engine) -> RoutingStatistics | None:
    """Return what earlier runs of this model left; None where there is nothing.

    Raises:
        TraceError: The file is damaged.
    """
    return load_statistics(statistics_file(Path(engine.stats().model)))


def remember(engine: Engine, trace: RoutingTrace) -> Path:
    """Add a trace to the model's statistics, for the next start, and return their file.

    Raises:
        TraceError: The file is damaged or cannot be written.
    """
    file = statistics_file(Path(engine.stats().model))
    known, new = load_statistics(file), trace.statistics()
    save_statistics(new if known is None else merge(known, new), file)
    return file
