"""Work beside the rollout: frames are shown, encoded and written in a thread while the next ones are made.

    run_beside(frames, lambda frames: save_video("circle.mp4", frames))

A video then takes as long as the longer of the two, and not as both together: pictures and films are encoded outside of
Python's lock, and a GPU is handed its next chunk while the last one is written.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from queue import Queue
from threading import Thread
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Ended(Exception):
    """What the consumer sees where making its items has ended with an exception, which is the caller's to see."""


def run_beside(items: Iterable[Item], consume: Callable[[Iterator[Item]], Result], waiting: int = 2) -> Result:
    """The result of `consume(items)`, which runs in a thread while the items are made in this one.

    The order is kept, and no more than `waiting` items wait for a slow consumer. Where making an item raises, the
    consumer sees `Ended` and may still put its things in order, and the exception goes on once it has; where the
    consumer raises, or has enough, no more are made. Context variables are the caller's.
    """
    worker = _Worker(consume, waiting)
    made = iter(items)
    try:
        for item in made:
            worker.handed.put(_Handed(item))
            if worker.result.done():
                break
    except BaseException:
        worker.handed.put(_Handed(error=True))
        worker.join()
        error = worker.result.exception()
        if error is not None and not isinstance(error, Ended):
            raise error from None
        raise
    finally:
        if hasattr(made, "close"):
            made.close()
    worker.handed.put(None)
    worker.join()
    return worker.result.result()


class _Handed(Generic[Item]):
    """An item, or the news that there will be none."""

    def __init__(self, item: Item | None = None, error: bool = False) -> None:
        self.item, self.error = item, error


class _Worker(Generic[Item, Result]):
    """A thread that consumes what is `handed` to it; None ends it."""

    def __init__(self, consume: Callable[[Iterator[Item]], Result], waiting: int) -> None:
        self.handed: Queue[_Handed[Item] | None] = Queue(waiting)
        self.result: Future[Result] = Future()
        self.is_over = False
        self.thread = Thread(target=contextvars.copy_context().run, args=(self._run, consume), name="frames")
        self.thread.start()

    def join(self) -> None:
        self.thread.join()

    def _run(self, consume: Callable[[Iterator[Item]], Result]) -> None:
        try:
            self.result.set_result(consume(self._items()))
        except BaseException as error:  # noqa: BLE001 - it is raised again in the other thread
            self.result.set_exception(error)
        while not self.is_over:  # nobody may wait for room in the queue of a consumer that has gone
            self.is_over = self._is_last(self.handed.get())

    def _items(self) -> Iterator[Item]:
        while True:
            handed = self.handed.get()
            self.is_over = self._is_last(handed)
            if handed is None:
                return
            if handed.error:
                raise Ended("no more frames were made")
            yield handed.item
            del handed

    @staticmethod
    def _is_last(handed: _Handed[Item] | None) -> bool:
        return handed is None or handed.error
