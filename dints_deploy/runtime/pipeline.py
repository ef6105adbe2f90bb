"""Stages that overlap in time: a thread makes items ahead of their use, or uses them behind their making.

The work releases Python's global lock (numpy, engines, unpacking), so threads are enough. Both forms hold few items,
hand every exception to the caller, and leave no thread running, whichever side stops first.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Queue
from threading import Event
from types import FrameType
from typing import Any, Final, TypeVar

T = TypeVar("T")
R = TypeVar("R")

STANDARD_ERROR: Final = 2

END: Final[Any] = object()
"""Stands behind the last item."""


def ahead(items: Iterable[T], depth: int = 1) -> Iterator[T]:
    """Yield the items in order, while another thread makes the next `depth` of them.

    An exception of `items` is raised where its item would have come.
    """
    source = iter(items)
    thread = ThreadPoolExecutor(1)
    try:
        making = deque(thread.submit(next, source, END) for _ in range(depth))
        while (item := making.popleft().result()) is not END:
            making.append(thread.submit(next, source, END))
            yield item
            del item  # items are large: none is held while the next is waited for
    finally:
        thread.shutdown(cancel_futures=True)


def behind(work: Callable[[Iterator[T]], R], items: Iterable[T], depth: int = 1) -> R:
    """Return `work(items)`, run in another thread while this one makes the items; at most `depth` of them wait.

    An exception of `items` goes before one of `work`, which is only its consequence. Ctrl-C comes between two items.
    """
    with interrupts_held() as let_through:
        return _behind(work, _each_then(items, let_through), depth)


def _behind(work: Callable[[Iterator[T]], R], items: Iterable[T], depth: int) -> R:
    handed: Queue[T] = Queue(depth)
    taken = iter(handed.get, END)
    stopped = Event()

    def working() -> R:
        try:
            return work(taken)
        finally:
            stopped.set()
            deque(taken, maxlen=0)  # so that nobody waits for room in the queue

    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(working)
        try:
            for item in items:
                if stopped.is_set():
                    break
                handed.put(item)
                del item
        finally:
            _put_end(handed)
        return result.result()


def _put_end(handed: Queue[Any]) -> None:
    """Tell that no item comes any more, whatever interrupts it: the thread behind would wait for ever."""
    while True:
        try:
            return handed.put(END)
        except KeyboardInterrupt:  # a second one: the first is on its way already
            continue


def _each_then(items: Iterable[T], then: Callable[[], None]) -> Iterator[T]:
    """Yield the items; call `then` before each."""
    for item in items:
        then()
        yield item
        del item


@contextmanager
def interrupts_held(told: str = "") -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back in this block; yield the function that raises it where it may come.

    Python raises it anywhere in the main thread, also in the middle of starting a thread or of telling it to end: that
    thread would wait for ever, and the process with it. A second Ctrl-C comes at once. Nothing is held in other
    threads, which get none, or where the program handles it in its own way.

    Args:
        told: to the person at the first Ctrl-C, where what is under way may take long.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: None
        return
    came, process = False, os.getpid()

    def hold(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        if told and os.getpid() == process:  # a process that was forked from it holds too
            os.write(STANDARD_ERROR, f"{told}\n".encode())  # a signal may come in the middle of a write to sys.stderr
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def let_through() -> None:
        if came:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, hold)
    try:
        yield let_through
    except Exception:
        let_through()  # it goes before an error, after which a batch would go on
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    let_through()


@dataclass
class Seconds:
    """Where the time went. Stages of different threads overlap: their sum may be more than the whole."""

    by_stage: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of a block to a stage; each stage belongs to one thread."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.by_stage[name] = self.by_stage.get(name, 0.0) + time.perf_counter() - begin

    def each(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Yield the items; the time that making them takes counts for a stage."""
        source = iter(items)
        while True:
            with self.stage(name):
                item = next(source, END)
            if item is END:
                return
            yield item
            del item
