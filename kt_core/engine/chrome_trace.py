"""A timeline as a Chrome trace, for chrome://tracing and ui.perfetto.dev.

The format is described in "Trace Event Format" (Duca and Sinclair, Google, 2016): complete events
("X") with microseconds, and metadata events ("M") that name and sort the rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kt_core.moe.timeline import Span
from kt_core.paths import replacing


def trace_events(spans: Sequence[Span], rows: Sequence[str]) -> list[dict[str, Any]]:
    """Return the events of a trace, times from the first span on.

    Args:
        spans: In any order.
        rows: Rows in the order in which they are to be shown; others follow.
    """
    others = sorted({span.label.row for span in spans} - set(rows))
    threads = {row: number for number, row in enumerate((*rows, *others))}
    events: list[dict[str, Any]] = []
    for row, thread in threads.items():
        common = {"ph": "M", "pid": 0, "tid": thread}
        events.append({**common, "name": "thread_name", "args": {"name": row}})
        events.append({**common, "name": "thread_sort_index", "args": {"sort_index": thread}})
    start = min((span.begin_ns for span in spans), default=0)
    # What encloses others comes before them.
    for span in sorted(spans, key=lambda span: (span.begin_ns, -span.end_ns)):
        arguments = {"step": span.step}
        if span.label.layer >= 0:
            arguments["layer"] = span.label.layer
        events.append(
            {
                "ph": "X",
                "pid": 0,
                "tid": threads[span.label.row],
                "name": span.label.name,
                "cat": span.kind.value,
                "ts": (span.begin_ns - start) / 1e3,
                "dur": (span.end_ns - span.begin_ns) / 1e3,
                "args": arguments,
            }
        )
    return events


def write_trace(
    path: Path, spans: Sequence[Span], rows: Sequence[str], about: dict[str, Any]
) -> None:
    """Write a trace, whole or not at all.

    Args:
        path: Where to.
        spans: What to show.
        rows: See ``trace_events``.
        about: Said about the run, under ``otherData``.

    Raises:
        OSError: It cannot be written.
    """
    trace = {"traceEvents": trace_events(spans, rows), "displayTimeUnit": "ms", "otherData": about}
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(trace, file)
