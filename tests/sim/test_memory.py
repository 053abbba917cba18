"""Memory of simulated devices: out of the host's reach, limited, cached, given back in order."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys

import pytest
import torch

from kt_sim.native import NativeDevice
from sim.host_calls import Note
from sim.target import only_sim

pytestmark = [pytest.mark.sim, only_sim]
MIB = 2**20

FAULT = """
import ctypes, torch
from kt_sim.device import start
start()
device = torch.ones(4, device="sim")
torch.accelerator.synchronize()
print("before", flush=True)
{action}
print("after", flush=True)
"""


@pytest.mark.parametrize(
    "action",
    [
        "ctypes.string_at(device.data_ptr(), 4)",
        "ctypes.memset(device.data_ptr(), 0, 4)",
        "ctypes.string_at(device[2:].data_ptr(), 4)",
    ],
)
def test_the_host_cannot_touch_it(action: str) -> None:
    command = [sys.executable, "-P", "-c", FAULT.format(action=action)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGSEGV, done.stderr
    assert done.stdout == "before\n"


def test_numpy_is_refused() -> None:
    with pytest.raises(TypeError, match="can't convert sim"):
        torch.ones(2, device="sim").numpy()


def test_more_than_there_is_is_refused() -> None:
    held = torch.empty(200 * MIB, dtype=torch.uint8, device="sim:1")
    with pytest.raises(torch.OutOfMemoryError, match=r"sim:1 is out of memory: .* keep fewer"):
        torch.empty(100 * MIB, dtype=torch.uint8, device="sim:1")
    torch.empty(100 * MIB, dtype=torch.uint8, device="sim:0")  # has its own
    del held
    torch.empty(100 * MIB, dtype=torch.uint8, device="sim:1")  # what was cached is given back


def test_stats_follow() -> None:
    gc.collect()  # what other tests left, in cycles
    torch.accelerator.empty_cache()
    before = torch.accelerator.memory_allocated(0)
    free, total = torch.accelerator.get_memory_info(0)
    assert total == 256 * MIB
    held = torch.empty(10 * MIB, dtype=torch.uint8, device="sim:0")
    assert torch.accelerator.memory_allocated(0) == before + 10 * MIB
    assert torch.accelerator.get_memory_info(0)[0] == free - 10 * MIB
    torch.accelerator.reset_peak_memory_stats(0)
    del held
    assert torch.accelerator.memory_allocated(0) == before
    assert torch.accelerator.max_memory_allocated(0) == before + 10 * MIB
    assert torch.accelerator.get_memory_info(0)[0] == free - 10 * MIB  # cached
    torch.accelerator.empty_cache()
    assert torch.accelerator.get_memory_info(0)[0] == free


def test_freed_memory_is_used_again_at_once_in_its_stream() -> None:
    torch.accelerator.empty_cache()  # or the next of its size might be another
    first = torch.empty(3 * MIB, dtype=torch.uint8, device="sim")
    address = first.data_ptr()
    del first
    stream = torch.Stream("sim")
    with stream:
        elsewhere = torch.empty(3 * MIB, dtype=torch.uint8, device="sim")
    again = torch.empty(3 * MIB, dtype=torch.uint8, device="sim")
    assert elsewhere.data_ptr() != address
    assert again.data_ptr() == address


def reuse_while_another_stream_reads(*, recorded: bool) -> torch.Tensor:
    """Let a stream wait, free what it will read, and overwrite that memory meanwhile."""
    torch.accelerator.empty_cache()  # or the next of its size might be another
    source = torch.ones(MIB, device="sim")
    torch.accelerator.synchronize()
    reader, note = torch.Stream("sim"), Note()
    note.gate.clear()
    with reader:
        note.launch(reader)
        read = source.clone()
    if recorded:
        source.record_stream(reader)
    del source
    overwritten = torch.zeros(MIB, device="sim")
    torch.accelerator.current_stream().synchronize()
    note.gate.set()
    reader.synchronize()
    del overwritten
    return read.cpu()


def test_record_stream_keeps_memory_for_another_stream() -> None:
    assert bool((reuse_while_another_stream_reads(recorded=True) == 1).all())


def test_without_record_stream_the_bug_shows() -> None:
    assert bool((reuse_while_another_stream_reads(recorded=False) == 0).all())


def test_injected_failure_of_an_allocation(device: NativeDevice) -> None:
    device.fail_allocations(0, 1)
    with pytest.raises(torch.OutOfMemoryError, match="the failure was injected"):
        torch.empty(4, device="sim")
    assert torch.ones(4, device="sim").sum().item() == 4


def test_resizing_keeps_what_was_there() -> None:
    tensor = torch.arange(4, device="sim").resize_(8)
    assert tensor[:4].tolist() == [0, 1, 2, 3]
