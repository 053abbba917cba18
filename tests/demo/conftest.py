"""What was answered, at the end of a run of test_answers.py."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print each format with its answer."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    answers = [dict(report.user_properties).get("answer") for report in reports]
    if any(answers):
        terminalreporter.section("answers")
    for name, text in filter(None, answers):
        terminalreporter.write_line(f"{name:20} {text}")
