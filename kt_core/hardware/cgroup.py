"""Limits that a container, a batch system or systemd set on this process, by control groups.

A limit binds a group and all groups below it, so every group from ours up to the highest one that
is visible is read, and the tightest limit counts. Version 1 has one hierarchy per controller,
version 2 one for all; on a hybrid system each controller lives in exactly one of them.
Formats: kernel documentation, admin-guide/cgroup-v1/memory.rst, scheduler/sched-bwc.rst and
admin-guide/cgroup-v2.rst; /proc/self/mountinfo: proc(5).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kt_core.hardware.system_files import malformed, parse_int, read, read_required

# Version 1 has no word for "no limit": it shows LONG_MAX, rounded down to a page. No machine has
# half of it.
_V1_NO_LIMIT = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupLimits:
    """What the control groups of this process leave to it.

    Attributes:
        cpus: Processor time per unit of time, such as 1.5 processors; None without a quota.
        memory_bytes: The smallest memory limit; None without one.
        memory_headroom_bytes: Smallest, over all groups with a limit, of the bytes that can still
            be used before that limit; None without a limit.
    """

    cpus: float | None = None
    memory_bytes: int | None = None
    memory_headroom_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Groups:
    """The visible groups of one controller, ours first, the highest one last."""

    version: int
    folders: tuple[Path, ...]


def read_limits(root: Path) -> CgroupLimits:
    """Read the limits of this process from the files under ``root``."""
    quotas = _cpu_quotas(root)
    memory = _memory_limits(root)
    return CgroupLimits(
        cpus=min(quotas, default=None),
        memory_bytes=min((limit for limit, _ in memory), default=None),
        memory_headroom_bytes=min((headroom for _, headroom in memory), default=None),
    )


def _cpu_quotas(root: Path) -> list[float]:
    groups = _find_groups(root, "cpu")
    quotas = []
    for folder in groups.folders:
        quota = _v1_quota(folder) if groups.version == 1 else _v2_quota(folder)
        if quota is not None:
            quotas.append(quota)
    return quotas


def _v1_quota(folder: Path) -> float | None:
    quota_file, period_file = folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"
    text = read(quota_file)
    if text is None or (quota_us := parse_int(quota_file, text)) == -1:
        return None
    period_text = read_required(period_file, "the period of the quota beside it")
    period_us = parse_int(period_file, period_text)
    if quota_us <= 0 or period_us <= 0:
        raise malformed(quota_file, "a quota and a period > 0", f"{quota_us} per {period_us}")
    return quota_us / period_us


def _v2_quota(folder: Path) -> float | None:
    path = folder / "cpu.max"
    text = read(path)
    if text is None:
        return None
    match = re.fullmatch(r"(max|[1-9]\d*) ([1-9]\d*)", text.strip())
    if match is None:
        raise malformed(path, "'max' or a quota, and a period, in us", text.strip())
    return None if match[1] == "max" else int(match[1]) / int(match[2])


def _memory_limits(root: Path) -> list[tuple[int, int]]:
    """Return limit and headroom in bytes of each group that has a limit."""
    groups = _find_groups(root, "memory")
    limits = []
    for folder in groups.folders:
        stat_file = folder / "memory.stat"
        stat = _parse_stat(stat_file, read(stat_file) or "")
        if groups.version == 1:
            limit = _v1_memory_limit(folder, stat)
            usage_file, prefix = folder / "memory.usage_in_bytes", "total_"  # with the groups below
        else:
            limit = _v2_memory_limit(folder)
            usage_file, prefix = folder / "memory.current", ""
        if limit is None:
            continue
        usage = parse_int(usage_file, read_required(usage_file, "the usage of a limited group"))
        # Usage counts the page cache. The kernel drops those pages before it refuses memory, and a
        # checkpoint that was just read would otherwise look like memory in use. Pages that cannot
        # be dropped (tmpfs, mlock) are on other lists.
        cache = stat.get(prefix + "active_file", 0) + stat.get(prefix + "inactive_file", 0)
        limits.append((limit, max(0, limit - max(0, usage - cache))))
    return limits


def _v1_memory_limit(folder: Path, stat: dict[str, int]) -> int | None:
    path = folder / "memory.limit_in_bytes"
    text = read(path)
    if text is None:
        return None
    # hierarchical_memory_limit also covers the groups above those a container can see.
    limit = min(parse_int(path, text), stat.get("hierarchical_memory_limit", _V1_NO_LIMIT))
    return None if limit >= _V1_NO_LIMIT else limit


def _v2_memory_limit(folder: Path) -> int | None:
    """Return the smaller of ``memory.max`` and ``memory.high``.

    The kernel kills above the first and stalls every allocation above the second: a model that
    passes either does not run.
    """
    limits = []
    for name in ("memory.max", "memory.high"):
        text = read(folder / name)
        if text is not None and text.strip() != "max":
            limits.append(parse_int(folder / name, text))
    return min(limits, default=None)


def _parse_stat(path: Path, text: str) -> dict[str, int]:
    stat = {}
    for line in text.splitlines():
        key, separator, value = line.partition(" ")
        if not separator:
            raise malformed(path, "lines of a name and a number", line)
        stat[key] = parse_int(path, value)
    return stat


def _find_groups(root: Path, controller: str) -> _Groups:
    """Find the folders of our group and of the groups above it, for one controller."""
    path = root / "proc/self/cgroup"
    memberships: dict[str, str] = {}
    for line in (read(path) or "").splitlines():
        match = re.fullmatch(r"\d+:([^:]*):(/.*)", line)
        if match is None:
            raise malformed(path, "lines of <id>:<controllers>:<path>", line)
        memberships.update(dict.fromkeys(match[1].split(","), match[2]))
    version = 1 if controller in memberships else 2
    membership = memberships.get(controller if version == 1 else "")  # version 2 names none
    if membership is None:
        return _Groups(version=version, folders=())
    candidates = [
        _visible_folders(mount_root, mount_point, membership)
        for mount_root, mount_point in _mounts(root, version, controller)
    ]
    folders = max(candidates, key=len, default=())  # of several mounts, the one that shows most
    return _Groups(version=version, folders=tuple(root / folder for folder in folders))


def _visible_folders(
    mount_root: PurePosixPath, mount_point: PurePosixPath, membership: str
) -> tuple[str, ...]:
    """Return our group's folder and its parents down to the mount point, without the leading /."""
    try:
        below = PurePosixPath(membership).relative_to(mount_root)
    except ValueError:  # the mount shows another part of the tree: only its top can bind us
        below = PurePosixPath()
    folder = mount_point / below
    chain = [folder, *folder.parents][: len(below.parts) + 1]
    return tuple(str(part).lstrip("/") for part in chain)


def _mounts(root: Path, version: int, controller: str) -> list[tuple[PurePosixPath, PurePosixPath]]:
    """Return root within the hierarchy, and mount point, of each mount of the controller."""
    path = root / "proc/self/mountinfo"
    mounts = []
    for line in (read(path) or "").splitlines():
        fields, separator, rest = line.partition(" - ")
        left, right = fields.split(" "), rest.split(" ")
        if not separator or len(left) < 6 or len(right) < 3:
            raise malformed(path, "lines as proc(5) describes", line)
        if version == 2 and right[0] != "cgroup2":
            continue
        if version == 1 and not (right[0] == "cgroup" and controller in right[2].split(",")):
            continue
        mounts.append((PurePosixPath(_unescape(left[3])), PurePosixPath(_unescape(left[4]))))
    return mounts


def _unescape(field: str) -> str:
    r"""Undo mountinfo's octal escapes: a blank in a path is written as \040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
