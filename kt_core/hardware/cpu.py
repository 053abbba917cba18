"""The processor: what it can execute, and on which cores this process may run.

Sources: CPUID through ``kt_core._hardware``; sysfs as in the kernel's
Documentation/admin-guide/cputopology.rst and ABI/stable/sysfs-devices-node.
"""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kt_core import _hardware
from kt_core.hardware.system_files import parse_int, parse_kib_line, parse_list, read


@dataclass(frozen=True, slots=True, kw_only=True)
class NumaNode:
    """A part of the memory and the processors next to it.

    Attributes:
        id: Number of the node, as the kernel counts.
        cpus: Logical processors on the node that this process may use; none on a memory-only node.
        memory_bytes: Installed on the node, in bytes; 0 if this process may not allocate there.
    """

    id: int
    cpus: tuple[int, ...]
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """The processors that this process may use; numbers are the kernel's.

    Attributes:
        name: Marketing name, or the best description there is.
        vendor: As the processor spells it, such as ``GenuineIntel``; may be empty.
        architecture: ``x86_64``, ``aarch64``, ...
        features: Usable instruction set extensions, spelt as in /proc/cpuinfo; none off x86.
        logical_cpus: Logical processors in the affinity mask, ascending.
        physical_cores: One logical processor for each physical core among them, ascending.
        numa_nodes: Nodes with processors or memory for this process, ascending; at least one.
        cgroup_cpus: Processor time per unit of time that control groups allow; None without quota.
    """

    name: str
    vendor: str
    architecture: str
    features: frozenset[str]
    logical_cpus: tuple[int, ...]
    physical_cores: tuple[int, ...]
    numa_nodes: tuple[NumaNode, ...]
    cgroup_cpus: float | None

    @property
    def usable_threads(self) -> int:
        """Threads worth starting: one per core, as SMT siblings share the units that are busy.

        A quota is rounded down: the thread too many would be the one that all others wait for.
        """
        quota = math.inf if self.cgroup_cpus is None else math.floor(self.cgroup_cpus)
        return max(1, int(min(len(self.physical_cores), quota)))


def request_amx_permission() -> int:
    """Ask Linux to let this process use tile registers; return 0 or the errno.

    Needed once, before the first tile instruction; holds for all threads and later children.
    """
    return _hardware.request_amx_permission()


def amx_permitted() -> bool:
    """Return whether this process may use tile registers already."""
    return _hardware.amx_permitted()


def detect_cpu(
    *, root: Path, affinity: Iterable[int] | None, cgroup_cpus: float | None, memory_bytes: int
) -> Cpu:
    """Describe the processors.

    Args:
        root: The folder that holds ``proc`` and ``sys``.
        affinity: Logical processors this process may use; None to ask the kernel.
        cgroup_cpus: See ``Cpu``.
        memory_bytes: Memory of the machine, for the one node of a machine that shows no nodes.
    """
    cpuinfo = _read_cpuinfo(root / "proc/cpuinfo")
    logical = _logical_cpus(root, affinity)
    registers = _hardware.read_registers()
    first = next(iter(cpuinfo.values()), {})
    return Cpu(
        name=_hardware.brand(registers) or _described_name(root, first),
        vendor=_hardware.vendor(registers)
        or first.get("vendor_id")
        or first.get("CPU implementer", ""),
        architecture=platform.machine(),
        features=frozenset(_hardware.decode_features(registers)),
        logical_cpus=logical,
        physical_cores=_physical_cores(root, logical, cpuinfo),
        numa_nodes=_numa_nodes(root, logical, memory_bytes),
        cgroup_cpus=cgroup_cpus,
    )


def _described_name(root: Path, fields: dict[str, str]) -> str:
    for key in ("model name", "cpu"):  # "cpu" on POWER
        if fields.get(key):
            return fields[key]
    board = (read(root / "proc/device-tree/model") or "").strip("\0\n ")  # most of Arm
    return board or platform.machine() or "unknown processor"


def _read_cpuinfo(path: Path) -> dict[int, dict[str, str]]:
    """Return the fields of each logical processor; none where the file is laid out otherwise."""
    processors = {}
    for block in re.split(r"\n[ \t]*\n", read(path) or ""):
        pairs = (line.partition(":") for line in block.splitlines())
        fields = {key.strip(): value.strip() for key, _, value in pairs}
        if "processor" in fields:
            processors[parse_int(path, fields["processor"])] = fields
    return processors


def _logical_cpus(root: Path, affinity: Iterable[int] | None) -> tuple[int, ...]:
    allowed = _affinity() if affinity is None else frozenset(affinity)
    if not allowed:
        msg = "affinity must name at least one logical processor, got none"
        raise ValueError(msg)
    path = root / "sys/devices/system/cpu/online"
    text = read(path)
    online = allowed if text is None else allowed.intersection(parse_list(path, text))
    # LXCFS invents this file and may number the processors anew. The kernel's mask, which leaves
    # out what is offline by itself, is then the one to believe.
    return tuple(sorted(online or allowed))


def _affinity() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _physical_cores(
    root: Path, logical: tuple[int, ...], cpuinfo: dict[int, dict[str, str]]
) -> tuple[int, ...]:
    """Return the first logical processor of each core."""
    firsts: dict[tuple[object, ...], int] = {}
    for cpu in logical:  # ascending, so that setdefault keeps the lowest number
        firsts.setdefault(_core_identity(root, cpu, cpuinfo.get(cpu, {})), cpu)
    return tuple(firsts.values())


def _core_identity(root: Path, cpu: int, fields: dict[str, str]) -> tuple[object, ...]:
    """Return a value that is the same for, and only for, the threads of one core."""
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
    for name in ("core_cpus_list", "thread_siblings_list"):  # since Linux 5.3, and its old name
        text = read(topology / name)
        if text is not None:
            return ("siblings", *parse_list(topology / name, text))
    if "physical id" in fields and "core id" in fields:
        return ("cpuinfo", fields["physical id"], fields["core id"])
    return ("alone", cpu)  # nothing known: as on most virtual machines, each is a core


def _numa_nodes(root: Path, logical: tuple[int, ...], memory_bytes: int) -> tuple[NumaNode, ...]:
    whole = (NumaNode(id=0, cpus=logical, memory_bytes=memory_bytes),)
    online = root / "sys/devices/system/node/online"
    text = read(online)
    if text is None:
        return whole
    allowed = _allowed_memory_nodes(root / "proc/self/status")
    nodes = []
    for node in parse_list(online, text):
        folder = online.parent / f"node{node}"
        cpulist, meminfo = read(folder / "cpulist"), read(folder / "meminfo")
        if cpulist is None or meminfo is None:  # a sandbox that shows the numbers alone
            return whole
        cpus = set(logical).intersection(parse_list(folder / "cpulist", cpulist))
        installed = parse_kib_line(folder / "meminfo", meminfo, "MemTotal")
        size = installed if allowed is None or node in allowed else 0
        if cpus or size:
            nodes.append(NumaNode(id=node, cpus=tuple(sorted(cpus)), memory_bytes=size))
    return tuple(nodes) or whole


def _allowed_memory_nodes(status: Path) -> tuple[int, ...] | None:
    """Return the nodes this process may allocate on (cpuset.mems); None where nobody says."""
    match = re.search(r"^Mems_allowed_list:(.*)$", read(status) or "", flags=re.MULTILINE)
    return None if match is None else parse_list(status, match[1])
