"""A person at a terminal: runs ``kt`` in a pseudo-terminal, reads what it shows, types."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

_CONTROL = re.compile(rb"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[=>]|\r")
ENTER, CTRL_C, CTRL_D, ALT_ENTER = "\r", "\x03", "\x04", "\x1b\r"


def paste(text: str) -> str:
    """Return what a terminal sends when text is pasted into it."""
    return f"\x1b[200~{text}\x1b[201~"


class Terminal:
    """``kt`` with these arguments. Leaving the ``with`` block ends it.

    Attributes:
        shown: Everything it wrote, raw.
    """

    def __init__(
        self, arguments: Sequence[str], env: Mapping[str, str], *, columns: int = 80
    ) -> None:
        """Start it."""
        self.shown = b""
        self._read = 0  # bytes of `shown` that an expect() has passed
        self._pid, self._descriptor = pty.fork()
        if self._pid == 0:
            command = [sys.executable, "-m", "kt_core.cli", *arguments]
            os.execve(sys.executable, command, {**os.environ, **env})
        size = struct.pack("HHHH", 24, columns, 0, 0)
        fcntl.ioctl(self._descriptor, termios.TIOCSWINSZ, size)

    def __enter__(self) -> Self:
        """Return self."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Kill what still runs."""
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._descriptor)

    def expect(self, text: str, *, timeout_s: float = 60) -> str:
        """Wait until ``text`` is shown after what was expected before; return what led to it."""
        deadline = time.monotonic() + timeout_s
        while True:
            plain = self._plain()
            at = plain.find(text, self._read)
            if at >= 0:
                before = plain[self._read : at]
                self._read = at + len(text)
                return before
            if not self._receive(deadline):
                msg = f"{text!r} was not shown; since the last one: {plain[self._read :]!r}"
                raise AssertionError(msg)

    def expect_prompt(self, *, timeout_s: float = 60) -> None:
        """Wait until it takes input: it has asked for pastes to be marked."""
        deadline = time.monotonic() + timeout_s
        while self.shown.rfind(b"\x1b[?2004h") <= self.shown.rfind(b"\x1b[?2004l"):
            if not self._receive(deadline):
                msg = f"there is no prompt: {self._plain()[self._read :]!r}"
                raise AssertionError(msg)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._descriptor, text.encode())

    def exit_code(self, *, timeout_s: float = 30) -> int:
        """Wait until it ends."""
        deadline = time.monotonic() + timeout_s
        while self._receive(deadline):
            pass
        _, status = os.waitpid(self._pid, 0)
        return os.waitstatus_to_exitcode(status)

    def _plain(self) -> str:
        return _CONTROL.sub(b"", self.shown).decode(errors="replace")

    def _receive(self, deadline: float) -> bool:
        """Read what there is; False at the end of the output or of our patience."""
        ready, _, _ = select.select([self._descriptor], [], [], max(0, deadline - time.monotonic()))
        if not ready:
            return False
        try:
            received = os.read(self._descriptor, 65536)
        except OSError:  # Linux reports the end like this
            return False
        self.shown += received
        return bool(received)
