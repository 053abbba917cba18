"""How well host and accelerator worked at the same time, from the spans of a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from kt_core.engine.device_time import DeviceTime
from kt_core.moe.timeline import Kind, Span


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCall:
    """The experts of one layer in one step.

    Attributes:
        kind: ``PREFILL`` or ``DECODE``.
        layer: The layer's number.
        time_s: From the first thing that the stream did for it to the last.
        host_s: Of that, while the host computed experts.
        accelerator_s: While an accelerator computed experts: the one that took longest.
        launch_s: Before the first and behind the last of the two: copies there and back, calls.
    """

    kind: Kind
    layer: int
    time_s: float
    host_s: float
    accelerator_s: float
    launch_s: float

    @property
    def ratio(self) -> float:
        """Time over what it would be if only the longer part took any: 1 is perfect."""
        return self.time_s / max(self.host_s, self.accelerator_s)


def layer_calls(spans: Iterable[Span]) -> list[LayerCall]:
    """Return the calls in which experts were computed anywhere, in their order."""
    by_step: defaultdict[int, list[Span]] = defaultdict(list)
    for span in spans:
        by_step[span.step].append(span)
    calls = []
    for step in sorted(by_step):
        here = by_step[step]
        kinds = [span.kind for span in here if span.kind in (Kind.PREFILL, Kind.DECODE)]
        if not kinds:
            continue  # it was interrupted
        working = [span for span in here if span.kind in (Kind.HOT, Kind.COLD)]
        for layer in (span for span in here if span.kind is Kind.LAYER):
            parts = [c for span in working if (c := _clipped(span, layer)) is not None]
            if parts:
                calls.append(_call(kinds[0], layer, parts))
    return calls


def _clipped(span: Span, to: Span) -> Span | None:
    begin, end = max(span.begin_ns, to.begin_ns), min(span.end_ns, to.end_ns)
    if begin >= end:
        return None
    return Span(begin, end, span.step, span.label)


def _call(kind: Kind, layer: Span, parts: Sequence[Span]) -> LayerCall:
    rows: defaultdict[tuple[Kind, str], float] = defaultdict(float)
    for part in parts:
        rows[part.kind, part.label.row] += part.seconds
    first, last = min(p.begin_ns for p in parts), max(p.end_ns for p in parts)
    return LayerCall(
        kind=kind,
        layer=layer.label.layer,
        time_s=layer.seconds,
        host_s=max((s for (k, _), s in rows.items() if k is Kind.COLD), default=0.0),
        accelerator_s=max((s for (k, _), s in rows.items() if k is Kind.HOT), default=0.0),
        launch_s=(layer.end_ns - layer.begin_ns - (last - first)) / 1e9,
    )


def overlap_of(calls: Sequence[LayerCall]) -> dict[str, Any]:
    """Return medians over all calls, and over those of each layer, of prefill and decode.

    Each is None where there were no calls in which experts were computed.
    """
    found: dict[str, Any] = {}
    for kind in (Kind.PREFILL, Kind.DECODE):
        chosen = [call for call in calls if call.kind is kind]
        by_layer: defaultdict[int, list[LayerCall]] = defaultdict(list)
        for call in chosen:
            by_layer[call.layer].append(call)
        layers = [{"layer": n, **_medians(by_layer[n])} for n in sorted(by_layer)]
        found[kind.value] = {**_medians(chosen), "layers": layers} if chosen else None
    return found


def _medians(calls: Sequence[LayerCall]) -> dict[str, float | int]:
    names = ("time_s", "host_s", "accelerator_s", "launch_s", "ratio")
    middle = {name: median(getattr(call, name) for call in calls) for name in names}
    return {"calls": len(calls), **middle}


def device_times(spans: Sequence[Span], host: str, devices: Sequence[str]) -> dict[str, DeviceTime]:
    """Return what each device did, the host first."""
    steps_s = sum(s.seconds for s in spans if s.kind in (Kind.PREFILL, Kind.DECODE))
    experts = (Kind.HOT, Kind.COLD) if devices else (Kind.LAYER,)

    def busy(row: str) -> float:
        return sum((s.seconds for s in spans if s.label.row == row and s.kind in experts), 0.0)

    found = {}
    for row in (host, *devices):
        waited = sum((s.seconds for s in spans if s.label.row == row and s.kind is Kind.JOIN), 0.0)
        idle = waited if row in devices[:1] else steps_s - busy(row)
        found[row] = DeviceTime(experts_s=busy(row), idle_s=idle if devices else None)
    return found
