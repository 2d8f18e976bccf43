"""Threads that run calls for an event loop, no more of them at a time than is of use.

Calls that wait (for an HSM on the network, for a database) run beside each other. Calls that
compute only take the GIL from each other: with two threads each call took twice the processor time
that it took with one (field note 104). So fewer run at a time while they compute.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from hsmwrap.http.answer import Answer
from hsmwrap.http.wsgi import failure

PERIOD_SECONDS = 0.05
"""How often :class:`Threads` decides how many calls run at a time."""

SATURATED = 0.95
"""Share of one processor from which on calls are said to compute: the GIL gives them no more."""

_T = TypeVar("_T")
_Call = tuple[Callable[[], Any], Callable[[Any], None]]
"""What a thread does, and what is done with what it returns."""


class Concurrency:
    """How many calls run at a time.

    Attributes:
        limit: The number.
    """

    def __init__(self, most: int) -> None:
        """Begin with as many as there may be."""
        self.limit = self._most = most

    def adapt(self, share: float, *, waiting: bool) -> None:
        """Change the limit.

        Args:
            share: The processor time that the calls took or stood in line for in the last period,
                as a fraction of the period.
            waiting: Whether calls wait for their turn.
        """
        if share > SATURATED:
            self.limit = max(1, self.limit // 2)
        elif waiting:
            each = share / self.limit
            for more in (self.limit, max(1, self.limit // 4)):
                if each * (self.limit + more) < SATURATED:
                    self.limit = min(self._most, self.limit + more)
                    break


class Threads:
    """Threads that run a limited number of calls. Only for the thread of the event loop.

    A pool of ``concurrent.futures`` makes a future with a lock of its own for each call, and wakes
    the loop for each. Here calls go through one queue, and answers that come while the loop is
    being woken are taken along.

    Attributes:
        free: How many calls are taken now.
    """

    def __init__(
        self, threads: int, calls: int, name: str, loop: asyncio.AbstractEventLoop
    ) -> None:
        """Start nothing yet.

        Args:
            threads: How many calls run at a time, at most.
            calls: How many are taken: those that run, and those that wait.
            name: Of the threads.
            loop: The event loop.
        """
        self.free = self._calls = calls
        self._name, self._loop = name, loop
        self._concurrency = Concurrency(threads)
        self._threads: list[threading.Thread] = []
        self._todo: SimpleQueue[_Call | None] = SimpleQueue()
        self._ended: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._waking = self._closed = False
        # Threads beyond the limit are parked; the others wait for a call or run one.
        self._awake = 0
        self._counting = threading.Lock()
        self._parked: SimpleQueue[None] = SimpleQueue()
        self._clock: _ProcessorTime | None = None
        self._watched_since: float | None = None

    @property
    def running(self) -> int:
        """How many calls run or wait. Also for other threads."""
        return self._calls - self.free

    def run(self, work: Callable[[], _T], done: Callable[[_T | Answer], None]) -> None:
        """Have a thread call ``work``, and the loop ``done`` with what it returns.

        If it raises, ``done`` gets the answer of that error.
        """
        self.free -= 1
        self._todo.put((work, done))
        self._wake_threads()
        if self._watched_since is None:
            self._watch()

    def close(self) -> None:
        """Drop the calls that no thread has taken yet; the threads end."""
        self._closed = True
        for _ in self._threads:
            self._todo.put(None)
            self._parked.put(None)

    # --- how many calls run at a time

    def _wake_threads(self) -> None:
        """Have as many threads awake as calls may run now."""
        wanted = min(self._concurrency.limit, self.running)
        with self._counting:
            more = max(0, wanted - self._awake)
            parked = min(more, len(self._threads) - self._awake)
            self._awake += parked
        for _ in range(parked):
            self._parked.put(None)
        for _ in range(more - parked):
            self._start_thread()

    def _start_thread(self) -> None:
        name = f"{self._name}_{len(self._threads) + 1}"
        thread = threading.Thread(target=self._work, name=name)
        thread.start()
        with self._counting:
            self._threads.append(thread)
            self._awake += 1

    def _watch(self) -> None:
        """Decide how many calls run at a time, again and again while there are any."""
        if self._clock is None:
            self._clock = _ProcessorTime(threading.get_native_id())
        now, took = self._loop.time(), self._clock.since_last(self._threads)
        if self._watched_since is not None and took is not None:
            share = took / (now - self._watched_since)
            self._concurrency.adapt(share, waiting=not self._todo.empty())
            self._wake_threads()
        busy = self.free < self._calls and not self._closed
        self._watched_since = now if busy else None
        if busy:
            self._loop.call_later(PERIOD_SECONDS, self._watch)

    def _parks(self) -> bool:
        """Whether the thread that asks is one too many, and now counts as parked."""
        with self._counting:
            parks = self._awake > self._concurrency.limit
            self._awake -= parks
        return parks

    # --- in the threads

    def _work(self) -> None:
        while not self._closed:
            if self._parks():
                self._parked.get()
                continue
            call = self._todo.get()
            if call is None:
                return
            work, done = call
            try:
                answer = work()
            except BaseException as error:  # noqa: BLE001  # whatever it is, the client waits
                answer = failure(error)
            self._ended.append((done, answer))
            del call, work, done, answer  # a thread that waits keeps no request
            if not self._waking:
                self._waking = True
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    self._loop.call_soon_threadsafe(self._take)

    def _take(self) -> None:
        self._waking = False  # before what has ended is taken: what ends from now on wakes again
        try:
            while self._ended:
                done, answer = self._ended.popleft()
                self.free += 1
                done(answer)
        finally:
            if self._ended:  # after an error
                self._loop.call_soon(self._take)


class _ProcessorTime:
    """The processor time of some threads and of the event loop, which takes the GIL from them.

    What they stood in line for counts too: else calls on a busy machine would seem to wait for
    something else, and more of them would run. Source: the kernel's Documentation/scheduler/
    sched-stats.rst, /proc/<pid>/schedstat.
    """

    def __init__(self, loop_id: int) -> None:
        self._loop_id = loop_id
        self._last: dict[int, int] = {}

    def since_last(self, threads: Iterable[threading.Thread]) -> float | None:
        """Seconds since the last call; None where the kernel does not tell."""
        last, self._last = self._last, {}
        ids = [self._loop_id, *(each.native_id for each in threads if each.native_id)]
        try:
            for each in ids:
                fields = Path(f"/proc/self/task/{each}/schedstat").read_bytes().split()
                self._last[each] = int(fields[0]) + int(fields[1])
        except (OSError, ValueError, IndexError):
            return None
        return sum(now - last.get(each, now) for each, now in self._last.items()) / 1e9
