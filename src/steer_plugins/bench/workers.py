"""Work that several engines of the same model do side by side."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

W = TypeVar("W")
T = TypeVar("T")
R = TypeVar("R")


def side_by_side(
    workers: Sequence[W],
    work: Callable[[W, T], R],
    items: Iterable[T],
    length: Callable[[T], float] | None = None,
) -> list[R]:
    """``work(worker, item)`` for each item, by whichever worker is free; one worker alone takes them one after the other.

    ``length``: about how long an item takes. The longest begin first, so that none is left alone at the end. Results are in the
    order of the items. Raises what the first item that failed did; those that had not begun are left.
    """
    if len(workers) == 1:
        return [work(workers[0], item) for item in items]
    free: queue.SimpleQueue[W] = queue.SimpleQueue()
    for worker in workers:
        free.put(worker)

    def one(item: T) -> R:
        worker = free.get()
        try:
            return work(worker, item)
        finally:
            free.put(worker)

    numbered = list(enumerate(items))
    if length is not None:
        numbered.sort(key=lambda pair: -length(pair[1]))
    with ThreadPoolExecutor(len(workers)) as pool:
        waiting = {number: pool.submit(one, item) for number, item in numbered}
        try:
            return [waiting[number].result() for number in sorted(waiting)]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
