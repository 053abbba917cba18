"""Run jobs in parallel and take their results in order, a few at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")


def in_order(jobs: Iterable[Callable[[], Result]], threads: int) -> Iterator[Result]:
    """Yield what the jobs return; at most two for each thread are started and not yet taken."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="kt-quant") as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(job))
                if len(waiting) == 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException:  # Ctrl-C too: start no more, then let it through
            pool.shutdown(cancel_futures=True)
            raise
