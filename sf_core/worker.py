"""Work beside the rollout: frames are shown, encoded and written in a thread while the next ones are made.

    run_beside(frames, lambda frames: save_video("circle.mp4", frames))

A video then takes as long as the longer of the two, and not as both together: pictures and films are encoded outside of
Python's lock, and a GPU is handed its next chunk while the last one is written.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
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
    worker, made = Worker(consume, waiting), iter(items)
    try:
        for item in made:
            if worker.is_done:
                break
            worker.put(item)
    except BaseException:
        with suppress(Ended):
            worker.close(is_cut_short=True)
        raise
    finally:
        if hasattr(made, "close"):
            made.close()
    return worker.close()


class Worker(Generic[Item, Result]):
    """A thread that runs `consume` over the items that are put into it, of which `waiting` may wait."""

    def __init__(self, consume: Callable[[Iterator[Item]], Result], waiting: int = 2) -> None:
        self._items: Queue[Item | _Last] = Queue(waiting)
        self._last: _Last | None = None  # once the consumer has come to it
        self._result: Future[Result] = Future()
        self._thread = Thread(target=contextvars.copy_context().run, args=(self._run, consume), name="frames")
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether it takes no more items: it has enough, or has failed."""
        return self._result.done()

    def put(self, item: Item) -> None:
        """Hands over an item, once there is room. Raises what `consume` has raised."""
        if self.is_done:
            self._result.result()
        self._items.put(item)

    def close(self, is_cut_short: bool = False) -> Result:
        """Ends the items and waits for the result. Raises what `consume` raises; it sees `Ended` where they are cut
        short."""
        self._items.put(_Last(is_cut_short))
        self._thread.join()
        return self._result.result()

    def _run(self, consume: Callable[[Iterator[Item]], Result]) -> None:
        try:
            self._result.set_result(consume(self._taken()))
        except BaseException as error:  # noqa: BLE001 - it is raised again in the other thread
            self._result.set_exception(error)
        while self._last is None:  # nobody may wait for room in the queue of a consumer that has gone
            self._take()

    def _taken(self) -> Iterator[Item]:
        while self._last is None:
            item = self._take()
            if self._last is None:
                yield item
            del item  # it is the consumer's alone
        if self._last.is_cut_short:
            raise Ended("no more items were made")

    def _take(self) -> Item | _Last:
        item = self._items.get()
        if isinstance(item, _Last):
            self._last = item
        return item


@dataclass(frozen=True)
class _Last:
    """What is handed over in the end."""

    is_cut_short: bool
