"""Forward passes of one engine's model: eager ones, and steps of decoding from a graph."""

from __future__ import annotations

import contextlib
import inspect
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from kt_core.engine.decode_cache import (
    MASKED_ATTENTION,
    DecodeCache,
    attention_of,
    decode_cache,
    why_no_decode_cache,
)
from kt_core.engine.decode_step import DecodeStep
from kt_core.moe.beside import BesideStream

if TYPE_CHECKING:
    from kt_core.engine.accelerators import Accelerators
    from kt_core.engine.device_time import StepClock

_log = logging.getLogger(__name__)

# What a step of fixed shape, or its capture, may end with that eager decoding may not.
_REFUSALS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError)


@dataclass(slots=True, kw_only=True)
class DecodeCounters:
    """How tokens were decoded since the model was loaded.

    Attributes:
        from_graphs: Steps that were replayed.
        eager: Steps of one token that were not.
        captures: Graphs captured.
        why_eager: Why no step is replayed; None where steps are.
    """

    from_graphs: int = 0
    eager: int = 0
    captures: int = 0
    why_eager: str | None = None


class ForwardPasses:
    """Calls a model, for one sequence.

    Attributes:
        counters: How it has done so.
        is_on: Whether steps may be replayed; may be changed between passes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        accelerators: Accelerators | None = None,
        *,
        graph: bool = False,
        clock: StepClock | None = None,
    ) -> None:
        """Take the model.

        Args:
            model: The model.
            accelerators: Where it runs; None for the host.
            graph: Whether steps of decoding are replayed from graphs where they can be.
            clock: Counts the passes; None where nobody asks.
        """
        self._model = model
        self._accelerators = accelerators
        takes = inspect.signature(model.forward).parameters
        self._last_logits_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self.counters = DecodeCounters(why_eager=self._why_eager(graph=graph))
        self.is_on = True
        self._clock = clock
        self._state: object = None
        self._is_watched = False
        if self.counters.why_eager and graph:
            _log.debug("decoding is eager: %s", self.counters.why_eager)

    def _why_eager(self, *, graph: bool) -> str | None:
        if not graph:
            return "switched off"
        if self._accelerators is None:
            return "there is no accelerator"
        return self._accelerators.hybrid.why_no_graph() or why_no_decode_cache(self._model)

    def begin(self, tokens: int, cache: Any) -> Any:
        """Begin or continue a sequence, and return its cache.

        Args:
            tokens: That it is likely to have.
            cache: That of its beginning; None for a new one.
        """
        if self.counters.why_eager is not None:
            return cache
        self._look_at_model()
        if cache is None:
            cache = decode_cache(self._model)
        if isinstance(cache, DecodeCache):
            # Where there is too little memory, each pass asks for what it needs.
            with torch.inference_mode(), contextlib.suppress(torch.OutOfMemoryError):
                cache.reserve(tokens, self._limit)
        return cache

    def run(self, token_ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        """Append tokens to a sequence.

        Args:
            token_ids: ``[1, tokens]``, in host memory.
            cache: As the last call, or ``begin``, returned it.

        Returns:
            The logits ``[vocabulary]`` of the last position, valid until the next call, and the
            cache.
        """
        with contextlib.nullcontext() if self._clock is None else self._clock.step():
            return self._run(token_ids, cache)

    def _run(self, token_ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        try:
            if isinstance(cache, DecodeCache):
                with torch.inference_mode():
                    cache.reserve(cache.length + token_ids.shape[1], self._limit)
                if token_ids.shape[1] == 1 and cache.length and self._may_replay:
                    logits = self._decode(int(token_ids), cache)
                    if logits is not None:
                        return logits, cache
            self.counters.eager += token_ids.shape[1] == 1
            is_new = isinstance(cache, DecodeCache) and cache.length == 0
            try:
                return self._eager(token_ids, cache)
            except (AttributeError, TypeError) as error:
                if not is_new:
                    raise
                self._give_up(error, cache)  # the model knows its own kinds of cache only
                return self._eager(token_ids, None)
        except BaseException:
            self._forget_step()
            raise

    def _eager(self, token_ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        with torch.inference_mode():
            output = self._model(
                input_ids=token_ids.to(self._model.device),
                past_key_values=cache,
                use_cache=True,
                **self._last_logits_only,
            )
        return output.logits[0, -1].cpu(), output.past_key_values

    @property
    def _may_replay(self) -> bool:
        return self.is_on and self.counters.why_eager is None and not self._is_watched

    @property
    def _limit(self) -> int | None:
        return context_length(self._model)

    def _decode(self, token: int, cache: DecodeCache) -> torch.Tensor | None:
        """Do a step of fixed shape: run the first, replay the others. None if that cannot be."""
        assert self._accelerators is not None
        version = (self._state, self._accelerators.hybrid.graph_version())
        if cache.step is not None and cache.step.version != version:
            cache.drop_step()
        try:
            if cache.step is None:
                cache.step = DecodeStep(self._model, self._last_logits_only, version)
                logits = cache.step.run(self._model, cache, token)
                self.counters.eager += 1
            else:
                if not cache.step.is_captured:
                    cache.step.capture(self._model, cache, self._accelerators.hybrid.take_captured)
                    self.counters.captures += 1
                logits = cache.step.replay(cache, token)
                self.counters.from_graphs += 1
        except _REFUSALS as error:
            if cache.step is not None and cache.step.is_captured:
                raise  # it has been replayed, and failed
            self._give_up(error, cache)
            return None
        cache.set_length(cache.length + 1)
        return logits

    def _give_up(self, error: Exception, cache: DecodeCache) -> None:
        lines = str(error).splitlines() or [type(error).__name__]
        self.counters.why_eager = f"a step could not be captured: {lines[0]}"
        _log.warning(
            "decoding is slower than it could be, without graphs: a step of %r could not be "
            "captured (%s); --no-graph (graph=False) leaves this message out",
            self._model.config.model_type,
            lines[0],
        )
        cache.drop_step()
        self._forget_step()

    def _forget_step(self) -> None:
        if self._accelerators is not None:
            self._accelerators.hybrid.forget_step()

    def stats(self) -> DecodeCounters:
        """Return what has happened; a copy. A model that is watched now is a reason, too."""
        why = self.counters.why_eager
        if why is None and self._is_watched:
            why = "the model has hooks, which a graph would not call: --profile or somebody's own"
        return replace(self.counters, why_eager=why)

    def _look_at_model(self) -> None:
        """Notice that somebody has changed the model, or watches it, since the last sequence.

        A graph knows nothing of it: neither of modules that were put in, as PEFT does, nor of
        hooks, which Python calls; but those of ``BesideStream`` only put work into streams.
        """
        modules = list(self._model.modules())
        self._is_watched = any(
            not isinstance(getattr(hook, "__self__", None), BesideStream)
            for module in modules
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
            for hook in hooks.values()
        )
        attention = attention_of(self._model)
        self._is_watched |= attention not in MASKED_ATTENTION
        state = (
            attention,
            tuple((id(module), module.training) for module in modules),
            tuple(parameter.data_ptr() for parameter in self._model.parameters()),
        )
        if state != self._state:  # the same object else: it is compared in each step
            self._state = state


def context_length(model: PreTrainedModel) -> int | None:
    """Return how many positions the model was made for; None where its config does not say."""
    config = model.config.get_text_config(decoder=True)
    for name in ("max_position_embeddings", "max_seq_len", "n_positions"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
