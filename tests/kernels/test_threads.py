"""Where the threads of a pool run, and that idle ones are out of the way."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kernels.devices import device_for
from kt_core import hardware
from kt_core.interfaces import ExpertWeights, HostCall
from kt_core.quant import BUILT_IN_FORMATS
from kt_core.types import MoeSpec
from kt_cpu import CpuBackend, _kernels
from kt_cpu.backend import CpuDevice
from kt_cpu.kernel import CpuExpertKernel
from kt_cpu.topology import Node, Thread, Topology, plan_topology

FORMATS = {f.descriptor.name: f.descriptor for f in BUILT_IN_FORMATS}
SPEC = MoeSpec(num_experts=4, hidden_size=256, intermediate_size=320)
CPUS = tuple(sorted(os.sched_getaffinity(0)))
TASKS = Path("/proc/self/task")

pytestmark = pytest.mark.usefixtures("no_deadlock")


def open_device(topology: Topology) -> CpuDevice:
    return device_for(topology=topology)


def pinned(*cpus: tuple[int, ...]) -> Topology:
    return Topology((Node(0, CPUS, 0),), tuple(Thread(0, own) for own in cpus))


def loaded(device: CpuDevice) -> CpuExpertKernel:
    kernel = device.expert_kernel(SPEC, FORMATS["int8"])
    inner, hidden = SPEC.intermediate_size, SPEC.hidden_size
    generator = torch.Generator().manual_seed(0)
    for expert in range(SPEC.num_experts):
        shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        made = {n: torch.randn(shape, generator=generator) * 0.1 for n, shape in shapes.items()}
        kernel.load(expert, ExpertWeights(**made))
    return kernel


def compute(kernel: CpuExpertKernel, tokens: int = 40) -> torch.Tensor:
    ids = torch.arange(2 * tokens).reshape(tokens, 2) % SPEC.num_experts
    hidden = torch.linspace(-1, 1, tokens * SPEC.hidden_size).reshape(tokens, -1)
    return kernel.submit(hidden, ids, torch.ones(tokens, 2)).wait()


@pytest.fixture(scope="module")
def wanted() -> torch.Tensor:
    with open_device(pinned(())) as device:
        return compute(loaded(device))


def task_ids() -> set[str]:
    return {entry.name for entry in TASKS.iterdir()}


def allowed_cpus(task: str) -> set[int]:
    status = (TASKS / task / "status").read_text(encoding="ascii")
    match = re.search(r"^Cpus_allowed_list:\s*(.*)$", status, re.MULTILINE)
    assert match is not None
    found: set[int] = set()
    for part in match[1].split(","):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found


# ---------------------------------------------------------------- where


def test_workers_run_where_the_topology_says(wanted: torch.Tensor) -> None:
    own = [(), (CPUS[0],), (CPUS[-1],), CPUS, ()]
    before = task_ids()
    with open_device(pinned(*own)) as device:
        workers = sorted(task_ids() - before, key=int)
        assert [allowed_cpus(task) for task in workers] == [set(cpus or CPUS) for cpus in own[1:]]
        assert torch.equal(compute(loaded(device)), wanted)


def test_the_backend_pins_to_physical_cores_unless_told_not_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = hardware.detect(with_accelerators=False).cpu
    threads = len(cpu.physical_cores)
    plan = [set(t.cpus or CPUS) for t in plan_topology(cpu, threads, lambda _: 0).threads]
    if threads > 1:
        assert plan == [{core} for core in cpu.physical_cores]

    def places(numa: bool | None) -> list[set[int]]:
        before = task_ids()
        with CpuBackend().open("cpu", threads=threads, numa=numa):
            return [allowed_cpus(task) for task in sorted(task_ids() - before, key=int)]

    anywhere = [set(CPUS)] * (threads - 1)
    monkeypatch.delenv("KT_NUMA", raising=False)
    assert places(None) == places(True) == plan[1:]
    assert places(False) == anywhere
    monkeypatch.setenv("KT_NUMA", "off")
    assert places(None) == anywhere
    assert places(True) == plan[1:]


def test_whoever_waits_may_run_where_it_could(wanted: torch.Tensor) -> None:
    before = os.sched_getaffinity(0)
    with open_device(pinned((CPUS[0],), (CPUS[-1],))) as device:
        kernel = loaded(device)
        for _ in range(20):
            assert torch.equal(compute(kernel), wanted)
            assert os.sched_getaffinity(0) == before
        try:
            os.sched_setaffinity(0, {CPUS[-1]})  # and not where it must not
            assert torch.equal(compute(kernel), wanted)
            assert os.sched_getaffinity(0) == {CPUS[-1]}
        finally:
            os.sched_setaffinity(0, before)


@pytest.mark.parametrize("cpu", [1023, 1 << 20, -1])
def test_a_processor_that_is_not_there(
    wanted: torch.Tensor, caplog: pytest.LogCaptureFixture, cpu: int
) -> None:
    with (
        caplog.at_level(logging.WARNING),
        open_device(pinned((cpu,), (cpu,), (cpu,))) as device,
    ):
        assert torch.equal(compute(loaded(device)), wanted)
    assert len(caplog.messages) == 1
    assert "cannot be pinned to their cores (Invalid argument)" in caplog.messages[0]


@pytest.mark.parametrize(
    ("nodes", "threads", "message"),
    [
        ([], [(0, ())], "1 to 32 nodes, got 0"),
        ([(n, (), 0) for n in range(33)], [(n, ()) for n in range(33)], "1 to 32 nodes, got 33"),
        ([(0, (), 0)], [], "at least 1 thread"),
        ([(0, (), 0)], [(1, ())], "a thread is on no node"),
        ([(0, (), 0), (1, (), 0)], [(0, ())], "a node has no thread"),
    ],
)
def test_a_topology_that_makes_no_sense(
    nodes: list[tuple[int, tuple[int, ...], int]],
    threads: list[tuple[int, tuple[int, ...]]],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        _kernels.Device("", nodes, threads)


# ---------------------------------------------------------------- for a stream

_HOST_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def host_call(kernel: CpuExpertKernel, tokens: int = 40) -> tuple[HostCall, torch.Tensor]:
    """A call of what ``compute`` computes, and where its output will be: NaN until then."""
    ids = torch.arange(2 * tokens).reshape(tokens, 2) % SPEC.num_experts
    hidden = torch.linspace(-1, 1, tokens * SPEC.hidden_size).reshape(tokens, -1)
    out = torch.full_like(hidden, torch.nan)
    return kernel.host_call(hidden, ids, torch.ones(tokens, 2), out), out


def start(call: HostCall) -> None:
    _HOST_FUNCTION(call.start)(call.argument)


def join(call: HostCall) -> None:
    _HOST_FUNCTION(call.join)(call.argument)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_experts_are_computed_before_anybody_waits(wanted: torch.Tensor, threads: int) -> None:
    """Whoever started them is busy with something else; with one thread, too."""
    with open_device(pinned(*[()] * threads)) as device:
        call, out = host_call(loaded(device))
        call.record(is_on=True)
        for _ in range(20):
            out.fill_(torch.nan)
            start(call)
            while out.isnan().any():  # until the last number is there: ends without a join
                time.sleep(0)
            join(call)
            assert torch.equal(out, wanted)
        call.raise_error()
        assert len(call.take_times()) == 20


def test_one_thread_stands_in_for_whoever_waits(wanted: torch.Tensor) -> None:
    before = task_ids()
    with open_device(pinned((), (CPUS[0],))) as device:
        kernel = loaded(device)
        assert torch.equal(compute(kernel), wanted)
        workers = task_ids() - before
        assert len(workers) == 1
        calls = [host_call(kernel) for _ in range(3)]
        stand_in = task_ids() - before - workers
        assert len(stand_in) == 1
        for call, _ in calls:  # all of them are under way at the same time
            start(call)
        assert torch.equal(compute(kernel), wanted)  # and so is one that somebody waits for
        for call, out in calls:
            join(call)
            assert torch.equal(out, wanted)
        assert task_ids() - before - workers == stand_in
        del call, calls, kernel
    assert not stand_in & task_ids()


def test_the_stand_in_runs_where_the_first_thread_may() -> None:
    before = task_ids()
    with open_device(pinned((CPUS[-1],))) as device:
        call, _ = host_call(loaded(device))
        (stand_in,) = task_ids() - before
        assert allowed_cpus(stand_in) == {CPUS[-1]}
        del call


def test_a_call_that_nobody_joins_is_finished_before_it_goes(wanted: torch.Tensor) -> None:
    with open_device(pinned(())) as device:
        call, out = host_call(loaded(device))
        start(call)
        del call
        assert torch.equal(out, wanted)


# ---------------------------------------------------------------- out of the way


def processor_ns(task: str) -> int:
    """Processor time of a thread of this process, up to this moment.

    The clock is CPUCLOCK_SCHED of the kernel's include/linux/posix-timers.h; the counters under
    /proc lag by a tick.
    """
    return time.clock_gettime_ns((~int(task) << 3) | 6)


@pytest.mark.parametrize("threads", [2, 4])
def test_idle_workers_park_within_a_millisecond(threads: int) -> None:
    """What they use of a processor after the work is done; how long that takes says nothing."""
    before = task_ids()
    with open_device(pinned(*[()] * threads)) as device:
        workers = task_ids() - before
        kernel = loaded(device)
        busy_ns = 0
        for _ in range(3):
            start = {task: processor_ns(task) for task in workers}
            for _ in range(20):
                compute(kernel, tokens=200)
            at_end = {task: processor_ns(task) for task in workers}
            time.sleep(0.2)
            for task in workers:
                assert processor_ns(task) - at_end[task] < 1_000_000
            busy_ns += sum(at_end[task] - start[task] for task in workers)
        assert busy_ns > 0  # else the clock stands still


def test_engines_on_the_same_cores_compute_at_the_same_time(wanted: torch.Tensor) -> None:
    """Each has its own workers on each processor, and all callers want the first one."""
    start = threading.Barrier(3)
    errors: list[BaseException] = []
    places = [(cpu,) for cpu in CPUS]

    def engine(topology: Topology) -> Callable[[], None]:
        def work() -> None:
            try:
                with open_device(topology) as device:
                    kernel = loaded(device)
                    start.wait()
                    for _ in range(100):
                        assert torch.equal(compute(kernel), wanted)
            except BaseException as error:  # noqa: BLE001 - raised below, in the test's thread
                errors.append(error)
                start.abort()

        return work

    both = Topology(
        (Node(0, CPUS[:1], 1 << 40), Node(0, CPUS[1:], 1 << 40)),
        tuple(Thread(n % 2, place) for n, place in enumerate(places * 2)),
    )
    engines = [engine(pinned(*places)), engine(pinned(*places * 2)), engine(both)]
    running = [threading.Thread(target=work) for work in engines]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]
