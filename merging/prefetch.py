"""Prefetching: threads prepare the next batches while the model works on the current one."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Batch = TypeVar("Batch")
Rows = TypeVar("Rows")


def prefetch(
    prepare: Callable[[Rows], Batch], batches: Iterable[Rows], *, threads: int = 1
) -> Iterator[Batch]:
    """Yield all batches in order; an error in a thread is raised in place of its batch.

    Args:
        prepare: makes a batch; with one thread the calls are in order and never overlap.
        batches: the rows of each batch.
        threads: how many prepare batches; at most one more batch than these is waiting.
    """
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Batch]] = deque()
        try:
            for rows in batches:
                waiting.append(pool.submit(prepare, rows))
                if len(waiting) > threads + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for left in waiting:
                left.cancel()
