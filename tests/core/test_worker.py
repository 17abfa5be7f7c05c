"""Work beside the rollout: order, back-pressure, and errors in either thread."""

import contextvars
import threading
import time

import pytest

from sf_core.worker import Ended, run_beside

WHERE = contextvars.ContextVar("where", default="elsewhere")


def test_the_result_is_the_consumers_and_the_order_is_kept():
    assert run_beside(range(1000), list) == list(range(1000))


def test_the_consumer_has_a_thread_and_the_callers_context():
    WHERE.set("node 7")

    def consume(items):
        return list(items), threading.get_ident(), WHERE.get()

    made, thread, where = run_beside((threading.get_ident() for _ in range(2)), consume)
    assert set(made) == {threading.get_ident()} and thread != threading.get_ident() and where == "node 7"


def test_both_are_busy_at_the_same_time():
    started = time.perf_counter()
    run_beside((time.sleep(0.05) for _ in range(8)), lambda items: [time.sleep(0.05) for _ in items])
    assert time.perf_counter() - started < 0.7, "8 x .05 s beside 8 x .05 s, and .8 s one after the other"


@pytest.mark.parametrize("waiting", (1, 3))
def test_no_more_items_are_made_than_may_wait(waiting):
    made, ahead = [], []

    def make():
        for i in range(12):
            made.append(i)
            yield i

    def consume(items):
        for item in items:
            time.sleep(0.01)
            ahead.append(len(made) - item)

    run_beside(make(), consume, waiting)
    assert max(ahead) <= waiting + 2, "what waits, the one in hand, and the one on its way"


@pytest.mark.parametrize("error", (ValueError("broken"), KeyboardInterrupt(), MemoryError("full")))
def test_an_error_in_making_goes_on_once_the_consumer_has_ended(error):
    seen = []

    def make():
        yield 1
        yield 2
        raise error

    def consume(items):
        try:
            for item in items:
                seen.append(item)
        except Ended:
            time.sleep(0.05)
            seen.append("ended")
            raise

    with pytest.raises(type(error)) as caught:
        run_beside(make(), consume)
    assert caught.value is error and seen == [1, 2, "ended"]


def test_a_consumer_that_fails_while_it_puts_things_in_order_is_heard():
    def make():
        yield 1
        raise ValueError("broken")

    def consume(items):
        try:
            list(items)
        except Ended:
            raise OSError("disk full") from None

    with pytest.raises(OSError, match="disk full"):
        run_beside(make(), consume)


@pytest.mark.parametrize("after", (0, 1, 5))
def test_an_error_of_the_consumer_ends_the_making(after):
    made, closed = [], []

    def make():
        try:
            for i in range(10_000):
                made.append(i)
                yield i
        finally:
            closed.append(True)

    def consume(items):
        for i, _ in enumerate(items):
            if i == after:
                raise OSError("disk full")

    before = threading.active_count()
    with pytest.raises(OSError, match="disk full"):
        run_beside(make(), consume)
    assert len(made) <= after + 5 and closed == [True] and threading.active_count() == before


def test_a_consumer_that_has_enough_ends_the_making():
    made = []
    assert run_beside((made.append(i) or i for i in range(10_000)), next) == 0
    assert len(made) <= 5


def test_nothing_to_make_is_an_empty_iterator():
    assert run_beside([], list) == []
