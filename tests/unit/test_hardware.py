"""The machine as kt sees it: invented ones in tmp_path, this one, and pretended devices."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kt_core import _hardware, hardware
from kt_core.errors import KtError
from kt_core.hardware import Accelerator, Hardware, NumaNode, SystemFileError
from kt_core.hardware.cpu import Cpu

GIB = 1 << 30
KIB_PER_GIB = 1 << 20
V2_MOUNT = "24 18 0:22 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
Files = dict[str, str]
CPU = "sys/devices/system/cpu"
NODE = "sys/devices/system/node"


def meminfo(total_gib: float, available_gib: float) -> Files:
    kib = [int(gib * KIB_PER_GIB) for gib in (total_gib, available_gib)]
    text = f"MemTotal:       {kib[0]} kB\nMemFree:        1 kB\nMemAvailable:   {kib[1]} kB\n"
    return {"proc/meminfo": text + "HugePages_Total:       0\n"}


def node(number: int, cpulist: str, gib: int) -> Files:
    prefix = f"Node {number} "
    kib = gib * KIB_PER_GIB
    text = f"{prefix}MemTotal:       {kib} kB\n{prefix}MemFree:        {kib} kB\n"
    return {
        f"{NODE}/node{number}/cpulist": cpulist + "\n",
        f"{NODE}/node{number}/meminfo": text,
    }


def siblings(cpus: Mapping[int, str]) -> Files:
    return {f"{CPU}/cpu{cpu}/topology/thread_siblings_list": s + "\n" for cpu, s in cpus.items()}


def two_sockets() -> Files:
    """2 sockets of 2 cores of 2 threads, numbered as Linux does: 4-7 are the second threads."""
    return {
        **meminfo(64, 60),
        f"{CPU}/online": "0-7\n",
        **siblings({cpu: f"{cpu % 4},{cpu % 4 + 4}" for cpu in range(8)}),
        f"{NODE}/online": "0-1\n",
        **node(0, "0-1,4-5", 32),
        **node(1, "2-3,6-7", 32),
    }


def write(root: Path, files: Files) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def detect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Hardware]:
    monkeypatch.setattr("kt_core.hardware.machine.detect_accelerators", lambda: ())

    def detect_files(files: Files, *, affinity: Any) -> Hardware:
        return hardware.detect(root=write(tmp_path, files), affinity=affinity)

    return detect_files


def test_two_sockets_with_smt(detect: Callable[..., Hardware]) -> None:
    found = detect(two_sockets(), affinity=range(8))
    assert found.cpu.logical_cpus == tuple(range(8))
    assert found.cpu.physical_cores == (0, 1, 2, 3)
    assert found.cpu.numa_nodes == (
        NumaNode(id=0, cpus=(0, 1, 4, 5), memory_bytes=32 * GIB),
        NumaNode(id=1, cpus=(2, 3, 6, 7), memory_bytes=32 * GIB),
    )
    assert found.cpu.cgroup_cpus is None
    assert found.cpu.usable_threads == 4
    assert found.memory.total_bytes == 64 * GIB
    assert found.memory.available_bytes == 60 * GIB
    assert found.memory.cgroup_limit_bytes is None


def test_affinity_selects_cores_and_processors_of_nodes(detect: Callable[..., Hardware]) -> None:
    cpu = detect(two_sockets(), affinity={1, 5, 6}).cpu
    assert cpu.logical_cpus == (1, 5, 6)
    assert cpu.physical_cores == (1, 6)  # 5 is a thread of core 1; 6 is the one allowed of its core
    assert [found.cpus for found in cpu.numa_nodes] == [(1, 5), (6,)]


def test_offline_processors_are_left_out(detect: Callable[..., Hardware]) -> None:
    files = {
        **meminfo(8, 8),
        f"{CPU}/online": "0,2\n",  # SMT switched off: cpu1 and cpu3 have no topology folder
        f"{CPU}/cpu0/topology/core_cpus_list": "0\n",
        f"{CPU}/cpu2/topology/core_cpus_list": "2\n",
    }
    cpu = detect(files, affinity=range(4)).cpu
    assert (cpu.logical_cpus, cpu.physical_cores) == ((0, 2), (0, 2))


def test_online_list_that_contradicts_the_mask_is_not_believed(
    detect: Callable[..., Hardware],
) -> None:
    cpu = detect({**meminfo(8, 8), f"{CPU}/online": "0-1\n"}, affinity={12, 13}).cpu
    assert cpu.logical_cpus == (12, 13)


def test_memory_only_node_is_a_node(detect: Callable[..., Hardware]) -> None:
    files = {**two_sockets(), f"{NODE}/online": "0-2\n", **node(2, "", 128)}
    nodes = detect(files, affinity=range(8)).cpu.numa_nodes
    assert nodes[2] == NumaNode(id=2, cpus=(), memory_bytes=128 * GIB)


def test_node_outside_the_cpuset_has_no_memory_for_us(detect: Callable[..., Hardware]) -> None:
    files = {**two_sockets(), "proc/self/status": "Name:\tkt\nMems_allowed_list:\t0\n"}
    nodes = detect(files, affinity=[0, 1, 2]).cpu.numa_nodes
    assert nodes[1] == NumaNode(id=1, cpus=(2,), memory_bytes=0)
    assert len(detect(files, affinity=[0, 1]).cpu.numa_nodes) == 1


def test_without_sysfs_cores_come_from_cpuinfo(detect: Callable[..., Hardware]) -> None:
    blocks = [
        f"processor\t: {cpu}\nmodel name\t: Some CPU\nphysical id\t: 0\ncore id\t\t: {cpu // 2}\n"
        for cpu in range(4)
    ]
    cpu = detect({**meminfo(8, 8), "proc/cpuinfo": "\n".join(blocks)}, affinity=range(4)).cpu
    assert cpu.physical_cores == (0, 2)
    assert cpu.numa_nodes == (NumaNode(id=0, cpus=(0, 1, 2, 3), memory_bytes=8 * GIB),)


def test_nodes_without_description_are_one_node(detect: Callable[..., Hardware]) -> None:
    cpu = detect({**meminfo(8, 8), f"{NODE}/online": "0-1\n"}, affinity=[0, 1]).cpu
    assert cpu.numa_nodes == (NumaNode(id=0, cpus=(0, 1), memory_bytes=8 * GIB),)


def test_without_any_file_each_processor_is_a_core(detect: Callable[..., Hardware]) -> None:
    found = detect({}, affinity=[3, 1])
    assert found.cpu.physical_cores == (1, 3)
    assert found.memory.total_bytes >= found.memory.available_bytes > 0  # by sysconf


@pytest.mark.parametrize(
    ("files", "name", "vendor"),
    [
        ({"proc/cpuinfo": "processor : 0\nvendor_id : X\nmodel name : Y 1\n"}, "Y 1", "X"),
        ({"proc/cpuinfo": "processor : 0\nCPU implementer : 0x41\n"}, None, "0x41"),
        ({"proc/device-tree/model": "Some Board\0"}, "Some Board", ""),
        ({}, None, ""),
    ],
)
def test_name_without_cpuid(
    files: Files,
    name: str | None,
    vendor: str,
    detect: Callable[..., Hardware],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_hardware, "read_registers", _hardware.Registers)
    cpu = detect({**meminfo(8, 8), **files}, affinity=[0]).cpu
    assert (cpu.name, cpu.vendor) == (name or platform.machine(), vendor)
    assert cpu.features == frozenset()


def test_empty_affinity_is_refused(detect: Callable[..., Hardware]) -> None:
    with pytest.raises(ValueError, match="affinity must name"):
        detect(meminfo(8, 8), affinity=())


@pytest.mark.parametrize(
    ("cores", "quota", "threads"),
    [(8, None, 8), (8, 3.9, 3), (8, 0.5, 1), (2, 16.0, 2), (1, None, 1)],
)
def test_usable_threads(cores: int, quota: float | None, threads: int) -> None:
    cpu = Cpu(
        name="",
        vendor="",
        architecture="",
        features=frozenset(),
        logical_cpus=tuple(range(2 * cores)),
        physical_cores=tuple(range(cores)),
        numa_nodes=(),
        cgroup_cpus=quota,
    )
    assert cpu.usable_threads == threads


def test_memory_is_bounded_by_the_group(detect: Callable[..., Hardware]) -> None:
    files = {
        **meminfo(64, 60),
        "proc/self/cgroup": "0::/box\n",
        "proc/self/mountinfo": V2_MOUNT,
        "sys/fs/cgroup/box/cpu.max": "200000 100000\n",
        "sys/fs/cgroup/box/memory.max": f"{10 * GIB}\n",
        "sys/fs/cgroup/box/memory.current": f"{4 * GIB}\n",
    }
    found = detect({**two_sockets(), **files}, affinity=range(8))
    assert found.memory.available_bytes == 6 * GIB
    assert found.memory.cgroup_limit_bytes == 10 * GIB
    assert found.cpu.usable_threads == 2


def test_available_memory_alone(tmp_path: Path) -> None:
    assert hardware.available_memory_bytes(root=write(tmp_path, meminfo(4, 3))) == 3 * GIB


def test_what_a_node_has_to_give(tmp_path: Path) -> None:
    counts = {"MemTotal": 90, "MemFree": 7, "Active(file)": 20, "Inactive(file)": 3, "Active": 55}
    lines = [f"Node 1 {name}:   {gib * KIB_PER_GIB} kB\n" for name, gib in counts.items()]
    root = write(tmp_path, {f"{NODE}/node1/meminfo": "".join(lines)})
    assert hardware.available_node_bytes(1, root=root) == 30 * GIB
    assert hardware.available_node_bytes(0, root=root) == 0  # there is no such node
    write(tmp_path, {f"{NODE}/node1/meminfo": "".join(lines[:2])})
    with pytest.raises(SystemFileError, match=r"a line 'Active\(file\): <number> kB'"):
        hardware.available_node_bytes(1, root=root)


BROKEN_V2: Files = {"proc/self/cgroup": "0::/\n", "proc/self/mountinfo": V2_MOUNT}


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({f"{CPU}/online": "0-\n"}, f"{CPU}/online"),
        ({f"{CPU}/cpu0/topology/core_cpus_list": "zero\n"}, "core_cpus_list"),
        ({f"{NODE}/online": "all\n"}, f"{NODE}/online"),
        ({f"{NODE}/online": "0\n", **node(0, "0;1", 8)}, "node0/cpulist"),
        (
            {f"{NODE}/online": "0\n", **node(0, "0", 8), f"{NODE}/node0/meminfo": "?"},
            "node0/meminfo",
        ),
        ({"proc/meminfo": "MemTotal: 5 kB\n"}, "proc/meminfo"),
        ({"proc/meminfo": "MemTotal: 5 pages\nMemAvailable: 5 kB\n"}, "proc/meminfo"),
        ({"proc/cpuinfo": "processor : first\n"}, "proc/cpuinfo"),
        ({"proc/self/cgroup": "nonsense\n"}, "proc/self/cgroup"),
        ({**BROKEN_V2, "proc/self/mountinfo": "nonsense\n"}, "proc/self/mountinfo"),
        ({**BROKEN_V2, "sys/fs/cgroup/cpu.max": "half\n"}, "cpu.max"),
        ({**BROKEN_V2, "sys/fs/cgroup/cpu.max": "0 100000\n"}, "cpu.max"),
        ({**BROKEN_V2, "sys/fs/cgroup/memory.max": "8G\n"}, "memory.max"),
        ({**BROKEN_V2, "sys/fs/cgroup/memory.max": "8\n"}, "memory.current"),
        ({**BROKEN_V2, "sys/fs/cgroup/memory.stat": "anon\n"}, "memory.stat"),
    ],
)
def test_malformed_file_is_named(
    files: Files, named: str, detect: Callable[..., Hardware], tmp_path: Path
) -> None:
    with pytest.raises(SystemFileError, match=r"cannot (parse|find)") as caught:
        detect({**meminfo(8, 8), **files}, affinity=[0])
    assert named in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert isinstance(caught.value, KtError)


def test_unreadable_file_is_named(detect: Callable[..., Hardware], tmp_path: Path) -> None:
    (tmp_path / "proc/meminfo").mkdir(parents=True)  # read(2) fails, also for root
    with pytest.raises(SystemFileError, match=r"cannot read .*proc/meminfo: Is a directory"):
        detect({}, affinity=[0])


# This process, this machine -------------------------------------------------------------------


def test_process_memory_follows_an_allocation() -> None:
    before = hardware.process_memory()
    block = bytearray(os.urandom(1)) * (32 << 20)
    after = hardware.process_memory()
    # The kernel adds up per-thread counters late: up to 64 pages are missing for each thread.
    assert after.anonymous_bytes - before.anonymous_bytes > (28 << 20)
    assert after.rss_bytes >= after.anonymous_bytes
    assert after.peak_rss_bytes >= after.rss_bytes - (4 << 20)
    del block


def test_process_memory_is_read_from_status(tmp_path: Path) -> None:
    status = "VmPeak:\t 9 kB\nVmHWM:\t 3 kB\nVmRSS:\t 2 kB\nRssAnon:\t 1 kB\nRssFile:\t 1 kB\n"
    write(tmp_path, {"proc/self/status": status})
    assert hardware.process_memory(root=tmp_path) == (2048, 1024, 3072)
    write(tmp_path, {"proc/self/status": "Name:\tkt\n"})
    with pytest.raises(SystemFileError, match="proc/self/status: expected a line 'VmRSS"):
        hardware.process_memory(root=tmp_path)
    (tmp_path / "proc/self/status").unlink()
    with pytest.raises(SystemFileError, match=r"cannot find .*proc/self/status"):
        hardware.process_memory(root=tmp_path)


def test_this_machine_is_described() -> None:
    found = hardware.detect()
    assert set(found.cpu.logical_cpus) == os.sched_getaffinity(0)
    assert set(found.cpu.physical_cores) <= set(found.cpu.logical_cpus)
    assert 1 <= found.cpu.usable_threads <= len(found.cpu.logical_cpus)
    on_nodes = [cpu for found_node in found.cpu.numa_nodes for cpu in found_node.cpus]
    assert sorted(on_nodes) == list(found.cpu.logical_cpus)
    assert found.cpu.name
    assert 0 < found.memory.available_bytes <= found.memory.total_bytes
    assert (found.accelerators == ()) == (not torch.accelerator.is_available())


def test_importing_does_nothing() -> None:
    """In a child, as this process has long imported torch."""
    code = (
        "import sys, kt_core._hardware as cpuid\n"
        "cpuid.read_registers = cpuid.request_amx_permission = None\n"
        "sys.addaudithook(lambda event, args: event == 'open' and str(args[0]).startswith("
        "('/proc', '/sys')) and sys.exit(f'opened {args[0]}'))\n"
        "import kt_core.hardware\n"
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)\n"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr


# Accelerators ---------------------------------------------------------------------------------


def pretend(monkeypatch: pytest.MonkeyPatch, *, count: int = 1, **module: object) -> None:
    """Let torch be built for an accelerator of type ``cuda`` whose module has these members."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(**module))


def test_accelerators_by_their_properties(monkeypatch: pytest.MonkeyPatch) -> None:
    def properties(index: int) -> SimpleNamespace:
        return SimpleNamespace(name=f"Big {index}", total_memory=(index + 1) * GIB)

    pretend(monkeypatch, count=2, get_device_properties=properties)
    assert hardware.detect_accelerators() == (
        Accelerator(device="cuda:0", name="Big 0", memory_bytes=GIB),
        Accelerator(device="cuda:1", name="Big 1", memory_bytes=2 * GIB),
    )


def test_accelerator_without_properties_is_asked_for_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda device: (GIB, 2 * GIB))
    expected = Accelerator(device="cuda:0", name="cuda", memory_bytes=2 * GIB)
    assert hardware.detect_accelerators() == (expected,)


def test_broken_accelerator_is_logged_and_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def properties(index: int) -> SimpleNamespace:
        if index == 0:
            msg = "device is lost"
            raise RuntimeError(msg)
        return SimpleNamespace(name="Good", total_memory=GIB)

    pretend(monkeypatch, count=2, get_device_properties=properties)
    assert [found.device for found in hardware.detect_accelerators()] == ["cuda:1"]
    assert "cuda:0" in caplog.text
    assert "device is lost" in caplog.text


def test_uncountable_accelerators_are_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> int:
        msg = "driver too old"
        raise RuntimeError(msg)

    pretend(monkeypatch)
    monkeypatch.setattr(torch.accelerator, "device_count", refuse)
    assert hardware.detect_accelerators() == ()
    assert "driver too old" in caplog.text


def test_no_device_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, count=0)
    monkeypatch.setattr(torch, "get_device_module", None)
    assert hardware.detect_accelerators() == ()
