"""How much the processor can keep near: the size of its last-level caches.

Source: sysfs, kernel documentation ABI/testing/sysfs-devices-system-cpu.
"""

from __future__ import annotations

import re
from pathlib import Path

from kt_core.hardware.system_files import malformed, parse_int, parse_list, read, read_required

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def last_level_cache_bytes(*, root: Path = Path("/")) -> int | None:
    """Return the bytes of all caches of the highest level together; None where nobody says."""
    sizes: dict[tuple[int, ...], tuple[int, int]] = {}  # processors: level and bytes
    for folder in sorted(root.glob("sys/devices/system/cpu/cpu[0-9]*/cache/index[0-9]*")):
        size = read(folder / "size")
        if size is None or (read(folder / "type") or "").strip() == "Instruction":
            continue
        level = parse_int(folder / "level", read_required(folder / "level", "beside a size"))
        shared = read_required(folder / "shared_cpu_list", "beside a size")
        cpus = parse_list(folder / "shared_cpu_list", shared)
        sizes[cpus] = max(sizes.get(cpus, (0, 0)), (level, _parse_size(folder / "size", size)))
    highest = max((level for level, _ in sizes.values()), default=0)
    return sum(size for level, size in sizes.values() if level == highest) or None


def _parse_size(path: Path, text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)", text.strip())
    if match is None:
        raise malformed(path, "a number and K, M or G", text.strip())
    return int(match[1]) * _UNITS[match[2]]
