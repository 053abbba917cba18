"""Host functions without the vendor's runtime: the stream rings, a thread of ours calls.

A runtime's own host functions (``kt_core.hardware.runtime_library``) go through its thread and its
locks, twice in every layer. Here the stream itself writes a word to pinned memory and waits for
another one. On a virtual machine with an H100 a layer of a replayed step took 85 to 155
microseconds less (docs/heterogeneous.md). What a device must be able to do is in ``StreamMemory``;
the protocol is in csrc/hardware/doorbell.hpp.
"""

from __future__ import annotations

import ctypes
import time
import weakref
from abc import ABC, abstractmethod

import torch

from kt_core._hardware import BELL_BYTES, Doorbell
from kt_core.errors import DeviceError
from kt_core.interfaces.host_functions import HostFunctions

# Streams that ring; torch has 32 of a priority on a device.
_BELLS = 64
_ANSWER = 4  # bytes behind the request
_PATIENCE_S = 2.0


class StreamMemory(ABC):
    """What streams of a device do to words of four bytes in pinned memory, in their order.

    Both must be recorded where the stream is captured, and neither may hold up the host.
    """

    @abstractmethod
    def write(self, stream: torch.Stream, address: int, value: int) -> None:
        """Let the stream write a word once its earlier work is done, and seen by the host.

        Raises:
            kt_core.errors.DeviceError: The runtime refused.
        """

    @abstractmethod
    def wait(self, stream: torch.Stream, address: int, value: int) -> None:
        """Let the stream wait until a word has a value. Raises as ``write``."""


class DoorbellHostFunctions(HostFunctions):
    """See ``HostFunctions``. Functions are called one by one, by one thread for all streams.

    A stream's calls must not overlap: a graph is replayed while no other one of the same stream's,
    and nothing else in that stream, is under way.
    """

    def __init__(self, memory: StreamMemory, device: torch.device) -> None:
        """Start the thread, and have it called once.

        Args:
            memory: Of the device.
            device: Whose streams will ring.

        Raises:
            DeviceError: The device does not ring, or does not hear the answer.
        """
        self._memory = memory
        self._device = device
        self._bells = torch.zeros(_BELLS * BELL_BYTES, dtype=torch.uint8, pin_memory=True)
        self._numbers: dict[int, int] = {}  # of bells, by the handles of streams
        self._held = [Doorbell(self._bells.data_ptr(), _BELLS)]  # or nothing, once it is closed
        # The thread must end before its words go: with this object, and at the interpreter's exit,
        # before the vendor's runtime takes all pinned memory back.
        weakref.finalize(self, self._held.clear)
        self._try()

    def launch(self, stream: torch.Stream, function: int, argument: int) -> None:
        """See ``HostFunctions.launch``."""
        if not self._held:
            msg = f"the doorbell of {self._device} is closed"
            raise DeviceError(msg)
        bell = self._bell_of(stream)
        number = self._held[0].number(function, argument)
        self._memory.write(stream, bell + _ANSWER, 0)
        self._memory.write(stream, bell, number)
        self._memory.wait(stream, bell + _ANSWER, number)

    def close(self) -> None:
        """See ``HostFunctions.close``. Waits for the device, which may want an answer.

        A graph that was captured with it must not be replayed any more: nobody would answer.
        """
        if self._held:
            torch.accelerator.synchronize(self._device)
            self._held.clear()

    def _bell_of(self, stream: torch.Stream) -> int:
        handle = int(stream.native_handle)  # type: ignore[attr-defined]  # torch does not list it
        index = self._numbers.setdefault(handle, len(self._numbers))
        if index >= _BELLS:
            msg = (
                f"more than {_BELLS} streams of {self._device} call the host: use fewer, torch has "
                f"32 of each priority"
            )
            raise DeviceError(msg)
        return self._bells.data_ptr() + index * BELL_BYTES

    def _try(self) -> None:
        """Ring once, and free the stream by hand where nobody hears it.

        Raises:
            DeviceError: The device does not ring, or does not hear the answer.
        """
        stream = torch.Stream(device=self._device)
        calls: list[int] = []
        callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: calls.append(1))
        address = ctypes.cast(callback, ctypes.c_void_p).value
        assert address is not None
        self.launch(stream, address, 0)
        end = time.perf_counter() + _PATIENCE_S
        while not (calls and stream.query()):
            if time.perf_counter() > end:
                break
            time.sleep(1e-4)
        else:
            return
        answer = ctypes.c_uint32.from_address(self._bell_of(stream) + _ANSWER)
        answer.value = 1  # the first number there is
        self._held.clear()
        what = "hears no answer" if calls else "does not ring"
        msg = f"{self._device} {what} through pinned memory, within {_PATIENCE_S:.0f} s"
        raise DeviceError(msg)
