"""Host functions for tests: C functions that note when and where they were called."""

from __future__ import annotations

import ctypes
import threading

import torch

from kt_core.interfaces import HostFunctions
from sim.target import host_functions

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Note:
    """A host function that notes the thread that called it, and may wait for a gate."""

    def __init__(self) -> None:
        self.threads: list[int] = []
        self.arguments: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self._callback = _CALLBACK(self._call)
        self._functions: HostFunctions = host_functions()

    def _call(self, argument: int) -> None:
        self.gate.wait()
        self.threads.append(threading.get_ident())
        self.arguments.append(argument)

    @property
    def calls(self) -> int:
        return len(self.threads)

    def launch(self, stream: torch.Stream, argument: int = 7) -> None:
        address = ctypes.cast(self._callback, ctypes.c_void_p).value
        assert address is not None
        self._functions.launch(stream, address, argument)
