"""Stages that overlap in time keep the order, hold few items, hand every error over, and leave no thread behind."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from dints_deploy.runtime.pipeline import Seconds, ahead, behind


class BrokenError(Exception):
    """What a stage raises in these tests."""


def failing_after(count: int) -> Iterator[int]:
    """Yield 0, 1 ... and then fail."""
    yield from range(count)
    raise BrokenError


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.mark.parametrize("depth", [1, 3])
def test_items_come_in_order(depth: int) -> None:
    assert list(ahead(range(50), depth)) == list(range(50))
    assert behind(list, iter(range(50)), depth) == list(range(50))
    assert list(ahead([], depth)) == behind(list, iter([]), depth) == []


@pytest.mark.parametrize("depth", [1, 2])
def test_the_next_items_are_made_while_one_is_used_and_no_more_than_told(depth: int) -> None:
    made: list[int] = []
    reached = threading.Event()

    def items() -> Iterator[int]:
        for n in range(10):
            made.append(n)
            if n == depth:
                reached.set()
            yield n

    source = ahead(items(), depth)
    assert next(source) == 0
    assert reached.wait(10)  # made while item 0 is held
    assert made == list(range(depth + 1))
    source.close()  # type: ignore[attr-defined]
    assert len(made) <= depth + 2


def test_an_error_of_the_items_comes_where_its_item_would_have_come() -> None:
    source = ahead(failing_after(3))
    assert [next(source) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(BrokenError):
        next(source)


def test_an_error_of_the_items_ends_the_work_behind_and_is_the_one_told() -> None:
    def work(items: Iterator[int]) -> int:
        if len(list(items)) < 10:
            raise ValueError("only a consequence")
        return 1

    with pytest.raises(BrokenError):
        behind(work, failing_after(3))


def test_an_error_of_the_work_stops_the_items() -> None:
    made = []

    def items() -> Iterator[int]:
        for n in range(1_000_000):
            made.append(n)
            yield n

    def work(items: Iterator[int]) -> None:
        next(items)
        raise BrokenError

    with pytest.raises(BrokenError):
        behind(work, items())
    assert len(made) < 1000


def test_work_that_needs_no_more_items_ends_the_making() -> None:
    assert behind(next, failing_after(1_000_000)) == 0


def test_an_interrupt_while_waiting_ends_both_threads() -> None:
    """Ctrl-C raises KeyboardInterrupt in the main thread, wherever it is."""

    def interrupted() -> Iterator[int]:
        yield 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        behind(list, ahead(interrupted()))


@pytest.fixture
def default_interrupt() -> Iterator[None]:
    """As a terminal's programs have it: what is started in the background ignores Ctrl-C, the tests perhaps."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


@pytest.mark.parametrize(("times", "made"), [(1, [0, 1, 2]), (2, [0, 1])])
def test_ctrl_c_waits_for_the_item_under_way_and_a_second_one_does_not(
    times: int, made: list[int], default_interrupt: None
) -> None:
    found = []

    def items() -> Iterator[int]:
        for n in range(5):
            if n == 2:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
            found.append(n)
            yield n

    with pytest.raises(KeyboardInterrupt):
        behind(list, items())
    assert found == made


def press_ctrl_c() -> None:
    """Send the signal to the main thread, from another one."""
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)


def test_a_second_ctrl_c_while_the_work_is_told_to_end_leaves_no_thread_waiting(default_interrupt: None) -> None:
    def work(items: Iterator[int]) -> list[int]:
        next(items)
        pause = threading.Event()
        pause.wait(0.2)  # one item waits, another one waits for room
        press_ctrl_c()
        pause.wait(0.1)
        next(items)  # room for that one: then the making ends, and waits for room to say so
        pause.wait(0.1)
        press_ctrl_c()
        pause.wait(0.1)
        return list(items)

    with pytest.raises(KeyboardInterrupt):
        behind(work, iter(range(100)))


def test_ctrl_c_goes_before_an_error_of_the_same_item(default_interrupt: None) -> None:
    def items() -> Iterator[int]:
        yield 0
        signal.raise_signal(signal.SIGINT)
        raise BrokenError

    with pytest.raises(KeyboardInterrupt):
        behind(list, items())


def test_ctrl_c_after_the_last_item_still_comes(default_interrupt: None) -> None:
    def work(items: Iterator[int]) -> None:
        for _ in items:
            pass
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        behind(work, iter(range(3)))


def test_busy_time_of_each_stage_is_added_up() -> None:
    seconds = Seconds()
    pause = threading.Event()

    def slow() -> Iterator[int]:
        for n in range(3):
            pause.wait(0.02)
            yield n

    assert list(seconds.each("slow", slow())) == [0, 1, 2]
    with seconds.stage("quick"):
        pass
    assert seconds.by_stage["slow"] > 0.05 > seconds.by_stage["quick"]
