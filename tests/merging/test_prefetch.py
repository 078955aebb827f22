"""Batches that are made ahead come in order, few at a time, with their errors."""

import threading

import pytest

from restitch.merging.prefetch import prefetch


@pytest.mark.parametrize("threads", [1, 4])
def test_batches_come_in_order_and_few_are_prepared_ahead(threads: int) -> None:
    made: list[int] = []
    taken = 0

    def prepare(number: int) -> int:
        made.append(number)
        assert len(made) - taken <= threads + 2, "those that wait, and the one that is asked for"
        return number * number

    for number, found in enumerate(prefetch(prepare, range(40), threads=threads)):
        assert found == number * number
        taken += 1
    assert sorted(made) == [*range(40)]


def test_one_thread_never_prepares_two_at_a_time_and_in_order() -> None:
    made, busy = [], threading.Lock()

    def prepare(number: int) -> int:
        assert busy.acquire(blocking=False)
        made.append(number)
        busy.release()
        return number

    assert list(prefetch(prepare, range(50))) == made == [*range(50)]


def test_an_error_is_raised_at_its_batch_and_nothing_is_prepared_after_the_end() -> None:
    made = []

    def prepare(number: int) -> int:
        made.append(number)
        if number == 3:
            raise ValueError("row 3")
        return number

    batches = prefetch(prepare, range(100))
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="row 3"):
        next(batches)
    assert len(made) <= 7
