"""Doing something again and again, with a clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Clock = Callable[[], float]
Prepared = TypeVar("Prepared")

FEWEST_CALLS = 3


def repeat(
    prepare: Callable[[], Prepared],
    run: Callable[[Prepared], object],
    *,
    seconds: float,
    clock: Clock = time.perf_counter,
) -> list[float]:
    """Return how many seconds each ``run(prepare())`` took; the preparation is not timed.

    Goes on for about ``seconds``, and for three calls at least.
    """
    times: list[float] = []
    end = clock() + seconds
    while len(times) < FEWEST_CALLS or clock() < end:
        prepared = prepare()
        start = clock()
        run(prepared)
        times.append(clock() - start)
    return times
