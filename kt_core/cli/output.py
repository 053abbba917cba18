"""Where output goes: data to stdout, everything about it to stderr."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from kt_core.errors import KtError
from kt_core.interfaces import Progress as ProgressCallback
from kt_core.interfaces import no_progress
from kt_core.plugins import Registry

JSON_HELP = "Print JSON, for scripts."
# Wide enough for any table: in a pipe, a row is a line.
_UNLIMITED_WIDTH = 10_000


class OutputError(KtError):
    """Stdout takes no more: its reader left, or the disk is full."""


def registry_of(context: typer.Context) -> Registry:
    """Return the plug-ins that ``run_cli`` loaded."""
    registry = context.find_root().obj
    assert isinstance(registry, Registry)
    return registry


def errors_console() -> Console:
    """Return a console on stderr. Made anew each time: tests replace the stream."""
    return Console(stderr=True, soft_wrap=True, highlight=False)


def complain(kind: str, message: str) -> None:
    """Print ``error: message`` or ``warning: message`` on stderr."""
    style = "bold yellow" if kind == "warning" else "bold red"
    errors_console().print(Text.assemble((f"{kind}:", style), " ", message))


def remark(message: str) -> None:
    """Print on stderr something that is good to know."""
    errors_console().print(Text(message, style="dim"))


class LogHandler(logging.Handler):
    """Shows log records as the command line shows its own warnings and errors."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record, and its traceback where it has one."""
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + logging.Formatter().formatException(record.exc_info)
        complain("error" if record.levelno >= logging.ERROR else "warning", message)


def write(text: str) -> None:
    """Write text on stdout at once.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # Python flushes once more when it exits, and would fail again: let that go nowhere.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        why = error.strerror or str(error)
        msg = f"not everything was written: whoever reads the output takes no more ({why})"
        raise OutputError(msg) from error


def print_json(data: Any) -> None:
    """Print JSON on stdout, indented, non-ASCII characters as they are."""
    write(json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def table(*headers: str) -> Table:
    """Return an empty table without lines; without headers, its first column names the rows."""
    grid = Table(*headers, box=None, pad_edge=False, show_header=bool(headers), header_style="bold")
    if not headers:
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
    for column in grid.columns:
        column.overflow = "fold"
    return grid


def show(renderable: RenderableType) -> None:
    """Print a table or a line on stdout: fitted to a terminal, in a pipe without line breaks."""
    terminal = Console()
    width = terminal.width if terminal.is_terminal else _UNLIMITED_WIDTH
    text = io.StringIO()
    Console(file=text, force_terminal=terminal.is_terminal, width=width, highlight=False).print(
        renderable
    )
    write("\n".join(line.rstrip(" ") for line in text.getvalue().split("\n")))


@contextmanager
def progress_bar(first_stage: str, *, with_rest: bool = False) -> Iterator[ProgressCallback]:
    """Show long work on a terminal's stderr; the bar vanishes when it is done.

    Args:
        first_stage: What is shown until the first report.
        with_rest: Whether to show the time that is left, for work that takes minutes.
    """
    console = errors_console()
    if not console.is_terminal or console.is_dumb_terminal:
        yield no_progress
        return
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
    ]  # fmt: skip
    if with_rest:
        columns += [TextColumn("left:"), TimeRemainingColumn()]
    with Progress(*columns, console=console, transient=True, refresh_per_second=5) as bar:
        task = bar.add_task(first_stage, total=None)

        def report(stage: str, fraction: float | None) -> None:
            total = None if fraction is None else 1.0
            is_new = stage != bar.tasks[task].description
            # A new stage is shown at once: a short one would be over before the next refresh.
            bar.update(
                task, description=stage, completed=fraction or 0.0, total=total, refresh=is_new
            )

        yield report
