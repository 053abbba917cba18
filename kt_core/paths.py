"""Where kt keeps files of its own, and how it writes them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_dir() -> Path:
    """Return where kt keeps what it can make again: ``$XDG_CACHE_HOME/kt``."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kt"


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Write a file whole or not at all: yields the path to write to, renames it at the end.

    Where the block raises, nothing is left and an older ``target`` stays as it was. The temporary
    name ends as the target's does, for libraries that choose a format by it.

    Raises:
        OSError: The folder is absent or may not be written to, or the disk is full.
    """
    descriptor, name = tempfile.mkstemp(
        prefix=f".{target.stem}.", suffix=target.suffix, dir=target.parent
    )
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        # Made for the owner alone; a file that anyone would have written follows the umask.
        umask = os.umask(0)
        os.umask(umask)
        with temporary.open("rb+") as written:
            os.fchmod(written.fileno(), 0o666 & ~umask)
            os.fsync(written.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
