"""Copies, streams, events: what overlaps, what waits, and what goes wrong where nobody waits."""

from __future__ import annotations

import threading

import pytest
import torch

from kt_core.errors import DeviceError
from kt_sim.native import NativeDevice
from kt_sim.settings import parse
from sim.host_calls import Note
from sim.target import only_sim

pytestmark = [pytest.mark.sim, only_sim]

SLOW_LINK = "devices=2,memory_gib=0.25,link_gb_s=0.1,memory_gb_s=0,float32_tflops=0"
BYTES = 4_000_000
SECONDS = BYTES / 0.1e9


def held_stream() -> tuple[torch.Stream, Note]:
    """A stream that stands still until the gate of the note is opened."""
    stream, note = torch.Stream("sim"), Note()
    note.gate.clear()
    note.launch(stream)
    return stream, note


def test_a_copy_from_pinned_memory_does_not_wait() -> None:
    pinned = torch.arange(100.0).pin_memory()
    assert pinned.is_pinned()
    assert pinned[10:].is_pinned()
    stream, note = held_stream()
    with stream:
        copy = pinned.to("sim", non_blocking=True)
    assert not stream.query()  # the host is here, and the stream stands still
    note.gate.set()
    stream.synchronize()
    assert torch.equal(copy.cpu(), torch.arange(100.0))


@pytest.mark.parametrize("non_blocking", [True, False])
def test_a_copy_of_pageable_memory_waits(*, non_blocking: bool) -> None:
    pageable = torch.arange(100.0)
    assert not pageable.is_pinned()
    stream, note = held_stream()
    opener = threading.Timer(0.05, note.gate.set)
    opener.start()
    with stream:
        copy = pageable.to("sim", non_blocking=non_blocking)
    assert note.calls == 1  # the gate was opened, or nobody would be here
    assert stream.query()
    opener.join()
    assert torch.equal(copy.cpu(), pageable)


def test_a_missing_synchronisation_shows() -> None:
    target = torch.zeros(1000).pin_memory()
    source = torch.ones(1000, device="sim")
    torch.accelerator.synchronize()
    stream, note = held_stream()
    with stream:
        target.copy_(source, non_blocking=True)
    early = target.sum().item()
    note.gate.set()
    stream.synchronize()
    assert early == 0
    assert target.sum().item() == 1000


def test_pinned_memory_is_not_used_again_while_it_is_copied() -> None:
    stream, note = held_stream()
    pinned = torch.ones(5000).pin_memory()
    address = pinned.data_ptr()
    with stream:
        copy = pinned.to("sim", non_blocking=True)
    del pinned
    other = torch.zeros(5000).pin_memory()
    assert other.data_ptr() != address
    note.gate.set()
    stream.synchronize()
    assert bool((copy.cpu() == 1).all())


def test_the_link_takes_its_time(device: NativeDevice) -> None:
    device.configure(**parse(SLOW_LINK).native())
    begin, end = (torch.Event("sim", enable_timing=True) for _ in range(2))
    pinned = torch.ones(BYTES // 4).pin_memory()
    target = torch.empty(BYTES // 4, device="sim")
    torch.accelerator.synchronize()
    begin.record()
    target.copy_(pinned, non_blocking=True)
    end.record()
    end.synchronize()
    assert begin.elapsed_time(end) >= SECONDS * 1e3  # at least: the host may be slower


def test_one_direction_of_the_link_carries_one_copy_at_a_time(device: NativeDevice) -> None:
    device.configure(**parse(SLOW_LINK).native())
    begin, ends = torch.Event("sim", enable_timing=True), []
    pinned = [torch.ones(BYTES // 4).pin_memory() for _ in range(2)]
    targets = [torch.empty(BYTES // 4, device="sim") for _ in range(2)]
    begin.record()
    begin.synchronize()
    for stream, target, origin in zip(
        (torch.Stream("sim"), torch.Stream("sim")), targets, pinned, strict=True
    ):
        with stream:
            target.copy_(origin, non_blocking=True)
            ends.append(torch.Event("sim", enable_timing=True))
            ends[-1].record(stream)
    for end in ends:
        end.synchronize()
    assert max(begin.elapsed_time(end) for end in ends) >= 2 * SECONDS * 1e3


def test_kernels_take_the_time_of_bytes_and_operations(device: NativeDevice) -> None:
    n = 256
    rates = f"devices=2,memory_gib=0.25,memory_gb_s=0,float32_tflops={2 * n**3 / 0.03 / 1e12}"
    device.configure(**parse(rates).native())
    begin, end = (torch.Event("sim", enable_timing=True) for _ in range(2))
    a = torch.ones(n, n, device="sim")
    begin.record()
    product = a @ a
    end.record()
    end.synchronize()
    assert begin.elapsed_time(end) >= 30
    assert product[0, 0].item() == n


def test_streams_wait_for_events() -> None:
    value = torch.zeros(4, device="sim")
    torch.accelerator.synchronize()
    first, note = held_stream()
    second = torch.Stream("sim")
    with first:
        value.fill_(3)
    second.wait_stream(first)
    with second:
        seen = value.clone()
    assert not second.query()
    note.gate.set()
    second.synchronize()
    assert seen.tolist() == [3, 3, 3, 3]


def test_an_event_that_was_never_recorded_is_passed() -> None:
    event = torch.Event("sim")
    assert event.query()
    event.wait(torch.Stream("sim"))


def test_host_functions_are_called_in_order_by_another_thread() -> None:
    stream, note = torch.Stream("sim"), Note()
    with stream:
        value = torch.full((1000,), 2.0, device="sim")
        seen = torch.empty(1000).pin_memory()
        seen.copy_(value, non_blocking=True)
        note.launch(stream, 11)
    stream.synchronize()
    assert note.arguments == [11]
    assert note.threads != [threading.get_ident()]


def test_later_work_waits_for_a_host_function() -> None:
    stream, note = held_stream()
    with stream:
        value = torch.ones(1, device="sim")
    assert not stream.query()
    note.gate.set()
    assert value.device.type == "sim"
    stream.synchronize()


def test_a_refused_host_function_is_an_error(device: NativeDevice) -> None:
    stream, note = torch.Stream("sim"), Note()
    device.refuse_host_functions(0, 1)
    with pytest.raises(DeviceError, match=r"kt_sim_launch_host_function refused .*injected"):
        note.launch(stream)
    note.launch(stream)
    stream.synchronize()
    assert note.calls == 1


def test_copies_between_devices_are_ordered_on_both() -> None:
    source = torch.ones(100_000, device="sim:0")
    for step in range(5):
        source.add_(1)
        there = source.to("sim:1", non_blocking=True)
        source.mul_(1)
        assert there.device == torch.device("sim:1")
        assert there.sum().item() == 100_000 * (step + 2)


def test_each_device_has_its_streams_and_memory() -> None:
    assert torch.accelerator.device_count() == 2
    torch.accelerator.set_device_index(1)
    assert torch.ones(1, device="sim").device.index == 1
    assert torch.Stream("sim").device.index == 1
    torch.accelerator.set_device_index(0)
    with pytest.raises(RuntimeError, match="at least two devices, sim:0 and sim:1"):
        torch.ones(2, device="sim:0") + torch.ones(2, device="sim:1")
    with pytest.raises(RuntimeError, match="there is no device sim:2"):
        torch.ones(1, device="sim:2")


def test_threads_with_streams_of_their_own_do_not_disturb_each_other() -> None:
    """Each allocates, copies, computes and frees in its stream; the allocators are shared."""
    problems: list[str] = []

    def work(number: int) -> None:
        with torch.Stream(f"sim:{number % 2}") as stream:
            for step in range(40):
                size = 100 + 37 * ((number + step) % 5)
                pinned = torch.full((size,), float(step)).pin_memory()
                x = pinned.to(stream.device, non_blocking=True)
                del pinned  # the copy may not have happened yet
                y = (x * 2 + number).cumsum(0)
                back = torch.empty(size).pin_memory()
                back.copy_(y, non_blocking=True)
                del x, y
                stream.synchronize()
                want = (torch.full((size,), float(step)) * 2 + number).cumsum(0)
                if not torch.equal(back, want):
                    problems.append(f"thread {number}, step {step}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
