"""Threads for calls: as many run at a time as is of use, and each is answered."""

from __future__ import annotations

import asyncio
import threading
import time
from functools import partial

import pytest

from hsmwrap.http import threads
from hsmwrap.http.answer import Answer
from hsmwrap.http.threads import Concurrency, Threads

DEADLINE = 20
ANSWER = Answer("200 OK", [], b"")


@pytest.mark.parametrize(
    ("limit", "share", "waiting", "wanted"),
    [
        pytest.param(16, 0.96, True, 8, id="computing"),
        pytest.param(16, 1.8, False, 8, id="computing, none waits"),
        pytest.param(1, 1.0, True, 1, id="one computes"),
        pytest.param(1, 0.5, True, 1, id="two would compute"),
        pytest.param(1, 0.47, True, 2, id="two have room"),
        pytest.param(4, 0.4, True, 8, id="twice as many have room"),
        pytest.param(4, 0.5, True, 5, id="one more has room"),
        pytest.param(4, 0.76, True, 4, id="one more would compute"),
        pytest.param(4, 0.95, True, 4, id="just enough"),
        pytest.param(4, 0.0, False, 4, id="none waits"),
        pytest.param(12, 0.0, True, 16, id="no more than there may be"),
    ],
)
def test_fewer_calls_run_while_they_compute_and_more_while_they_wait(limit, share, waiting, wanted):
    concurrency = Concurrency(16)
    concurrency.limit = limit
    concurrency.adapt(share, waiting=waiting)
    assert concurrency.limit == wanted


def test_at_first_as_many_run_as_may():
    assert Concurrency(16).limit == 16


class Calls:
    """Calls that wait until they are released, and how many of them run."""

    def __init__(self, loop, many: int = 4) -> None:
        self.threads = Threads(many, 64, "test", loop)
        self.release = threading.Event()
        self.begun, self.done = threading.Semaphore(0), asyncio.Semaphore(0)
        self.running = self.most = 0
        self._lock = threading.Lock()

    def run(self, work=None) -> None:
        self.threads.run(work or self._wait, lambda _answer: self.done.release())

    def _wait(self) -> Answer:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        self.begun.release()
        self.release.wait(2 * DEADLINE)
        with self._lock:
            self.running -= 1
        return ANSWER

    async def begin(self, count: int) -> None:
        for _ in range(count):
            assert await asyncio.to_thread(self.begun.acquire, timeout=DEADLINE)

    async def end(self, count: int) -> None:
        async with asyncio.timeout(DEADLINE):
            for _ in range(count):
                await self.done.acquire()


def with_calls(scenario) -> None:
    async def run() -> None:
        calls = Calls(asyncio.get_running_loop())
        try:
            await scenario(calls)
        finally:
            calls.release.set()
            calls.threads.close()
            for thread in calls.threads._threads:
                await asyncio.to_thread(thread.join, DEADLINE)
                assert not thread.is_alive()

    asyncio.run(run())


async def until(condition) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():  # noqa: ASYNC110  # nothing tells of it
            await asyncio.sleep(0.01)


@pytest.fixture
def share(monkeypatch):
    """The share of a processor that calls seem to take."""
    told = {"share": 0.0}
    monkeypatch.setattr(
        threads._ProcessorTime,
        "since_last",
        lambda _self, _threads: told["share"] * 1e9,
    )
    return told


def test_calls_that_wait_all_run_though_one_ran_at_a_time_before(share):
    async def scenario(calls):
        share["share"] = 1
        for _ in range(4):
            calls.run()
        await until(lambda: calls.threads._concurrency.limit == 1)
        share["share"] = 0
        for _ in range(4):
            calls.run()
        # None of the first four ends, and with the limit of 1 none of the others would begin.
        await calls.begin(4)
        calls.release.set()
        await calls.begin(4)
        await calls.end(8)

    with_calls(scenario)


def test_a_call_that_hangs_holds_up_no_other(share):
    async def scenario(calls):
        calls.threads._concurrency.limit = 1
        calls.run()
        await calls.begin(1)
        calls.run(lambda: ANSWER)
        await calls.end(1)
        assert calls.running == 1

    with_calls(scenario)


def test_calls_that_compute_run_one_at_a_time(share):
    async def scenario(calls):
        share["share"] = 1
        for _ in range(4):
            calls.run()
        await calls.begin(4)
        await until(lambda: calls.threads._concurrency.limit == 1)
        calls.release.set()
        await calls.end(4)
        calls.most = 0
        calls.release.clear()
        for _ in range(8):
            calls.run()
        await calls.begin(1)
        await asyncio.sleep(2 * threads.PERIOD_SECONDS)
        assert calls.most == 1
        calls.release.set()
        await calls.end(8)
        assert calls.most == 1

    with_calls(scenario)


def test_parked_threads_wake_again_instead_of_new_ones(share):
    async def scenario(calls):
        for limit in (4, 1, 4):
            calls.threads._concurrency.limit = limit
            calls.release.clear()
            for _ in range(limit):
                calls.run()
            await calls.begin(limit)
            calls.release.set()
            await calls.end(limit)
            if limit == 4:
                calls.threads._concurrency.limit = 1
                calls.run(lambda: ANSWER)
                await calls.end(1)
                await until(lambda: calls.threads._awake <= 4)
        assert len(calls.threads._threads) == 4

    with_calls(scenario)


def test_calls_that_no_thread_took_are_dropped_at_close(share):
    ran = []

    async def scenario(calls):
        calls.threads._concurrency.limit = 1
        share["share"] = 1
        calls.run()
        await calls.begin(1)
        calls.run(lambda: ran.append("a late call") or ANSWER)
        calls.threads.close()
        calls.release.set()
        await calls.end(1)

    with_calls(scenario)
    assert not ran


def test_nothing_watches_while_nothing_runs(share):
    async def scenario(calls):
        calls.run(lambda: ANSWER)
        await calls.end(1)
        await until(lambda: calls.threads._watched_since is None)
        calls.run(lambda: ANSWER)
        assert calls.threads._watched_since is not None
        await calls.end(1)

    with_calls(scenario)


def test_processor_time_of_threads_is_what_they_take():
    stop = threading.Event()
    idle = threading.Thread(target=partial(stop.wait, DEADLINE))
    idle.start()
    own = threading.current_thread()
    try:
        ours, others = (threads._ProcessorTime(each.native_id) for each in (own, idle))
        both = threads._ProcessorTime(idle.native_id)
        assert ours.since_last([]) == others.since_last([]) == both.since_last([own]) == 0
        begin = time.thread_time()
        while time.thread_time() < begin + 0.05:
            pass
        took = time.thread_time() - begin
        assert min(ours.since_last([]), both.since_last([own])) >= took
        assert others.since_last([]) < took
    finally:
        stop.set()
        idle.join()


def test_where_the_kernel_does_not_tell_as_many_run_as_may(monkeypatch):
    assert threads._ProcessorTime(0).since_last([]) is None
    monkeypatch.setattr(threads._ProcessorTime, "since_last", lambda _self, _threads: None)

    async def scenario(calls):
        for _ in range(4):
            calls.run()
        await calls.begin(4)
        calls.release.set()
        await calls.end(4)
        assert calls.threads._concurrency.limit == 4

    with_calls(scenario)
