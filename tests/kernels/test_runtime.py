"""Threads, tickets and memory of the CPU device, through its Python face.

Numbers are the business of test_forward.py. Here the truth is what one thread answers when it is
asked one thing at a time; everything else must give the same bits. Longer than most files: one set
of fixtures for what is concurrent, what is given back, and what is refused.
"""

from __future__ import annotations

import gc
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.devices import device_for, packed_bytes
from kt_core.errors import UnsupportedFormatError
from kt_core.interfaces import ExpertWeights, Ticket
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.types import (
    Activation,
    ActivationKind,
    ActivationPrecision,
    Capabilities,
    Element,
    MoeSpec,
)
from kt_cpu import _kernels
from kt_cpu.backend import CpuDevice
from kt_cpu.kernel import CpuExpertKernel

FORMATS = {f.descriptor.name: f.descriptor for f in BUILT_IN_FORMATS}
SPEC = MoeSpec(num_experts=6, hidden_size=72, intermediate_size=50)
MIB = 1 << 20

pytestmark = pytest.mark.usefixtures("no_deadlock")


def open_device(threads: int) -> CpuDevice:
    return device_for(threads=threads)


def random_weights(spec: MoeSpec, seed: int) -> ExpertWeights:
    generator = torch.Generator().manual_seed(seed)
    inner, hidden = spec.intermediate_size, spec.hidden_size
    return ExpertWeights(
        gate=torch.randn(inner, hidden, generator=generator) * 0.1,
        up=torch.randn(inner, hidden, generator=generator) * 0.1,
        down=torch.randn(hidden, inner, generator=generator) * 0.1,
    )


def loaded(device: CpuDevice, name: str = "int8", *, layer: int = 0) -> CpuExpertKernel:
    kernel = device.expert_kernel(SPEC, FORMATS[name])
    for expert in range(SPEC.num_experts):
        kernel.load(expert, random_weights(SPEC, layer * 100 + expert))
    return kernel


@dataclass(frozen=True)
class Call:
    """Arguments of one ``submit``, and what comes of it."""

    hidden: torch.Tensor
    expert_ids: torch.Tensor
    weights: torch.Tensor
    want: torch.Tensor

    def submit(self, kernel: CpuExpertKernel) -> Ticket:
        return kernel.submit(self.hidden, self.expert_ids, self.weights)

    def check(self, ticket: Ticket) -> None:
        assert torch.equal(ticket.wait(), self.want)


def calls(count: int, name: str = "int8", *, layer: int = 0) -> list[Call]:
    """Of 0 to 33 tokens; the answers are those of one thread."""
    generator = torch.Generator().manual_seed(count + layer)
    made = []
    with open_device(threads=1) as device:
        kernel = loaded(device, name, layer=layer)
        for index in range(count):
            tokens = index * 7 % 34
            hidden = torch.randn(tokens, SPEC.hidden_size, generator=generator)
            ids = torch.randint(-1, SPEC.num_experts, (tokens, 3), generator=generator)
            weights = torch.rand(tokens, 3, generator=generator)
            want = kernel.submit(hidden, ids, weights).wait()
            assert tokens < 7 or bool(want.abs().max() > 0)
            made.append(Call(hidden, ids, weights, want))
    return made


# ---------------------------------------------------------------- tickets


@pytest.mark.parametrize("threads", range(1, 9))
def test_many_tickets_waited_for_in_any_order(threads: int) -> None:
    wanted = calls(50, "int4-g32")
    with open_device(threads) as device:
        kernel = loaded(device, "int4-g32")
        tickets = [(call, call.submit(kernel)) for call in wanted]
        random.Random(threads).shuffle(tickets)
        for call, ticket in tickets:
            call.check(ticket)
            call.check(ticket)  # waiting twice gives the same again


@pytest.mark.parametrize("threads", [1, 4])
def test_tickets_dropped_without_waiting(threads: int) -> None:
    wanted = calls(40)
    with open_device(threads) as device:
        kernel = loaded(device)
        kept = []
        for index, call in enumerate(wanted):
            # The tensors of a dropped ticket die with it, and others take their memory.
            copy = Call(
                call.hidden.clone(), call.expert_ids.clone(), call.weights.clone(), call.want
            )
            ticket = copy.submit(kernel)
            if index % 2:
                kept.append((copy, ticket))
            del ticket, copy
        for call, ticket in kept:
            call.check(ticket)


def test_a_ticket_keeps_what_it_reads() -> None:
    """The caller's tensors may go before the work begins. With one thread it begins in ``wait``."""
    wanted = calls(20)
    with open_device(threads=1) as device:
        kernel = loaded(device)
        tickets = []
        for call in wanted:
            hidden, ids, weights = (
                tensor.clone() for tensor in (call.hidden, call.expert_ids, call.weights)
            )
            tickets.append(kernel.submit(hidden, ids, weights))
            sizes = hidden.shape, ids.shape
            del hidden, ids, weights
            # Whatever was let go of is overwritten: the allocator hands it out again.
            spoilt = [torch.zeros(size, dtype=torch.int64) for size in sizes for _ in range(4)]
            spoilt += [torch.full(size, 1e9) for size in sizes for _ in range(4)]
        for call, ticket in zip(wanted, tickets, strict=True):
            call.check(ticket)


def test_dropping_a_ticket_finishes_the_work_first() -> None:
    """The caller may reuse its tensors after it. With one thread, nobody else would do the work."""
    call = calls(5)[4]
    with open_device(threads=1) as device:
        kernel = loaded(device)
        ticket = call.submit(kernel)
        out = ticket._out
        del ticket
        assert torch.equal(out, call.want)


def test_dropping_a_bare_ticket_finishes_the_work_first() -> None:
    """The same one floor below, where no Python object waits."""
    call = calls(5)[4]
    out = torch.full_like(call.want, float("nan"))
    with open_device(threads=1) as device:
        kernel = loaded(device)
        ticket = kernel._layer.submit(
            hidden=call.hidden.data_ptr(),
            type=_kernels.DType.float32,
            precision=_kernels.Precision.int8,
            expert_ids=call.expert_ids.data_ptr(),
            weights=call.weights.data_ptr(),
            out=out.data_ptr(),
            tokens=call.expert_ids.shape[0],
            top_k=call.expert_ids.shape[1],
        )
        del ticket
        assert torch.equal(out, call.want)


def test_a_ticket_outlives_its_kernel_and_its_device() -> None:
    wanted = calls(20)
    for threads in (1, 4):
        device = open_device(threads)
        kernel = loaded(device)
        tickets = [(call, call.submit(kernel)) for call in wanted]
        device.close()
        device.close()
        with pytest.raises(RuntimeError, match="the device is closed"):
            device.expert_kernel(SPEC, FORMATS["int8"])
        del kernel, device
        for call, ticket in reversed(tickets):
            call.check(ticket)


def test_kernels_come_and_go_under_busy_threads() -> None:
    """A worker may still hold a finished job when the layer is already gone."""
    call = calls(3)[2]
    with open_device(threads=8) as device:
        for _ in range(200):
            kernel = device.expert_kernel(SPEC, FORMATS["int8"])
            kernel.load(0, random_weights(SPEC, 0))
            ids = call.expert_ids.clamp(max=0)
            out = kernel.submit(call.hidden, ids, call.weights).wait()
            assert bool(torch.isfinite(out).all())
            del kernel


# ---------------------------------------------------------------- several threads, several devices


def run_in_threads(workers: Sequence[Callable[[], None]]) -> None:
    """Start all at once; raise the first error of any."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(workers))

    def guarded(work: Callable[[], None]) -> None:
        try:
            start.wait()
            work()
        except BaseException as error:  # noqa: BLE001 - raised below, in the test's thread
            errors.append(error)

    running = [threading.Thread(target=guarded, args=(work,)) for work in workers]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_several_threads_submit_to_several_layers(threads: int) -> None:
    names = ["int8", "bf16", "int4-g32-asym"]
    wanted = [calls(12, name, layer=layer) for layer, name in enumerate(names)]
    with open_device(threads) as device:
        kernels = [loaded(device, name, layer=layer) for layer, name in enumerate(names)]

        def work(seed: int) -> None:
            order = random.Random(seed)
            for _ in range(4):
                tickets = [
                    (call, call.submit(kernel))
                    for kernel, layer_calls in zip(kernels, wanted, strict=True)
                    for call in order.sample(layer_calls, 6)
                ]
                order.shuffle(tickets)
                for call, ticket in tickets[4:]:  # four are dropped
                    call.check(ticket)

        run_in_threads([lambda seed=seed: work(seed) for seed in range(5)])


def test_several_threads_wait_for_one_ticket() -> None:
    wanted = calls(30)
    with open_device(threads=3) as device:
        kernel = loaded(device)
        tickets = [(call, call.submit(kernel)) for call in wanted]

        def work() -> None:
            for call, ticket in tickets:
                call.check(ticket)

        run_in_threads([work] * 4)


def test_several_threads_load_while_others_compute() -> None:
    many = MoeSpec(num_experts=40, hidden_size=96, intermediate_size=64)
    weights = [random_weights(many, expert) for expert in range(40)]
    with open_device(threads=2) as device:
        alone = device.expert_kernel(many, FORMATS["int4-g32"])
        for expert, value in enumerate(weights):
            alone.load(expert, value)
        kernel = device.expert_kernel(many, FORMATS["int4-g32"])
        kernel.load(0, weights[0])
        hidden, ids, scale = (
            torch.ones(5, 96),
            torch.zeros(5, 1, dtype=torch.int64),
            torch.ones(5, 1),
        )
        want = kernel.submit(hidden, ids, scale).wait()

        def load(first: int) -> None:
            for expert in range(first, 40, 3):
                kernel.load(expert, weights[expert])

        def compute() -> None:
            for _ in range(50):
                assert torch.equal(kernel.submit(hidden, ids, scale).wait(), want)

        run_in_threads([lambda: load(1), lambda: load(2), lambda: load(3), compute])
        assert kernel.resident() == frozenset(range(40))
        for expert in range(40):
            assert packed_bytes(kernel, expert) == packed_bytes(alone, expert)


def test_two_devices_in_one_process() -> None:
    wanted = calls(20)
    first, second = open_device(threads=3), open_device(threads=2)
    kernels = [loaded(first), loaded(second)]
    pairs = [(call, call.submit(kernel)) for call in wanted for kernel in kernels]
    for call, ticket in pairs[::2]:
        call.check(ticket)
    del kernels[0]
    first.close()
    for call, ticket in pairs[1::2]:
        call.check(ticket)
    wanted[3].check(wanted[3].submit(kernels[0]))
    second.close()


# ---------------------------------------------------------------- threads and memory are given back


def task_ids() -> set[str]:
    return {entry.name for entry in Path("/proc/self/task").iterdir()}


def test_no_thread_is_left_after_close() -> None:
    wanted = calls(10)
    before = task_ids()
    device = open_device(threads=5)
    mine = task_ids() - before
    assert len(mine) == 4  # the fifth is whoever waits
    kernel = loaded(device)
    tickets = [(call, call.submit(kernel)) for call in wanted]
    for call, ticket in tickets[:5]:
        call.check(ticket)
    device.close()
    del kernel, tickets, ticket
    deadline = time.monotonic() + 5
    while mine & task_ids() and time.monotonic() < deadline:
        time.sleep(0.01)  # a joined thread stays listed until the kernel has buried it
    assert not mine & task_ids()


def test_threads_that_cannot_be_started_are_an_error() -> None:
    """Not an abort; and those that were started end again. In a process short of addresses."""
    script = """
import importlib.util, os, resource, sys
spec = importlib.util.spec_from_file_location("_kernels", sys.argv[1])
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
try:
    kernels.Device("", 2000)
except RuntimeError as error:
    print(error)
print(len(os.listdir("/proc/self/task")), "left")
"""
    command = [sys.executable, "-I", "-c", script, str(_kernels.__file__)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"only \d+ of 2000 threads could be started .*; ask for fewer", done.stdout)
    assert done.stdout.endswith("1 left\n")


def test_a_process_may_end_with_work_under_way() -> None:
    script = """
import torch
from kt_core.interfaces import ExpertWeights
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.types import MoeSpec
from kt_cpu import CpuBackend
spec = MoeSpec(num_experts=1, hidden_size=256, intermediate_size=256)
device = CpuBackend().open("cpu", threads=3)
kernel = device.expert_kernel(spec, BUILT_IN_FORMATS[0].descriptor)
w = torch.zeros(256, 256)
kernel.load(0, ExpertWeights(gate=w, up=w, down=w))
x, ids, one = torch.zeros(64, 256), torch.zeros(64, 1, dtype=torch.int64), torch.ones(64, 1)
tickets = [kernel.submit(x, ids, one) for _ in range(20)]
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def anonymous_bytes() -> int:
    """Exact, unlike the counters in /proc/self/status, which lag by some pages per thread."""
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    match = re.search(r"^Anonymous: +(\d+) kB$", rollup, re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def test_memory_is_taken_by_loading_and_given_back_by_unloading() -> None:
    spec = MoeSpec(num_experts=256, hidden_size=512, intermediate_size=1024)
    zeros = {"gate": (1024, 512), "up": (1024, 512), "down": (512, 1024)}
    ones = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in zeros.items()}
    good = ExpertWeights(**ones)
    bad = ExpertWeights(**{**ones, "down": torch.full((512, 1024), float("nan"))})
    gc.collect()  # what earlier tests left must not go while we count
    slack = 4 * MIB  # the packer's own buffers, pages that neighbours share, the allocator's own
    with open_device(threads=2) as device:
        start = anonymous_bytes()
        kernel = device.expert_kernel(spec, FORMATS["bf16"])
        size = kernel.bytes_per_expert
        assert size == 3 * MIB
        assert anonymous_bytes() - start < slack  # 768 MiB are only reserved

        for expert in range(8):
            kernel.load(expert, good)
        full = anonymous_bytes() - start
        # Huge pages of 2 MiB may reach beyond the last expert.
        assert 8 * size <= full < 8 * size + 2 * MIB + slack

        kernel.unload(200)  # never loaded: nothing happens
        for expert in (1, 2, 5):
            kernel.unload(expert)
        assert kernel.resident() == {0, 3, 4, 6, 7}
        assert full - (anonymous_bytes() - start) > 3 * size - slack

        with pytest.raises(ValueError, match="down projection of expert 2"):
            kernel.load(2, bad)
        assert full - (anonymous_bytes() - start) > 3 * size - slack
        # An expert that a bad one was to replace is gone too.
        with pytest.raises(ValueError, match="down projection of expert 0"):
            kernel.load(0, bad)
        assert kernel.resident() == {3, 4, 6, 7}
        assert full - (anonymous_bytes() - start) > 4 * size - slack

        kernel.load(1, good)
        assert packed_bytes(kernel, 1) == packed_bytes(kernel, 3)
        del kernel  # five experts; malloc may keep the copies that were just compared
        assert anonymous_bytes() - start < 2 * size + slack


def test_unloading_leaves_the_neighbours_alone() -> None:
    """Experts of some hundred bytes share pages."""
    with open_device(threads=1) as device:
        kernel = loaded(device, "int4-g32")
        before = {expert: packed_bytes(kernel, expert) for expert in range(6)}
        for expert in (0, 2, 5):
            kernel.unload(expert)
        for expert in (1, 3, 4):
            assert packed_bytes(kernel, expert) == before[expert]
        kernel.load(2, random_weights(SPEC, 2))
        assert packed_bytes(kernel, 2) == before[2]


@pytest.mark.parametrize("threads", [1, 3])
def test_memory_does_not_grow_from_call_to_call(threads: int) -> None:
    """Waited for, dropped, refused, and experts swapped: 1000 times each, then nothing is left."""
    hidden, weights = torch.ones(40, SPEC.hidden_size), torch.ones(40, 4)
    ids = torch.arange(160).reshape(40, 4) % SPEC.num_experts
    bad_ids = torch.full((40, 4), SPEC.num_experts)
    swapped = random_weights(SPEC, 0)
    with open_device(threads) as device:
        kernel = loaded(device)

        def round_trip() -> None:
            ticket = kernel.submit(hidden, ids, weights)
            kernel.submit(hidden, ids, weights)
            with pytest.raises(ValueError, match="expert id 6"):
                kernel.submit(hidden, bad_ids, weights)
            ticket.wait()
            kernel.unload(0)
            kernel.load(0, swapped)

        for _ in range(100):
            round_trip()
        before = anonymous_bytes()
        for _ in range(1000):
            round_trip()
        # 256 bytes a round would show.
        assert anonymous_bytes() - before < 256 * 1024


# ---------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def kernel() -> Iterator[CpuExpertKernel]:
    with open_device(threads=2) as device:
        loaded_kernel = loaded(device)
        loaded_kernel.unload(4)
        yield loaded_kernel


def arguments(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    good = {
        "hidden": torch.ones(2, SPEC.hidden_size),
        "expert_ids": torch.tensor([[0, 1, 2], [-1, 5, 5]]),
        "weights": torch.ones(2, 3),
    }
    return {**good, **changes}


IDS = arguments()["expert_ids"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.ones(2, 71)}, r"hidden must be \[tokens, 72\], got .2, 71"),
        ({"hidden": torch.ones(1, 2, 72)}, r"hidden must be \[tokens, 72\], got .1, 2, 72"),
        (
            {"hidden": torch.ones(2, 72).double()},
            "hidden must be float32, bfloat16 or float16.* torch.float64",
        ),
        (
            {"hidden": torch.ones(2, 72).int()},
            "hidden must be float32, bfloat16 or float16.* torch.int32",
        ),
        ({"hidden": torch.ones(2, 72, device="meta")}, "on the cpu, got torch.float32 on meta"),
        ({"hidden": torch.ones(3, 72)}, r"expert_ids must be \[3, k >= 1\], got .2, 3"),
        ({"expert_ids": IDS[0]}, r"expert_ids must be \[2, k >= 1\], got .3"),
        ({"expert_ids": IDS[:, :0]}, r"expert_ids must be \[2, k >= 1\], got .2, 0"),
        ({"expert_ids": IDS.float()}, "expert_ids must be integers.* torch.float32"),
        ({"expert_ids": IDS == 0}, "expert_ids must be integers.* torch.bool"),
        ({"expert_ids": IDS.to("meta")}, "expert_ids must be integers on the cpu, .* meta"),
        ({"weights": torch.ones(2, 2)}, r"weights must be .*2, 3.*, got .*2, 2"),
        ({"weights": torch.ones(2, 3).int()}, "weights must be floating point.* torch.int32"),
        ({"weights": torch.ones(2, 3, device="meta")}, "floating point on the cpu, .* meta"),
        ({"expert_ids": IDS.clamp(max=4)}, "expert 4 is not resident"),
        ({"expert_ids": IDS + 1}, r"expert id 6 .*is outside -1\.\.5"),
        ({"expert_ids": IDS - 1}, r"expert id -2 .*is outside -1\.\.5"),
        ({"expert_ids": IDS + 2**32}, r"expert id 429496729\d .*is outside"),
        (
            {"expert_ids": torch.full((2, 3), -(2**63))},
            "expert id -9223372036854775808 .*is outside",
        ),
    ],
)
def test_arguments_that_are_refused(
    kernel: CpuExpertKernel, changes: dict[str, torch.Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kernel.submit(**arguments(**changes))
    assert bool(torch.isfinite(kernel.submit(**arguments()).wait()).all())


@pytest.mark.parametrize("name", ["hidden", "weights"])
def test_gradients_are_refused_rather_than_dropped(kernel: CpuExpertKernel, name: str) -> None:
    tensors = arguments()
    tensors[name].requires_grad_()
    with pytest.raises(RuntimeError, match=r"submit computes no gradient: use torch.no_grad\(\)"):
        kernel.submit(**tensors)
    want = kernel.submit(**arguments()).wait()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            got = kernel.submit(**tensors).wait()
        assert not got.requires_grad
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_has_the_type_of_the_hidden_states(
    kernel: CpuExpertKernel, dtype: torch.dtype
) -> None:
    exact = arguments(hidden=torch.linspace(-1, 1, 144).reshape(2, 72).to(dtype))
    wide = kernel.submit(**{**exact, "hidden": exact["hidden"].float()}).wait()
    got = kernel.submit(**exact).wait()
    assert got.dtype is dtype
    assert torch.equal(got, wide.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_ids_of_any_integer_type(kernel: CpuExpertKernel, dtype: torch.dtype) -> None:
    ids = IDS.clamp(min=0)
    want = kernel.submit(**arguments(expert_ids=ids)).wait()
    assert torch.equal(kernel.submit(**arguments(expert_ids=ids.to(dtype))).wait(), want)


def test_strided_arguments(kernel: CpuExpertKernel) -> None:
    spread = {name: tensor.T.contiguous().T for name, tensor in arguments().items()}
    assert not any(tensor.is_contiguous() for tensor in spread.values())
    want = kernel.submit(**arguments()).wait()
    assert torch.equal(kernel.submit(**spread).wait(), want)


@pytest.mark.parametrize("expert", [-1, 6, 2**40])
def test_expert_out_of_range(kernel: CpuExpertKernel, expert: int) -> None:
    attempts: list[Callable[[], Any]] = [
        lambda: kernel.load(expert, random_weights(SPEC, 0)),
        lambda: kernel.unload(expert),
        lambda: packed_bytes(kernel, expert),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match=rf"expert must be in 0\.\.5, got {expert}"):
            attempt()


def test_what_a_device_cannot_make() -> None:
    with open_device(threads=1) as device:
        int8_only = Capabilities(elements=frozenset({Element.INT8}), instruction_set="scalar")
        narrow = CpuDevice(device.info, int8_only, 1)
        with pytest.raises(UnsupportedFormatError, match=r"cannot compute format 'bf16'.*int8"):
            narrow.expert_kernel(SPEC, FORMATS["bf16"])
        with pytest.raises(UnsupportedFormatError, match="'bf16' has no int8"):
            device.expert_kernel(SPEC, FORMATS["bf16"], precision=ActivationPrecision.INT8)
        # More address space than a process has.
        huge = MoeSpec(num_experts=2**40, hidden_size=4096, intermediate_size=4096)
        with pytest.raises(MemoryError):
            device.expert_kernel(huge, FORMATS["bf16"])
    with pytest.raises(ValueError, match="at least 1 thread"):
        open_device(threads=0)


def test_the_threads_of_the_pool_do_the_work() -> None:
    """A pool whose workers sleep would pass every test above."""
    big = MoeSpec(
        num_experts=1,
        hidden_size=512,
        intermediate_size=512,
        activation=Activation(kind=ActivationKind.SILU),
    )
    with open_device(threads=3) as device:
        kernel = device.expert_kernel(big, FORMATS["bf16"])
        kernel.load(0, random_weights(big, 0))
        before = task_times()
        deadline = time.monotonic() + 10
        hidden, ids = torch.ones(64, 512), torch.zeros(64, 1, dtype=torch.int64)
        while time.monotonic() < deadline:
            kernel.submit(hidden, ids, torch.ones(64, 1)).wait()
            worked = [
                after - before.get(task, 0.0)
                for task, after in task_times().items()
                if task != str(threading.get_native_id())
            ]
            if sum(seconds > 0 for seconds in worked) >= 2:
                return
    pytest.fail(f"the two workers computed for {worked} s within 10 s")


def task_times() -> dict[str, float]:
    """CPU seconds of every thread of this process."""
    times = {}
    for entry in Path("/proc/self/task").iterdir():
        fields = (entry / "stat").read_text().rpartition(")")[2].split()
        times[entry.name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return times
