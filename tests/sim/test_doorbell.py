"""The doorbell on a device that writes and waits for words as a GPU's streams do."""

from __future__ import annotations

import ctypes
import gc
import time
from pathlib import Path

import pytest
import torch

from kt_core.accelerator import doorbell
from kt_core.accelerator.doorbell import DoorbellHostFunctions, StreamMemory
from kt_core.errors import DeviceError
from kt_core.hardware.graphs import capture
from kt_core.interfaces import ExpertDevice
from kt_core.moe.host_lane import PinnedBuffers
from kt_sim.backend import host_functions
from sim.target import WHERE, only_sim, stream
from sim.test_hybrid_experts import check, host, hybrid

pytestmark = [pytest.mark.sim, only_sim]
__all__ = ["host"]

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Words(StreamMemory):
    """Writes and waits in the simulated device's thread, which is a stream's as long."""

    def __init__(self, *, is_deaf: bool = False) -> None:
        self._functions = host_functions()
        self._kept: list[object] = []  # a graph may call them again
        self._is_deaf = is_deaf

    def write(self, stream: torch.Stream, address: int, value: int) -> None:
        word = ctypes.c_uint32.from_address(address)

        def put(_: int | None) -> None:
            word.value = value

        if not self._is_deaf:
            self._launch(stream, put)

    def wait(self, stream: torch.Stream, address: int, value: int) -> None:
        word = ctypes.c_uint32.from_address(address)

        def wait(_: int | None) -> None:
            while word.value != value:
                time.sleep(1e-5)

        self._launch(stream, wait)

    def _launch(self, stream: torch.Stream, function: object) -> None:
        callback = _CALLBACK(function)
        self._kept.append(callback)
        address = ctypes.cast(callback, ctypes.c_void_p).value
        assert address is not None
        self._functions.launch(stream, address, 0)


@pytest.fixture
def bell() -> DoorbellHostFunctions:
    return DoorbellHostFunctions(Words(), torch.device(WHERE))


class Calls:
    """Functions that note their argument."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self._callback = _CALLBACK(lambda argument: self.seen.append(argument or 0))
        address = ctypes.cast(self._callback, ctypes.c_void_p).value
        assert address is not None
        self.address = address


def test_calls_in_the_order_of_a_stream(bell: DoorbellHostFunctions) -> None:
    calls, line = Calls(), stream()
    value = torch.zeros(3, device=WHERE)
    pinned = torch.zeros(3).pin_memory()
    for number in range(20):
        with line:
            value.fill_(number)
            pinned.copy_(value, non_blocking=True)
        bell.launch(line, calls.address, 1 + number % 3)
    line.synchronize()
    assert calls.seen == [1 + number % 3 for number in range(20)]


def test_streams_have_bells_of_their_own(bell: DoorbellHostFunctions) -> None:
    calls, lines = Calls(), [stream() for _ in range(4)]
    for number in range(40):
        bell.launch(lines[number % 4], calls.address, 1 + number)
    torch.accelerator.synchronize()
    for line in range(4):
        assert [n for n in calls.seen if (n - 1) % 4 == line] == list(range(1 + line, 41, 4))


def test_a_graph_rings_as_often_as_it_is_replayed(bell: DoorbellHostFunctions) -> None:
    calls = Calls()
    line = stream()
    with capture(torch.device(WHERE), line) as graph:
        bell.launch(line, calls.address, 5)
        bell.launch(line, calls.address, 6)
    assert calls.seen == []
    for _ in range(3):
        graph.replay()
        torch.accelerator.synchronize()
    assert calls.seen == [5, 6] * 3


def test_it_wakes_up_after_a_silence(bell: DoorbellHostFunctions) -> None:
    calls, line = Calls(), stream()
    time.sleep(0.05)  # longer than it stays awake
    bell.launch(line, calls.address, 1)
    line.synchronize()
    assert calls.seen == [1]


def test_experts_on_the_host_join_in(host: ExpertDevice, bell: DoorbellHostFunctions) -> None:
    layer = hybrid(host, {1, 4, 6}, buffers=PinnedBuffers(), functions=bell)
    for tokens in (1, 3, 70, 1):
        check(layer, tokens, seed=tokens)


def test_a_device_that_does_not_ring_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doorbell, "_PATIENCE_S", 0.05)
    with pytest.raises(DeviceError, match="does not ring through pinned memory"):
        DoorbellHostFunctions(Words(is_deaf=True), torch.device(WHERE))
    torch.accelerator.synchronize()  # the stream was set free


def test_the_thread_ends_with_whoever_started_it() -> None:
    def threads() -> int:
        names = [file.read_text() for file in Path("/proc/self/task").glob("*/comm")]
        return names.count("kt-doorbell\n")

    gc.collect()  # those of earlier tests
    before = threads()
    bell = DoorbellHostFunctions(Words(), torch.device(WHERE))
    assert threads() == before + 1
    del bell
    assert threads() == before


def test_closed(bell: DoorbellHostFunctions) -> None:
    bell.close()
    bell.close()
    with pytest.raises(DeviceError, match="is closed"):
        bell.launch(stream(), 1, 1)
