"""Calls that a stream starts and joins, made here as an accelerator's runtime would make them."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import pytest
import torch

from kernels.devices import device_for
from kernels.test_runtime import SPEC, Call, calls, loaded
from kt_core.interfaces import HostCall
from kt_cpu.kernel import CpuExpertKernel

pytestmark = pytest.mark.usefixtures("no_deadlock")
FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Made(NamedTuple):
    call: HostCall
    out: torch.Tensor

    def run(self, *, is_joined: bool = True) -> None:
        FUNCTION(self.call.start)(self.call.argument)
        if is_joined:
            FUNCTION(self.call.join)(self.call.argument)


def made(kernel: CpuExpertKernel, one: Call) -> Made:
    out = torch.full_like(one.want, float("nan"))
    return Made(kernel.host_call(one.hidden, one.expert_ids, one.weights, out), out)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_call_gives_what_submit_does_again_and_again(threads: int) -> None:
    wanted = calls(6)[1:]  # a call has tokens
    with device_for(threads=threads) as device:
        kernel = loaded(device)
        for one, (call, out) in [(one, made(kernel, one)) for one in wanted]:
            call.record(is_on=True)
            for _ in range(3):
                out.fill_(float("nan"))
                Made(call, out).run()
                assert torch.equal(out, one.want)
            call.raise_error()
            times = call.take_times()
            assert len(times) == 3
            assert all(t.started <= t.finished <= t.joined for t in times)
            assert call.take_times() == []


@pytest.mark.parametrize("threads", [1, 3])
def test_a_device_knows_how_long_it_was_busy_and_awaited(threads: int) -> None:
    one = calls(6)[5]
    with device_for(threads=threads) as device:
        kernel = loaded(device)
        call = made(kernel, one)
        before = device.usage()
        kernel.submit(one.hidden, one.expert_ids, one.weights).wait()
        alone = device.usage()
        assert alone.busy_s > before.busy_s
        assert alone.awaited_s == before.awaited_s == 0  # who waits helps
        call.call.record(is_on=True)
        call.run()
        (times,) = call.call.take_times()
        usage = device.usage()
    assert 0 < usage.busy_s - alone.busy_s <= (times.finished - times.started) / 1e9
    assert 0 < usage.awaited_s <= (times.joined - times.join_called) / 1e9


def test_an_error_is_kept_and_the_output_is_zeros() -> None:
    one = calls(3)[2]
    with device_for(threads=2) as device:
        kernel = loaded(device)
        call, out = made(kernel, one)
        expert = int(one.expert_ids.max())
        kernel.unload(expert)
        Made(call, out).run()
        assert not out.any()
        with pytest.raises(RuntimeError, match=f"expert {expert} is not resident"):
            call.raise_error()
        call.raise_error()  # once is enough


@pytest.mark.parametrize("threads", [1, 4])
def test_a_call_that_nobody_joins_ends_before_its_tensors_go(threads: int) -> None:
    """As on a device that was lost."""
    one = calls(5)[4]
    with device_for(threads=threads) as device:
        kernel = loaded(device)
        for _ in range(20):
            call, out = made(kernel, one)
            Made(call, out).run(is_joined=False)
            del call
            assert torch.equal(out, one.want)


def test_what_would_be_copied_is_refused() -> None:
    with device_for(threads=1) as device:
        kernel, one = loaded(device), calls(3)[2]
        wide = torch.zeros(one.hidden.shape[0], 2 * SPEC.hidden_size)[:, ::2]
        with pytest.raises(ValueError, match="convert them before"):
            kernel.host_call(wide, one.expert_ids, one.weights, torch.empty_like(one.want))
