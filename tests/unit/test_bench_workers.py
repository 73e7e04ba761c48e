"""Work that is spread over several workers."""

from __future__ import annotations

import threading
import time

import pytest

from steer_plugins.bench.workers import side_by_side


def test_one_worker_takes_them_in_order() -> None:
    seen: list[int] = []
    assert side_by_side(["a"], lambda worker, n: (seen.append(n), f"{worker}{n}")[1], [3, 1, 2]) == ["a3", "a1", "a2"]
    assert seen == [3, 1, 2]


def test_results_come_in_the_order_of_the_items_and_the_longest_begin_first() -> None:
    started: list[int] = []
    both = threading.Barrier(2, timeout=10)

    def work(worker: str, n: int) -> int:
        started.append(n)
        if len(started) <= 2:
            both.wait()  # two of them are under way at the same time
        time.sleep(0.01 * n)
        return 10 * n

    assert side_by_side(["a", "b"], work, [1, 4, 2, 3], float) == [10, 40, 20, 30]
    assert set(started[:2]) == {3, 4} and len(started) == 4


def test_a_worker_has_one_item_at_a_time() -> None:
    busy: set[str] = set()

    def work(worker: str, n: int) -> str:
        assert worker not in busy
        busy.add(worker)
        time.sleep(0.002)
        busy.remove(worker)
        return worker

    assert set(side_by_side(["a", "b", "c"], work, range(30))) == {"a", "b", "c"}


def test_what_one_raises_is_raised_and_the_rest_is_left() -> None:
    done: list[int] = []

    def work(worker: str, n: int) -> None:
        if n == 0:
            raise KeyError("no")
        time.sleep(0.1)
        done.append(n)

    with pytest.raises(KeyError, match="no"):
        side_by_side(["a", "b"], work, range(50))
    assert len(done) < 10
