"""What the page cache holds of files, and how to make it forget them: for other benches here."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def forget(files: list[Path]) -> None:
    """Drop files from the page cache. Pages that are mapped by somebody, or not written yet, stay.

    Raises:
        RuntimeError: A tenth of them or more is still there.
    """
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    kept = sum(size for file in files for _, size in resident_ranges(file))
    total = sum(file.stat().st_size for file in files)
    if kept > total / 10:
        msg = f"{kept} of {total} bytes stay in the page cache: another process has them mapped"
        raise RuntimeError(msg)


def resident_ranges(file: Path) -> Iterator[tuple[int, int]]:
    """Yield offset and size of what the page cache holds of a file; it must be ours to write to."""
    size = file.stat().st_size
    with file.open("r+b") as stream, mmap.mmap(stream.fileno(), size) as mapped:
        pages = -(-size // mmap.PAGESIZE)
        states = (ctypes.c_ubyte * pages)()
        anchor = ctypes.c_char.from_buffer(mapped)
        result = _LIBC.mincore(ctypes.addressof(anchor), size, states)
        del anchor
        if result != 0:
            raise OSError(ctypes.get_errno(), "mincore")
        start = None
        for page, state in enumerate(bytes(states) + b"\0"):
            if state & 1 and start is None:
                start = page
            elif not state & 1 and start is not None:
                end = min(page * mmap.PAGESIZE, size)
                yield start * mmap.PAGESIZE, end - start * mmap.PAGESIZE
                start = None


def read_ranges(ranges: list[tuple[Path, int, int]], step_bytes: int = 1 << 20) -> int:
    """Read parts of files in order; return how many bytes that were."""
    buffer = bytearray(step_bytes)
    done = 0
    for file, offset, size in ranges:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            at = offset
            while at < offset + size:
                part = memoryview(buffer)[: min(step_bytes, offset + size - at)]
                got = os.preadv(descriptor, [part], at)
                if got == 0:
                    break
                at += got
                done += got
        finally:
            os.close(descriptor)
    return done
