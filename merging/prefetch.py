"""Batches that are made ahead: while the model works on one, the next ones are prepared."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Batch = TypeVar("Batch")
Rows = TypeVar("Rows")


def prefetch(
    prepare: Callable[[Rows], Batch], wanted: Iterable[Rows], *, threads: int = 1
) -> Iterator[Batch]:
    """All batches in order; what goes wrong in a thread is raised at its batch's turn.

    Args:
        prepare: makes a batch; with one thread it is called in order and never twice at a time.
        wanted: what each batch is made of.
        threads: that prepare; one batch more than these is waiting at most.
    """
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Batch]] = deque()
        try:
            for rows in wanted:
                waiting.append(pool.submit(prepare, rows))
                if len(waiting) > threads + 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for left in waiting:
                left.cancel()
