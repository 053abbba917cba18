"""How much memory there is, how much this process can still get, and how much it has.

Formats: proc(5), /proc/meminfo and /proc/pid/status.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kt_core.hardware.cgroup import CgroupLimits, read_limits
from kt_core.hardware.system_files import parse_kib_line, read, read_required


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Host memory, in bytes.

    Attributes:
        total_bytes: Of the machine.
        available_bytes: What this process can allocate without swapping and without passing the
            limit of any of its control groups. Page cache counts as available.
        cgroup_limit_bytes: Smallest limit of a control group; None without one. May exceed
            ``total_bytes``.
    """

    total_bytes: int
    available_bytes: int
    cgroup_limit_bytes: int | None


class ProcessMemory(NamedTuple):
    """Memory of this process, in bytes.

    Attributes:
        rss_bytes: Resident now, with the resident parts of mapped files.
        anonymous_bytes: Resident now and not backed by a file: what the process itself allocated.
        peak_rss_bytes: The largest ``rss_bytes`` so far.
    """

    rss_bytes: int
    anonymous_bytes: int
    peak_rss_bytes: int


def detect_memory(*, root: Path, limits: CgroupLimits) -> Memory:
    """Describe the memory as files under ``root`` show it, within ``limits``."""
    path = root / "proc/meminfo"
    text = read(path)
    if text is None:  # not Linux, or /proc is not mounted; the free pages are a lower bound
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        total = os.sysconf("SC_PHYS_PAGES") * page_bytes
        available = os.sysconf("SC_AVPHYS_PAGES") * page_bytes
    else:
        total = parse_kib_line(path, text, "MemTotal")
        available = parse_kib_line(path, text, "MemAvailable")
    if limits.memory_headroom_bytes is not None:
        available = min(available, limits.memory_headroom_bytes)
    return Memory(
        total_bytes=total, available_bytes=available, cgroup_limit_bytes=limits.memory_bytes
    )


def available_memory_bytes(*, root: Path = Path("/")) -> int:
    """Return ``Memory.available_bytes`` of this moment, without looking at anything else."""
    return detect_memory(root=root, limits=read_limits(root)).available_bytes


def available_node_bytes(node: int, *, root: Path = Path("/")) -> int:
    """Return what is free on a NUMA node or in its page cache; 0 where the kernel does not say."""
    path = root / f"sys/devices/system/node/node{node}/meminfo"
    text = read(path)
    if text is None:
        return 0
    keys = ("MemFree", "Active(file)", "Inactive(file)")
    return sum(parse_kib_line(path, text, key) for key in keys)


def process_memory(*, root: Path = Path("/")) -> ProcessMemory:
    """Return what this process holds now, and its peak.

    The peak is the kernel's VmHWM, not getrusage's ru_maxrss: that one survives exec, so a small
    child of a large parent reports the parent's.
    """
    path = root / "proc/self/status"
    text = read_required(path, "which says how much memory this process uses")
    return ProcessMemory(
        rss_bytes=parse_kib_line(path, text, "VmRSS"),
        anonymous_bytes=parse_kib_line(path, text, "RssAnon"),
        peak_rss_bytes=parse_kib_line(path, text, "VmHWM"),
    )
