import gc
import logging
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from support.keypool.fakes import (
    DAY,
    NOW,
    OAEP,
    PKCS1,
    SM2,
    Child,
    FakeBackend,
    ManualPool,
    wait_for,
)

from hsmwrap.backend import Custody
from hsmwrap.errors import (
    BackendClosed,
    ConfigurationError,
    HsmError,
    HsmUnavailable,
    PinError,
    PoolTimeout,
    UnsupportedOperation,
)
from hsmwrap.keypool import KeyPool, PoolSettings
from hsmwrap.keypool import _pool as pool_module
from hsmwrap.keypool._stock import LONGEST_PAUSE, PairFacts, ReadyPair, Stock

HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)
SMALL = PoolSettings(high_water=4, low_water=1, max_age=HOUR, initial_backoff=1, max_backoff=8)


def number(pair):
    return pair.public_key.removeprefix(b"public ")


@pytest.fixture
def backend():
    return FakeBackend()


@pytest.fixture
def pool():
    manual = ManualPool(SMALL)
    yield manual
    pool_module._POOLS.discard(manual)  # closing fails in some tests, and would fail again at exit


@pytest.fixture
def filled(pool, backend):
    pool.prepare(backend, [OAEP])
    pool.work()
    assert pool.fact().level == 4
    return pool


# --- settings


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"high_water": -1}, "high_water"),
        ({"high_water": 4, "low_water": 4}, "low_water"),
        ({"low_water": -1}, "low_water"),
        ({"threads": 0}, "threads"),
        ({"max_age": timedelta(0)}, "max_age"),
        ({"token_lifetime": timedelta(0)}, "token_lifetime"),
        ({"initial_backoff": 0}, "initial_backoff: takes a number of seconds, more than 0"),
        ({"initial_backoff": 2, "max_backoff": 1}, "initial_backoff is at most"),
    ],
)
def test_contradicting_settings_are_refused(wrong, rule):
    with pytest.raises(ConfigurationError, match=f"key-pair pool: {rule}"):
        PoolSettings(**wrong)


def test_high_water_0_switches_the_pool_off(backend):
    with KeyPool(PoolSettings(high_water=0)) as pool:
        pool.prepare(backend, [OAEP])
        pool(backend, *OAEP, NOW)
        assert not pool.facts()
        assert not pool._threads
    assert backend.asked == [(*OAEP, NOW)]


# --- taking and filling


def test_empty_pool_generates_inline(pool, backend):
    wanted = NOW.replace(microsecond=0) + DAY
    assert pool.take(backend).public_key == b"public 0"
    assert backend.asked == [(*OAEP, wanted)]
    assert (pool.fact().hits, pool.fact().misses) == (0, 1)


def test_a_kind_that_was_asked_for_is_made_ahead_up_to_high_water(pool, backend):
    pool.take(backend)
    assert pool.work() == 4
    assert (pool.fact().level, pool.fact().generated) == (4, 4)


def test_ready_pairs_are_handed_out_in_their_order_and_once(filled, backend):
    given = [filled.take(backend).public_key for _ in range(5)]
    assert given == [b"public %d" % i for i in range(5)]
    assert (filled.fact().hits, filled.fact().misses, filled.fact().level) == (4, 1, 0)


def test_a_refill_waits_for_low_water_and_goes_to_high_water(filled, backend):
    filled.take(backend)
    filled.take(backend)
    assert not filled.work()
    filled.take(backend)
    assert filled.fact().level == SMALL.low_water
    filled.work()
    assert filled.fact().level == SMALL.high_water


# --- rotation of the backend's keys


@pytest.fixture
def sealed():
    """A backend whose private wrapping keys are sealed under its key sets."""
    return FakeBackend(custody=Custody.HSM_ENCRYPTED_DATABASE)


@pytest.fixture
def filled_sealed(pool, sealed):
    pool.prepare(sealed, [OAEP])
    pool.work()
    assert pool.fact().level == 4
    return pool


def test_sealed_pairs_of_an_old_key_set_are_not_handed_out(sealed, filled_sealed):
    """The old set may be retired by now: their import tokens would be refused."""
    filled = filled_sealed
    sealed.rotate()
    filled.time.move(SECOND)
    assert filled.take(sealed).public_key == b"public 4"  # made inline, under the new set
    assert (filled.fact().level, filled.fact().discarded, filled.fact().misses) == (0, 4, 1)
    filled.work()
    assert filled.take(sealed).public_key == b"public 5"
    assert filled.fact().hits == 1


def test_a_pair_during_whose_making_the_keys_were_rotated_is_not_handed_out(pool, sealed):
    def rotate(pair):
        sealed.changing.clear()
        sealed.rotate()
        return pair

    sealed.changing["generate_wrapping_key"] = rotate
    pool.prepare(sealed, [OAEP])
    pool.work()
    assert pool.take(sealed).public_key == b"public 1"
    assert (pool.fact().discarded, pool.fact().hits) == (1, 1)


def test_a_backend_is_asked_for_its_key_set_once_a_second(sealed, filled_sealed):
    for moment, times in ((0.9, 0), (0.1, 1), (0.9, 1), (0.1, 2)):
        filled_sealed.time.move(moment * SECOND)
        assert filled_sealed.take(sealed)
        assert sealed.calls.count("current_key_set") == times
    assert "mac" not in sealed.calls


def test_resident_pairs_outlive_the_key_set(backend, filled):
    backend.rotate()
    filled.time.move(SECOND)
    assert filled.take(backend).public_key == b"public 0"
    assert filled.fact().discarded == 0
    assert "current_key_set" not in backend.calls


def test_sealed_pairs_are_kept_while_the_backend_cannot_say_its_key_set(sealed, filled_sealed):
    filled = filled_sealed
    sealed.failing["current_key_set"] = HsmUnavailable("unavailable")
    filled.time.move(SECOND)
    assert filled.take(sealed).public_key == b"public 4"
    assert (filled.fact().level, filled.fact().discarded) == (4, 0)
    sealed.failing.clear()
    assert filled.take(sealed).public_key == b"public 0"


def test_a_backend_that_cannot_say_its_key_set_at_all_gets_its_pairs_inline(pool, sealed):
    sealed.ability = lambda kind: None
    pool.prepare(sealed, [OAEP])
    pool.work()
    pool.time.move(SECOND)
    assert pool.take(sealed).public_key == b"public 4"
    assert (pool.fact().level, pool.fact().hits) == (4, 0)


def test_a_wrapping_key_without_a_key_set_outlives_every_rotation(pool, sealed):
    sealed.changing["generate_wrapping_key"] = lambda pair: replace(pair, key_set=None)
    pool.prepare(sealed, [OAEP])
    pool.work()
    sealed.rotate()
    pool.time.move(SECOND)
    assert pool.take(sealed).public_key == b"public 0"


# --- the rest of taking and filling


def test_pairs_being_made_count(pool, backend):
    pool.prepare(backend, [OAEP])
    jobs = [pool._pick(pool.time.now, pool.time.tick) for _ in range(6)]
    assert [job is not None for job in jobs] == [True] * 4 + [False] * 2


def test_a_pair_serves_the_algorithm_and_the_backend_that_it_was_made_for(filled, backend):
    other = FakeBackend("other")
    assert filled.take(backend, PKCS1).algorithm == PKCS1[1]
    assert filled.take(other).public_key == b"public 0"
    assert (filled.fact().level, filled.fact(PKCS1).misses) == (4, 1)


def test_the_emptiest_kind_is_filled_first(pool, backend):
    pool.prepare(backend, [OAEP, SM2])
    pool.work()
    for _ in range(3):
        pool.take(backend)
    for _ in range(4):
        pool.take(backend, SM2)
    backend.asked.clear()
    pool.work()
    order = [(spec, algorithm) for spec, algorithm, _ in backend.asked]
    assert order[0] == SM2
    assert sorted(order[1:3]) == sorted([OAEP, SM2])


def test_only_the_kinds_in_the_settings_are_pooled(backend):
    pool = ManualPool(PoolSettings(pairs=frozenset({OAEP})))
    pool.prepare(backend, [OAEP, SM2])
    pool.take(backend, SM2)
    pool.work()
    assert [(f.spec, f.algorithm) for f in pool.facts()] == [OAEP]


# --- expiry and age


def test_the_expiry_of_a_pair_covers_its_time_in_the_pool_and_the_token(filled, backend):
    assert {expiry for *_, expiry in backend.asked} == {NOW.replace(microsecond=0) + HOUR + DAY}


def test_every_pair_handed_out_outlives_its_token(filled, backend):
    made = {b"public %d" % i: expiry for i, (*_, expiry) in enumerate(backend.asked)}
    filled.time.move(HOUR - SECOND)
    given = filled.take(backend)
    assert filled.fact().hits == 1
    assert made[given.public_key] >= filled.time.now + DAY


def test_a_pair_is_handed_out_for_a_token_that_expires_in_its_own_last_second(filled, backend):
    made = {expiry for *_, expiry in backend.asked}
    filled.time.move(HOUR - SECOND / 10)
    assert made == {filled.time.now.replace(microsecond=0) + DAY}
    assert filled.take(backend).public_key == b"public 0"
    assert (filled.fact().hits, filled.fact().discarded) == (1, 0)


@pytest.mark.parametrize("age", [HOUR, HOUR + SECOND])
def test_aged_pairs_are_discarded_and_replaced(filled, backend, age):
    filled.time.move(age)
    filled.work()
    assert backend.alive == {b"4", b"5", b"6", b"7"}
    assert (filled.fact().discarded, filled.fact().level) == (4, 4)


def test_an_aged_pair_is_not_handed_out_before_the_thread_notices(filled, backend):
    filled.time.move(HOUR)
    assert filled.take(backend).public_key == b"public 4"
    assert filled.fact().hits == 0


def test_sealed_pairs_are_just_dropped(pool):
    backend = FakeBackend(custody=Custody.HSM_ENCRYPTED_DATABASE)
    pool.prepare(backend, [OAEP])
    pool.work()
    pool.time.move(HOUR)
    pool.work()
    pool.close()
    assert (pool.fact().discarded, backend.discards) == (8, 0)


def test_a_call_that_no_pooled_pair_outlives_is_served_inline_and_drains_nothing(filled, backend):
    wanted = filled.time.now.replace(microsecond=0) + 2 * DAY
    filled.take(backend, lasts=2 * DAY)
    assert backend.asked[-1] == (*OAEP, wanted)
    assert filled.fact().level == 4


def test_a_thread_sleeps_until_the_next_pair_ages(filled):
    stock = next(iter(filled._stocks.values()))
    filled.time.move(HOUR - 10 * SECOND)
    assert stock.pause(filled.time.now, filled.time.tick) == 10


# --- the arithmetic of a stock, without a pool


@pytest.fixture
def stock(backend):
    return Stock(backend, *OAEP, SMALL)


def made_before(age, backend):
    key = backend.generate_wrapping_key(*OAEP, expires_at=NOW + DAY)
    return ReadyPair(key, NOW - age, NOW + DAY)


def test_a_new_stock_counts_from_zero_and_wants_to_be_filled(stock, backend):
    facts = PairFacts("fake", *OAEP, 0, 0, 0, 0, 0, 0, stopped=False)
    assert (stock.facts(), stock.emptied().facts()) == (facts, facts)
    assert (stock.level, stock.failures, stock.resume_at) == (0, 0, 0)
    assert stock.wants_refill


@pytest.mark.parametrize(("making", "wants"), [(3, True), (4, False), (5, False)])
def test_a_refill_makes_no_more_than_high_water(stock, making, wants):
    stock.making = making
    assert stock.wants_refill == wants


@pytest.mark.parametrize("there", [3, 4])
def test_a_refill_ends_at_high_water_or_above(stock, backend, there):
    stock.ready.extend(made_before(SECOND, backend) for _ in range(there))
    stock.put(made_before(SECOND, backend))
    assert not stock.refilling


def test_the_oldest_pair_is_the_first_to_age(stock, backend):
    old, new = (made_before(HOUR - left * SECOND, backend) for left in (10, 20))
    stock.ready.extend([old, new])
    stock.refilling = False
    assert stock.pause(NOW, 0) == 10
    stock.drop_aged(NOW + 10 * SECOND)
    assert list(stock.ready) == [new]


def test_a_thread_sleeps_at_most_a_minute_and_not_at_all_when_there_is_work(stock, backend):
    assert stock.pause(NOW, 5.0) == 0
    stock.refilling = False
    assert stock.pause(NOW, 5.0) == LONGEST_PAUSE == 60
    stock.ready.append(made_before(2 * HOUR, backend))
    assert stock.pause(NOW, 5.0) == 0


@pytest.mark.parametrize("work", ["refill", "discard"])
def test_any_work_waits_for_the_backoff(stock, work):
    stock.refilling = work == "refill"
    stock.discards.extend([None] if work == "discard" else [])
    assert stock.failed(5.0) == 1
    assert stock.pause(NOW, 5.25) == 0.75


def test_a_success_takes_all_of_the_backoff_back(stock):
    assert [stock.failed(0.0) for _ in range(3)] == [1, 2, 4]
    stock.succeeded()
    assert (stock.resume_at, stock.failed(7.0), stock.resume_at) == (0, 1, 8)


# --- errors


def test_errors_back_off_exponentially_up_to_a_cap(pool, backend):
    pool.prepare(backend, [OAEP])
    backend.fail = HsmUnavailable("unavailable")
    for pause in (1, 2, 4, 8, 8):
        assert pool.work() == 1
        pool.time.move((pause - 0.5) * SECOND)
        assert pool.work() == 0
        pool.time.move(0.5 * SECOND)
    assert pool.fact().errors == 5
    backend.fail = None
    assert pool.work() == 4
    backend.fail = HsmUnavailable("unavailable again")
    for _ in range(4):
        pool.take(backend)
    pool.work()
    pool.time.move(SECOND)
    assert pool.work() == 1


def test_a_thread_sleeps_until_the_backoff_is_over(pool, backend):
    pool.prepare(backend, [OAEP])
    backend.fail = HsmUnavailable("unavailable")
    pool.work()
    stock = next(iter(pool._stocks.values()))
    assert stock.pause(pool.time.now, pool.time.tick) == 1


def test_a_weekend_of_errors_does_not_overflow(pool, backend):
    pool.prepare(backend, [OAEP])
    stock = next(iter(pool._stocks.values()))
    stock.failures = 10_000
    assert stock.failed(0.0) == 8


def test_a_caller_who_succeeds_ends_the_backoff(pool, backend):
    pool.prepare(backend, [OAEP])
    backend.fail = HsmUnavailable("unavailable")
    pool.work()
    backend.fail = None
    assert pool.work() == 0
    pool.take(backend)
    assert pool.work() == 4


@pytest.mark.parametrize(
    "error",
    [HsmUnavailable("x"), PoolTimeout("x"), HsmError("x"), ConfigurationError("x"), KeyError],
)
def test_an_error_that_may_pass_stops_nothing(pool, backend, error):
    pool.prepare(backend, [OAEP])
    backend.fail = error
    pool.work()
    backend.fail = None
    pool.time.move(SECOND)
    pool.work()
    assert (pool.fact().level, pool.fact().stopped, pool.fact().errors) == (4, False, 1)


@pytest.mark.parametrize("error", [PinError("wrong"), BackendClosed("closed")])
def test_an_error_that_does_not_pass_stops_every_kind_of_that_backend(pool, backend, error):
    other = FakeBackend("other")
    pool.prepare(backend, [OAEP, SM2])
    backend.fail = error
    pool.work()
    pool.prepare(backend, [PKCS1])
    pool.prepare(other, [PKCS1])
    pool.time.move(HOUR)
    pool.work()
    assert len(backend.asked) == 1
    assert {f.stopped for f in pool.facts() if f.backend == "fake"} == {True}
    assert len(other.asked) == 4


def test_a_refused_login_is_not_tried_again_to_discard(filled, backend):
    backend.fail = PinError("wrong")
    filled.time.move(HOUR)
    filled.work()
    filled.close()
    assert backend.discards == 1


def test_a_kind_that_is_not_served_stops_alone(pool, backend):
    pool.prepare(backend, [SM2, OAEP])
    backend.fail = UnsupportedOperation("no SM2 here")
    pool._pick(pool.time.now, pool.time.tick)()
    backend.fail = None
    pool.time.move(HOUR)
    pool.work()
    assert pool.fact(SM2).stopped
    assert (pool.fact().level, pool.fact().stopped) == (4, False)


def test_a_caller_gets_the_error_of_its_own_call(pool, backend):
    backend.fail = PinError("wrong")
    with pytest.raises(PinError):
        pool.take(backend)


def test_while_the_hsm_is_away_no_pair_is_wasted(filled, backend):
    backend.ready = False
    backend.fail = HsmUnavailable("unavailable")
    with pytest.raises(HsmUnavailable):
        filled.take(backend)
    assert filled.fact().level == 4


def test_a_discard_that_fails_for_now_is_tried_again(filled, backend):
    backend.fail = HsmUnavailable("unavailable")
    filled.time.move(HOUR)
    assert filled.work() == 1
    backend.fail = None
    assert filled.work() == 0
    filled.time.move(SECOND)
    filled.work()
    assert backend.alive == {b"4", b"5", b"6", b"7"}


def test_a_discard_that_fails_for_good_is_left_to_the_reaper(filled, backend):
    filled.time.move(HOUR)
    backend.fail = HsmError("no")
    filled._pick(filled.time.now, filled.time.tick)()
    backend.fail = None
    filled.time.move(SECOND)
    filled.work()
    assert backend.alive == {b"0", b"4", b"5", b"6", b"7"}


def test_logs_name_the_error_and_never_its_text(pool, backend, caplog):
    pool.prepare(backend, [OAEP])
    backend.fail = HsmError("0123456789abcdef")
    pool.work()
    (record,) = caplog.records
    assert (record.error, record.backend, record.algorithm) == ("HsmError", "fake", OAEP[1])
    assert "0123456789abcdef" not in str(vars(record))


# --- closing


def test_close_leaves_nothing_behind(filled, backend):
    given = filled.take(backend)
    filled.close()
    assert backend.alive == {number(given)}
    filled.close()
    assert (backend.discards, filled.fact().discarded) == (3, 3)


def test_a_closed_pool_generates_inline(filled, backend):
    filled.close()
    filled.prepare(backend, [SM2])
    assert filled.take(backend).public_key == b"public 4"
    assert filled.work() == 0


@pytest.mark.parametrize("error", [HsmUnavailable("x"), BackendClosed("x"), PinError("x")])
def test_close_without_the_hsm_tries_once_and_says_what_is_left(filled, backend, error, caplog):
    backend.fail = error
    filled.close()
    assert backend.discards == 1
    assert caplog.records[-1].left_for_the_reaper == 4
    assert caplog.records[-1].levelno == logging.WARNING


def test_closing_again_when_the_hsm_is_back_discards_the_rest(filled, backend):
    backend.fail = HsmUnavailable("unavailable")
    filled.close()
    backend.fail = None
    filled.close()
    assert not backend.alive


def test_close_waits_for_the_pair_being_made_and_discards_it(backend):
    backend.permits = threading.Semaphore(0)
    pool = KeyPool(SMALL)
    closed = threading.Event()

    def close():
        pool.close()
        closed.set()

    pool.prepare(backend, [OAEP])
    assert backend.entered.wait(60)
    with ThreadPoolExecutor(1) as other:
        other.submit(close)
        wait_for(pool, lambda p: p._closed)
        assert not closed.is_set()
        backend.permits.release(100)
    assert closed.is_set()
    assert len(backend.asked) == 1
    assert not backend.alive
    assert pool.facts()[0].discarded == 1


def test_an_exit_without_close_closes(backend):
    pool = KeyPool(SMALL)
    pool.prepare(backend, [OAEP])
    wait_for(pool, lambda p: p.facts()[0].level == 4)
    pool_module._close_at_exit()
    assert not backend.alive
    assert not any(thread.is_alive() for thread in pool._threads)


# --- threads


def test_no_two_callers_get_the_same_pair_and_every_pair_is_accounted_for():
    backend = FakeBackend()
    with KeyPool(PoolSettings(high_water=8, low_water=4, threads=3)) as pool:

        def take(_):
            return number(pool(backend, *OAEP, datetime.now(UTC)))

        pool.prepare(backend, [OAEP])
        wait_for(pool, lambda p: p.facts()[0].level == 8)
        with ThreadPoolExecutor(8) as callers:
            given = list(callers.map(take, range(2000)))
    (facts,) = pool.facts()
    assert len(set(given)) == 2000
    assert facts.hits + facts.misses == 2000
    assert facts.hits >= 8
    assert facts.generated == facts.hits + facts.discarded
    assert backend.alive == set(given)


def test_threads_survive_errors_and_make_pairs_again():
    backend = FakeBackend()
    with KeyPool(PoolSettings(high_water=2, low_water=1, initial_backoff=0.001)) as pool:
        backend.fail = KeyError("a bug in a plug-in")
        pool.prepare(backend, [OAEP])
        wait_for(pool, lambda p: p.facts()[0].errors >= 3)
        backend.fail = None
        wait_for(pool, lambda p: p.facts()[0].level == 2)


def test_without_threads_pairs_are_made_inline(backend, monkeypatch):
    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    pool = KeyPool(SMALL)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert pool(backend, *OAEP, NOW).public_key == b"public 0"
    monkeypatch.undo()
    pool(backend, *OAEP, NOW)
    wait_for(pool, lambda p: p.facts()[0].level == 4)
    pool.close()


@pytest.mark.skipif(sys.platform != "linux", reason="a niceness of a thread is Linux's")
def test_callers_go_first_on_a_processor(backend, monkeypatch):
    generate = backend.generate_wrapping_key
    seen = {}

    def noted(*args, **named):
        thread = threading.get_native_id()
        in_pool = threading.current_thread().name == "hsmwrap-keypool"
        seen.setdefault(in_pool, os.getpriority(os.PRIO_PROCESS, thread))
        return generate(*args, **named)

    monkeypatch.setattr(backend, "generate_wrapping_key", noted)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with KeyPool(SMALL) as pool:
        pool(backend, *OAEP, NOW)
        wait_for(pool, lambda p: p.facts()[0].level == 4)
    assert seen == {False: before, True: min(before + pool_module.NICENESS, 19)}
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


@pytest.mark.skipif(sys.platform != "linux", reason="a niceness of a thread is Linux's")
def test_a_sandbox_that_forbids_the_niceness_costs_no_pair(backend, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "setpriority", refuse)
    with KeyPool(SMALL) as pool:
        pool.prepare(backend, [OAEP])
        wait_for(pool, lambda p: p.facts()[0].level == 4)


def test_threads_wait_for_the_first_call(backend):
    with KeyPool(SMALL) as pool:
        assert not pool._threads
        pool(backend, *OAEP, NOW)
        wait_for(pool, lambda p: p.facts()[0].level == 4)


def test_registration_keeps_no_pool_alive():
    gc.collect()
    before = len(pool_module._POOLS)
    KeyPool()
    gc.collect()
    assert len(pool_module._POOLS) == before


def test_repr_shows_levels_and_no_key(filled, backend):
    assert repr(filled) == "<KeyPool open fake/RSAES_OAEP_SHA_256=4>"
    filled.close()
    assert repr(filled) == "<KeyPool closed fake/RSAES_OAEP_SHA_256=0>"
    assert repr(KeyPool()) == "<KeyPool open empty>"


# --- forks


def test_a_child_starts_empty_with_threads_of_its_own_and_discards_nothing_of_the_parents():
    backend = FakeBackend()
    pool = KeyPool(SMALL)
    pool.prepare(backend, [OAEP])
    wait_for(pool, lambda p: p.facts()[0].level == 4)

    def child():
        at_first = pool.facts()[0]
        discards = backend.discards
        pool(backend, *OAEP, NOW)
        wait_for(pool, lambda p: p.facts()[0].level == 4)
        counted = pool.facts()[0]
        pool.close()
        survivors = {b"%d" % i for i in range(4)} & backend.alive
        return (
            at_first.level,
            at_first.generated,
            counted.misses,
            backend.discards - discards,
            len(survivors),
        )

    assert Child(child).result() == (0, 0, 1, 4, 4)
    assert pool.facts()[0].level == 4
    pool.close()
    assert not backend.alive


def test_a_child_of_a_process_that_held_the_lock():
    backend = FakeBackend()
    pool = ManualPool(SMALL)
    held, let_go = threading.Event(), threading.Event()

    def hold():
        with pool._changed:
            held.set()
            let_go.wait(60)

    with ThreadPoolExecutor(1) as other:
        other.submit(hold)
        assert held.wait(60)
        assert Child(lambda: pool.take(backend).public_key).result() == b"public 0"
        let_go.set()


def test_a_refused_login_stays_refused_in_the_child(pool, backend):
    pool.prepare(backend, [OAEP])
    backend.fail = PinError("wrong")
    pool.work()

    def child():
        pool.prepare(backend, [SM2])
        pool.time.move(HOUR)
        return pool.work()

    assert Child(child).result() == 0
