"""What devices did while an engine's model ran."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kt_core.interfaces import ExpertDevice


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTime:
    """What a device did in the steps of a run; None for what nobody knows.

    Attributes:
        experts_s: It computed experts, or packed dense layers.
        idle_s: It had nothing to do. Of the accelerator with the dense part: it waited for the
            host's experts. Whether it was busy otherwise, events do not tell. None for a host
            without accelerators, whose cores compute the dense part meanwhile.
    """

    experts_s: float | None
    idle_s: float | None


class StepClock:
    """Adds up the steps of one engine: always on, since it costs a microsecond a step.

    Attributes:
        steps_s: All forward passes, from the tokens to the logits in host memory.
    """

    def __init__(self, host: ExpertDevice) -> None:
        """Start at zero.

        Args:
            host: Computes experts, of all layers or the cold ones.
        """
        self.steps_s = 0.0
        self._host = host
        self._busy_s = 0.0
        self._awaited_s = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Count what happens in the block."""
        before, start = self._host.usage(), time.perf_counter()
        try:
            yield
        finally:
            self.steps_s += time.perf_counter() - start
            after = self._host.usage()
            if before is not None and after is not None:
                self._busy_s += after.busy_s - before.busy_s
                self._awaited_s += after.awaited_s - before.awaited_s

    def times(self, accelerator: ExpertDevice | None) -> dict[str, DeviceTime]:
        """Return what the host did, and the accelerator with the dense part.

        What an accelerator computes takes events to tell, and a profiler to put them there.
        """
        is_known = self._host.usage() is not None
        busy_s = self._busy_s if is_known else None
        if accelerator is None:
            return {self._host.info.name: DeviceTime(experts_s=busy_s, idle_s=None)}
        # Without functions that streams call, the host itself waits, and nobody measures for whom.
        is_called = is_known and accelerator.host_functions is not None
        return {
            self._host.info.name: DeviceTime(
                experts_s=busy_s,
                idle_s=None if busy_s is None else max(0.0, self.steps_s - busy_s),
            ),
            accelerator.info.name: DeviceTime(
                experts_s=None, idle_s=self._awaited_s if is_called else None
            ),
        }
