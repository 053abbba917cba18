"""One step of decoding of a fixed shape: put together once, captured, and replayed for each token.

What changes from token to token is two numbers, the token and its place. They lie in pinned
memory, which the graph copies to the device; it also copies the logits back. So a step is two
writes, one replay and one wait, however many layers there are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from kt_core.hardware.graphs import Graph, capture

if TYPE_CHECKING:
    from kt_core.engine.decode_cache import DecodeCache


class DecodeStep:
    """One token through the model, over the buffers of one cache.

    Attributes:
        version: What the step depends on besides its buffers, in the words of whoever made it.
        is_captured: Whether ``replay`` can be called.
    """

    def __init__(self, model: PreTrainedModel, options: Mapping[str, Any], version: object) -> None:
        """Take the model.

        Args:
            model: The model, on the device.
            options: Further arguments of its ``forward``.
            version: See the attribute.
        """
        self.version = version
        self._device = model.device
        self._options = dict(options)
        self._is_host = self._device.type == "cpu"
        with torch.inference_mode(mode=False):  # they are written to outside of it, too
            self._given = torch.zeros(2, dtype=torch.int64, pin_memory=not self._is_host)
            self._inputs = torch.zeros(2, dtype=torch.int64, device=self._device)
        self._logits: torch.Tensor | None = None  # pinned; made by the first run
        self._graph: Graph | None = None
        self._kept: object = None
        self._is_under_way = False

    @property
    def is_captured(self) -> bool:
        """See the class."""
        return self._graph is not None

    def run(self, model: PreTrainedModel, cache: DecodeCache, token: int) -> torch.Tensor:
        """Compute the step without a graph; the cache's length stays what it was.

        Whatever is made or compiled once is made here, so that it need not be during a capture.

        Returns:
            Logits ``[vocabulary]`` in host memory, which the next step writes to.
        """
        self._give(token, cache.length)
        self._is_under_way = True
        with torch.inference_mode():
            self._put_together(model, cache)
        return self._taken()

    def capture(
        self, model: PreTrainedModel, cache: DecodeCache, keep: Callable[[], object]
    ) -> None:
        """Capture the step, after at least one run. Nothing is computed.

        Args:
            model: The model.
            cache: The cache whose buffers it will use for ever.
            keep: Asked afterwards for what must live as long as the graph does.

        Raises:
            RuntimeError: Something in it cannot be captured. What others raise comes through.
        """
        assert self._logits is not None, "a step runs before it is captured"
        try:
            with torch.inference_mode(), capture(self._device) as graph:
                self._put_together(model, cache)
        finally:
            self._kept = keep()
        self._graph = graph

    def replay(self, cache: DecodeCache, token: int) -> torch.Tensor:
        """As ``run``, from the graph."""
        assert self._graph is not None
        self._give(token, cache.length)
        self._is_under_way = True
        self._graph.replay()
        return self._taken()

    def close(self) -> None:
        """Give memory back, once the device is done with it. Closing twice does nothing."""
        graph, self._graph = self._graph, None
        if graph is not None:
            torch.accelerator.synchronize(self._device)  # the host's calls may be under way
            graph.reset()
        self._kept = None

    def __del__(self) -> None:
        """Close; a device that is lost has nothing to give back."""
        with contextlib.suppress(RuntimeError):
            self.close()

    def _give(self, token: int, place: int) -> None:
        if self._is_under_way:  # a step that was interrupted: it may not have read its inputs yet
            self._wait()
        self._given[0], self._given[1] = token, place

    def _put_together(self, model: PreTrainedModel, cache: DecodeCache) -> None:
        self._inputs.copy_(self._given, non_blocking=True)
        with cache.fixed(self._inputs[1:]):
            output = model(
                input_ids=self._inputs[:1, None],
                past_key_values=cache,
                use_cache=True,
                **self._options,
            )
        logits = output.logits[0, -1]
        if self._logits is None:
            self._logits = torch.empty(
                logits.shape, dtype=logits.dtype, pin_memory=not self._is_host
            )
        self._logits.copy_(logits, non_blocking=True)

    def _taken(self) -> torch.Tensor:
        self._wait()
        assert self._logits is not None
        return self._logits

    def _wait(self) -> None:
        if not self._is_host:
            torch.accelerator.current_stream(self._device).synchronize()
        self._is_under_way = False
