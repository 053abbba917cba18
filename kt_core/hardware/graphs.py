"""Graphs of captured work, in the words that the installed torch has for them.

``torch.accelerator.Graph`` and ``torch.Stream.is_capturing`` came with torch 2.13; before that each
vendor's module of torch had its own, with the same methods under the names that CUDA's have.
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import torch


class Graph(Protocol):
    """What ``torch.accelerator.Graph`` and ``torch.cuda.CUDAGraph`` have in common."""

    def replay(self) -> None:
        """Put the captured work into the current stream."""

    def reset(self) -> None:
        """Give its memory back."""


@functools.cache
def _stream_of(device: torch.device) -> torch.Stream:
    return torch.Stream(device=device)


class capture:  # used as torch's own context managers are
    """Captures what the current thread puts into a stream beside its own, until the block ends.

    ``with capture(device) as graph: ...``; afterwards ``graph.replay()``. The device is waited for
    first. Other threads may go on: only this one's calls are checked.

    Raises:
        RuntimeError: From the block, or at its end: something in it cannot be captured.
    """

    def __init__(self, device: torch.device, stream: torch.Stream | None = None) -> None:
        """Capture into a stream, or into the one that all captures of a device share.

        A library that a stream uses may keep memory for it for good, as cuBLAS does.
        """
        self._device = device
        self._stream = stream or _stream_of(device)
        self.graph: Any = _new_graph(device)

    def __enter__(self) -> Graph:
        """Begin."""
        torch.accelerator.synchronize(self._device)
        torch.accelerator.empty_cache()
        self._stream.__enter__()
        try:
            if isinstance(self.graph, _accelerator_graph()):
                self.graph.capture_begin()
            else:
                self.graph.capture_begin(capture_error_mode=_MODE)
        except BaseException:
            self._stream.__exit__(None, None, None)
            raise
        graph: Graph = self.graph
        return graph

    def __exit__(self, *exc_info: Any) -> None:
        """End, also where the block failed."""
        try:
            self.graph.capture_end()
        finally:
            self._stream.__exit__(*exc_info)


def is_capturing(stream: torch.Stream) -> bool:
    """Whether what is put into a stream, the current one, is captured."""
    if hasattr(stream, "is_capturing"):
        return bool(stream.is_capturing())
    module = torch.get_device_module(stream.device)
    asks = getattr(module, "is_current_stream_capturing", None)
    return asks is not None and bool(asks())


def can_capture(device: torch.device) -> bool:
    """Whether torch has graphs for a device."""
    return bool(_accelerator_graph()) or hasattr(torch.get_device_module(device), "CUDAGraph")


# An expert may be on its way meanwhile, in another thread or stream.
_MODE = "thread_local"


def _accelerator_graph() -> tuple[Any, ...]:
    found = getattr(torch.accelerator, "Graph", None)
    return () if found is None else (found,)


def _new_graph(device: torch.device) -> Any:
    for graph_type in _accelerator_graph():
        return graph_type(capture_error_mode=_MODE)
    return torch.get_device_module(device).CUDAGraph()
