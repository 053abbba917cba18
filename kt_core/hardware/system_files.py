"""Reading the text files with which Linux describes a machine.

One rule for all of them: a file that is absent tells nothing and is no error; a file that is there
and cannot be understood is one, because threads or memory would be planned on a wrong number.
"""

from __future__ import annotations

import re
from pathlib import Path

from kt_core.errors import KtError


class SystemFileError(KtError):
    """A file under /proc or /sys is there, but cannot be read or does not look as documented."""


def malformed(path: Path, expected: str, text: str) -> SystemFileError:
    """Return, for raising, the error that names the file, what should be in it, and what is."""
    shown = text if len(text) <= 120 else text[:117] + "..."
    return SystemFileError(
        f"cannot parse {path}: expected {expected}, got {shown!r}\n"
        "Please report this with the kernel's version (uname -r) and the container runtime's name."
    )


def read(path: Path) -> str | None:
    """Return the text of the file, or None if there is no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:  # an error of read(2), unlike one of open(2), does not name the file
        msg = f"cannot read {path}: {error.strerror}\nMake it readable for this user."
        raise SystemFileError(msg) from error


def read_required(path: Path, why: str) -> str:
    """Return the text of the file, which another file that was there promises."""
    text = read(path)
    if text is None:
        msg = f"cannot find {path}, {why}\nIs all of /proc and /sys mounted in this container?"
        raise SystemFileError(msg)
    return text


def parse_int(path: Path, text: str) -> int:
    """Return the decimal number that is the whole of the text."""
    try:
        return int(text)
    except ValueError:
        raise malformed(path, "a whole number", text.strip()) from None


def parse_list(path: Path, text: str) -> tuple[int, ...]:
    """Return the numbers of a kernel list such as ``0-3,8``; an empty list is a valid one."""
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise malformed(path, "a list such as 0-3,8", text.strip())
        first, last = int(match[1]), int(match[2] or match[1])
        numbers.update(range(first, last + 1))
    return tuple(sorted(numbers))


def parse_kib_line(path: Path, text: str, key: str) -> int:
    """Return in bytes the value of a line that holds ``<key>:  <number> kB``."""
    match = re.search(rf"\b{re.escape(key)}:\s*(\d+) kB", text)
    if match is None:
        raise malformed(path, f"a line '{key}: <number> kB'", text)
    return int(match[1]) * 1024
