"""When what ran where: spans of a run, on the clock of the host.

What runs on the host knows its time. What runs in a stream of a device is put between two events,
whose times the device notes on a clock of its own. The two clocks are compared once per step of the
model, while the device is idle: an event is recorded and waited for, several times, and the
quickest of these waits says that this event happened between two readings of the host's clock, a
few microseconds apart; the middle is taken. Every other event of the step is placed by the time
between it and that one, which the device measures. So spans of one device are right among each
other to the resolution of its events, and against the host's to ``uncertainty_ns``.

All times are nanoseconds of ``time.perf_counter_ns``, which on Linux is also the steady clock of
C++ that ``HostCall`` reads.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from itertools import compress
from typing import ClassVar, TypeAlias

import torch

# Waits of which the quickest counts: the first one may find a runtime asleep.
_TRIES = 5


class Kind(StrEnum):
    """What a span is."""

    PREFILL = "prefill"
    """One pass of the model over a prompt."""
    DECODE = "decode"
    """One pass of the model for a token."""
    DENSE = "dense"
    """What lies between the experts of two layers in the stream: attention, norms, routers."""
    LAYER = "layer"
    """The experts of one layer, everything included."""
    LAUNCH = "launch"
    """The host putting a layer's experts into streams."""
    COPY = "copy"
    """Hidden states on their way to the host's experts, and their output on its way back."""
    JOIN = "join"
    """In the stream: waiting for the host's experts and the copy of their output."""
    HOT = "hot"
    """Experts on an accelerator."""
    COLD = "cold"
    """Experts on the host."""
    BESIDE = "beside"
    """What a block calls beside its experts, in a stream of its own."""
    MOVE = "move"
    """An expert that changes places."""
    STREAMED = "streamed"
    """A whole layer's experts on their way to an accelerator, for a long prompt."""


@dataclass(frozen=True, slots=True)
class Label:
    """What a span says besides its times.

    Attributes:
        kind: What it is.
        row: Where: a device, a stream of one, or a thread of the host.
        name: For people.
        layer: Number among the layers with experts; -1 for what belongs to none.
    """

    kind: Kind
    row: str
    name: str
    layer: int = -1


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time.

    Attributes:
        begin_ns: When it began.
        end_ns: When it ended.
        step: The model's step that it was put into, from 0.
        label: What it is.
    """

    begin_ns: int
    end_ns: int
    step: int
    label: Label

    @property
    def kind(self) -> Kind:
        """What it is."""
        return self.label.kind

    @property
    def seconds(self) -> float:
        """How long it took."""
        return (self.end_ns - self.begin_ns) / 1e9


@dataclass(frozen=True, slots=True)
class _Anchor:
    """An event whose time on the host's clock is known."""

    event: torch.Event
    host_ns: int


@dataclass(frozen=True, slots=True)
class _StreamMark:
    """A point in a stream, placed by an anchor that came before it."""

    event: torch.Event
    anchor: _Anchor

    @property
    def is_passed(self) -> bool:
        return self.event.query()

    @property
    def host_ns(self) -> int:
        return self.anchor.host_ns + round(self.anchor.event.elapsed_time(self.event) * 1e6)


@dataclass(frozen=True, slots=True)
class _HostMark:
    """A point in what the host does."""

    host_ns: int
    is_passed: ClassVar[bool] = True


Mark: TypeAlias = _StreamMark | _HostMark


@dataclass(frozen=True, slots=True)
class _Open:
    """A span whose times are not known yet."""

    begin: Mark
    end: Mark
    step: int
    label: Label


class Timeline:
    """Collects spans. One thread uses it, the one that runs the model.

    Attributes:
        devices: Those whose streams have spans; none where the host does it all.
        spans: Those whose times are known, in no order.
        step: The step that is under way; -1 before the first.
        uncertainty_ns: How far a device's spans may be off against the host's, at most so far.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        """Take the devices."""
        self.devices = tuple(devices)
        self.spans: list[Span] = []
        self.step = -1
        self.uncertainty_ns = 0
        self._anchors: dict[torch.device, _Anchor] = {}
        self._open: list[_Open] = []

    def begin_step(self) -> None:
        """Count a step, and compare the clocks. Waits until the devices are idle."""
        self.step += 1
        for device in self.devices:
            torch.accelerator.synchronize(device)
            self._anchors[device], uncertainty_ns = _compare_clocks(device)
            self.uncertainty_ns = max(self.uncertainty_ns, uncertainty_ns)

    def mark(self, stream: torch.Stream | None) -> Mark:
        """Note a point in a stream, or now where there is none. Does not wait."""
        if stream is None:
            return _HostMark(time.perf_counter_ns())
        event = torch.Event(device=stream.device, enable_timing=True)
        stream.record_event(event)
        return _StreamMark(event, self._anchors[stream.device])

    def add(self, begin_ns: int, end_ns: int, label: Label) -> None:
        """Add something of the host's whose times are known."""
        self.between(_HostMark(begin_ns), _HostMark(end_ns), label)

    def between(self, begin: Mark, end: Mark, label: Label) -> None:
        """Add what lies between two points; their times become known in ``settle``."""
        self._open.append(_Open(begin, end, self.step, label))

    @contextmanager
    def span(self, stream: torch.Stream, label: Label) -> Iterator[None]:
        """Add what the block puts into a stream. Does not wait."""
        begin = self.mark(stream)
        yield
        self.between(begin, self.mark(stream), label)

    def settle(self) -> list[Span]:
        """Find the times of what the streams have passed; return what is new in ``spans``."""
        passed = [one.end.is_passed for one in self._open]
        known = [
            Span(one.begin.host_ns, one.end.host_ns, one.step, one.label)
            for one in compress(self._open, passed)
        ]
        self._open = list(compress(self._open, [not there for there in passed]))
        self.spans += known
        return known


def _compare_clocks(device: torch.device) -> tuple[_Anchor, int]:
    """Return an event with its time, and half of the time within which it must have happened."""
    stream = torch.accelerator.current_stream(device)
    best: tuple[_Anchor, int] | None = None
    for _ in range(_TRIES):
        event = torch.Event(device=device, enable_timing=True)
        before = time.perf_counter_ns()
        stream.record_event(event)
        event.synchronize()
        half = (time.perf_counter_ns() - before + 1) // 2
        if best is None or half < best[1]:
            best = _Anchor(event, before + half), half
    assert best is not None
    return best


def spanned(
    timeline: Timeline | None, stream: torch.Stream, label: Label
) -> AbstractContextManager[None]:
    """As ``Timeline.span``; nothing where there is no timeline, or no step yet."""
    if timeline is None or timeline.step < 0:
        return nullcontext()
    return timeline.span(stream, label)
