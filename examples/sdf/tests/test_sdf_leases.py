"""One pair has one import token at a time: across threads, processes, restarts and hours."""

import multiprocessing
import os
import secrets
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest

from hsmwrap.errors import (
    HsmError,
    HsmUnavailable,
    InvalidImportToken,
    InvalidKeyMaterial,
    TooManyWrappingKeys,
)
from hsmwrap_sdf import leases as module
from hsmwrap_sdf.binding import Point
from hsmwrap_sdf.leases import GRACE, Lease, Leases

POOL = tuple(range(10, 30))
HOUR = timedelta(hours=1)


class Pairs:
    """What the device says of the public keys under its indexes."""

    def __init__(self):
        self.keys = {pair: self.fresh() for pair in POOL}

    @staticmethod
    def fresh():
        return Point(secrets.token_bytes(32), secrets.token_bytes(32))

    def __call__(self, pair):
        return self.keys[pair]


@pytest.fixture
def pairs():
    return Pairs()


@pytest.fixture
def open_leases(tmp_path):
    return lambda pool=POOL, reuse=True: Leases(tmp_path / "leases", pool, reuse=reuse)


@pytest.fixture(params=[True, False], ids=["reuse", "once"])
def reuse(request):
    return request.param


def now():
    return datetime.now(UTC)


def drain(leases, pairs, expires_at=None):
    """Lease until the pool is exhausted."""
    taken = []
    while True:
        try:
            taken.append(leases.take(expires_at or now() + HOUR, pairs)[0])
        except TooManyWrappingKeys as refused:
            return taken, str(refused)


def test_threads_get_a_pair_each(open_leases, pairs, reuse, monkeypatch):
    choose = Leases._free_pair

    def slowly(*arguments):
        chosen = choose(*arguments)
        time.sleep(0.001)  # time for another to choose the same, if nothing keeps it from that
        return chosen

    monkeypatch.setattr(Leases, "_free_pair", slowly)
    leases, barrier = open_leases(reuse=reuse), threading.Barrier(4)

    def some():
        barrier.wait()
        return [leases.take(now() + HOUR, pairs)[0].pair for _ in range(len(POOL) // 4)]

    with ThreadPoolExecutor(4) as threads:
        taken = [
            pair for each in [threads.submit(some) for _ in range(4)] for pair in each.result()
        ]
    assert sorted(taken) == list(POOL)
    assert drain(leases, pairs)[0] == []


def _take_some(open_leases, pairs, barrier, to):
    leases = open_leases()
    barrier.wait()
    to.send([leases.take(now() + HOUR, pairs)[0].pair for _ in range(len(POOL) // 2)])


def test_processes_get_a_pair_each(open_leases, pairs):
    context = multiprocessing.get_context("fork")
    barrier, ends = context.Barrier(2), [context.Pipe(duplex=False) for _ in range(2)]
    children = [
        context.Process(target=_take_some, args=(open_leases, pairs, barrier, theirs))
        for _, theirs in ends
    ]
    for child in children:
        child.start()
    assert sorted(pair for ours, _ in ends for pair in ours.recv()) == list(POOL)
    for child in children:
        child.join()


def _die_while_taking(open_leases):
    open_leases().take(now() + HOUR, lambda pair: os.kill(os.getpid(), signal.SIGKILL))


def test_a_pair_that_a_killed_process_took_is_not_given_out(open_leases, pairs):
    child = multiprocessing.get_context("fork").Process(
        target=_die_while_taking, args=(open_leases,)
    )
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    leases = open_leases()
    assert leases.counts().leased == 1
    assert [lease.pair for lease in drain(leases, pairs)[0]] == list(POOL[1:])


def test_a_restart_forgets_no_lease(open_leases, pairs, reuse):
    taken, _ = drain(open_leases(reuse=reuse), pairs)
    again = open_leases(reuse=reuse)
    assert drain(again, pairs)[0] == []
    for lease in taken:
        again.require(lease, pairs)


def test_exhaustion_says_what_to_do(open_leases, pairs, reuse):
    leases = open_leases(reuse=reuse)
    taken, text = drain(leases, pairs, now() + HOUR)
    assert "all 20 key pairs of the pool are taken: 20 are leased (the next lease ends at " in text
    assert "add indexes to `pool`" in text
    assert "management tool" not in text
    assert TooManyWrappingKeys.http_status == 429
    leases.end(taken[0])
    _, text = drain(leases, pairs)
    if not reuse:
        assert "19 are leased" in text
        assert "1 are used up: make new pairs under these indexes with the device's" in text


def test_a_lease_ends_a_grace_after_its_expiry(open_leases, pairs, reuse):
    leases = open_leases(reuse=reuse)
    within, after = now() - GRACE + HOUR / 60, now() - GRACE
    (lease, *_), _ = drain(leases, pairs, within)
    leases.require(lease, pairs)
    over = open_leases(pool=(40,), reuse=reuse)
    pairs.keys[40] = pairs.fresh()
    old = over.take(after, pairs)[0]
    with pytest.raises(InvalidImportToken, match="is over"):
        over.require(old, pairs)
    if reuse:
        assert over.take(now() + HOUR, pairs)[0].pair == 40
    else:
        assert drain(over, pairs)[0] == []


def test_expired_leases_are_reaped(open_leases, pairs):
    leases = open_leases()
    taken = [leases.take(now() + hours * HOUR, pairs)[0] for hours in (1, 2, 3)]
    assert leases.end_expired(now() + 2 * HOUR + GRACE + HOUR / 60) == (3, taken[:2])
    assert leases.end_expired(now() + 2 * HOUR + GRACE + HOUR / 60) == (1, [])
    leases.require(taken[2], pairs)
    for lease in taken[:2]:
        with pytest.raises(InvalidImportToken):
            leases.require(lease, pairs)


def test_a_lease_that_was_given_back_is_over(open_leases, pairs, reuse):
    leases = open_leases(pool=POOL[:1], reuse=reuse)
    lease = leases.take(now() + HOUR, pairs)[0]
    for _ in range(2):
        leases.end(lease)
    with pytest.raises(InvalidImportToken):
        leases.require(lease, pairs)
    assert len(drain(leases, pairs)[0]) == reuse


def test_an_earlier_lease_of_the_same_pair_is_refused(open_leases, pairs):
    leases = open_leases(pool=POOL[:1])
    earlier = leases.take(now() + HOUR, pairs)[0]
    leases.end(earlier)
    present = leases.take(now() + HOUR, pairs)[0]
    assert present.pair == earlier.pair
    with pytest.raises(InvalidImportToken):
        leases.require(earlier, pairs)
    leases.end(earlier)  # ends nothing
    leases.require(present, pairs)


def test_a_ciphertext_of_an_earlier_lease_is_refused(open_leases, pairs):
    leases = open_leases(pool=POOL[:1])
    earlier = leases.take(now() + HOUR, pairs)[0]
    for _ in range(2):
        leases.require_first(earlier, b"seen")
    leases.end(earlier)
    present = leases.take(now() + HOUR, pairs)[0]
    leases.require_first(present, b"another")
    for _ in range(2):
        with pytest.raises(InvalidKeyMaterial):
            leases.require_first(present, b"seen")


def test_the_pair_whose_lease_is_over_longest_serves_first(open_leases, pairs):
    leases = open_leases(pool=POOL[:3])
    taken = [leases.take(now() + hours * HOUR, pairs)[0] for hours in (3, 1, 2)]
    for lease in taken:
        leases.end(lease)
    again = [leases.take(now() + HOUR, pairs)[0].pair for _ in taken]
    assert again == [taken[at].pair for at in (1, 2, 0)]


# --- pairs that are made anew


def test_an_index_that_is_used_up_serves_again_with_a_new_pair(open_leases, pairs, monkeypatch):
    leases = open_leases(reuse=False)
    taken, _ = drain(leases, pairs)
    for lease in taken[:3]:
        leases.end(lease)
    pairs.keys[taken[1].pair] = pairs.fresh()
    assert drain(leases, pairs)[0] == [], "the device was asked a moment ago"
    monkeypatch.setattr(module, "LOOK_AGAIN", 0.0)
    (lease,), text = drain(leases, pairs)
    assert lease.pair == taken[1].pair
    assert "2 are used up" in text


def test_a_pair_that_was_replaced_while_it_was_leased_is_refused(open_leases, pairs):
    leases = open_leases()
    lease = leases.take(now() + HOUR, pairs)[0]
    leases.require(lease, pairs)
    pairs.keys[lease.pair] = pairs.fresh()
    with pytest.raises(InvalidImportToken, match="another pair under index 10"):
        leases.require(lease, pairs)


def test_the_same_pair_under_two_indexes_is_leased_once(open_leases, pairs):
    pairs.keys[11] = pairs.keys[10]
    leases = open_leases(pool=(10, 11))
    assert leases.take(now() + HOUR, pairs)[0].pair == 10
    with pytest.raises(HsmError, match="index 11 is also under another index"):
        leases.take(now() + HOUR, pairs)


def test_a_device_that_fails_keeps_no_pair_leased(open_leases, pairs):
    leases = open_leases()

    def fails(pair):
        raise HsmUnavailable("lost")

    with pytest.raises(HsmUnavailable):
        leases.take(now() + HOUR, fails)
    assert leases.counts().leased == 0
    assert len(drain(leases, pairs)[0]) == len(POOL)


def test_what_left_the_pool_is_not_used(open_leases, pairs):
    lease = open_leases().take(now() + HOUR, pairs)[0]
    smaller = open_leases(pool=POOL[1:])
    with pytest.raises(InvalidImportToken):
        smaller.require(lease, pairs)
    assert smaller.counts().leased == 0
    assert lease.pair not in {each.pair for each in drain(smaller, pairs)[0]}


def test_a_number_that_was_never_given_is_refused(open_leases, pairs):
    leases = open_leases()
    lease = leases.take(now() + HOUR, pairs)[0]
    for wrong in (Lease(lease.pair, bytes(16)), Lease(lease.pair + 1, lease.number)):
        with pytest.raises(InvalidImportToken):
            leases.require(wrong, pairs)
