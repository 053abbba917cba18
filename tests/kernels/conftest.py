"""Fixtures of several files; and the table at the end of a run over the grid (test_grid.py)."""

from __future__ import annotations

import faulthandler
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """Torch's idle threads spin, on the cores that are under test; the tensors here are small."""
    torch.set_num_threads(1)


@pytest.fixture
def no_deadlock(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Waiting for ever is the bug to expect here: say where, and end."""
    with capfd.disabled():
        terminal = os.dup(2)
    faulthandler.dump_traceback_later(120, exit=True, file=terminal)
    yield
    faulthandler.cancel_dump_traceback_later()
    os.close(terminal)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say for each format and instruction set how many cells passed, of how many."""
    passed: Counter[tuple[str, str, str]] = Counter()
    total: Counter[tuple[str, str, str]] = Counter()
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.getreports(outcome):
            key = dict(getattr(report, "user_properties", ())).get("grid")  # collecting has none
            if key is not None:
                total[key] += 1
                passed[key] += outcome == "passed"
    for kind in dict.fromkeys(key[0] for key in total):
        terminalreporter.section(f"cells of the grid passed, {kind}")
        for line in _table(
            {key[1:]: n for key, n in total.items() if key[0] == kind}, passed, kind
        ):
            terminalreporter.write_line(line)


def _table(
    total: dict[tuple[str, str], int], passed: Counter[tuple[str, str, str]], kind: str
) -> list[str]:
    isas = list(dict.fromkeys(isa for _, isa in total))
    names = list(dict.fromkeys(name for name, _ in total))
    width = max(map(len, [*names, "format"]))
    lines = ["  ".join(["format".ljust(width), *(isa.rjust(11) for isa in isas)])]
    for name in names:
        cells = (f"{passed[kind, name, isa]}/{total.get((name, isa), 0)}" for isa in isas)
        lines.append("  ".join([name.ljust(width), *(cell.rjust(11) for cell in cells)]))
    return lines
