"""Outstanding resident wrapping keys are bounded, for each CMK and for all."""

from datetime import timedelta

import pytest
from support.backends.scripted import Scripted
from support.importing import OAEP1, SM2PKE, Clock, Desk

from hsmwrap.backend import Custody
from hsmwrap.errors import ConfigurationError, HsmUnavailable, TooManyWrappingKeys
from hsmwrap.imports import (
    MAX_RESIDENT_KEYS,
    MAX_RESIDENT_KEYS_OF_CMK,
    MemoryResidentKeys,
    ResidentBounds,
)


def issue(desk, service, *names):
    return [desk.issue(SM2PKE, desk.cmk(name), service) for name in names]


def refuse(desk, service, name, whose):
    desk.backend.calls.clear()
    with pytest.raises(TooManyWrappingKeys, match=f"^{whose}.*expires$") as refused:
        desk.issue(SM2PKE, desk.cmk(name), service)
    assert (refused.value.code, refused.value.http_status) == ("Throttling.WrappingKeys", 429)
    assert "generate_wrapping_key" not in desk.backend.calls


def test_a_cmk_has_a_bounded_number(spied):
    service = spied.service(resident_bounds=ResidentBounds(of_cmk=2, in_all=9))
    issue(spied, service, "one", "one", "two")
    refuse(spied, service, "one", "this CMK has 2 ")
    issue(spied, service, "two")


def test_all_cmks_together_have_a_bounded_number(spied):
    service = spied.service(resident_bounds=ResidentBounds(of_cmk=9, in_all=3))
    issue(spied, service, "one", "two", "three")
    refuse(spied, service, "four", "all CMKs together have 3 ")


def test_expired_ones_do_not_count(spied):
    bounds = ResidentBounds(of_cmk=1, in_all=1)
    service = spied.service(resident_bounds=bounds, token_lifetime=timedelta(hours=1))
    issue(spied, service, "one")
    spied.clock.advance(minutes=59)
    refuse(spied, service, "one", "this CMK")
    spied.clock.advance(minutes=1)
    issue(spied, service, "one")
    spied.clock.advance(minutes=61)
    issue(spied, service, "one")


def test_a_key_that_was_not_made_does_not_count(spied):
    service = spied.service(resident_bounds=ResidentBounds(of_cmk=1, in_all=1))
    for call in ("generate_wrapping_key", "mac"):
        spied.backend.failing[call] = HsmUnavailable("gone")
        with pytest.raises(HsmUnavailable):
            issue(spied, service, "one")
        del spied.backend.failing[call]
    issue(spied, service, "one")


def test_sealed_ones_do_not_count():
    desk = Desk(Scripted(wrapping_custody=Custody.HSM_ENCRYPTED_DATABASE))
    service = desk.service(resident_bounds=ResidentBounds(of_cmk=1, in_all=1))
    for algorithm in (SM2PKE, SM2PKE, OAEP1):
        desk.issue(algorithm, service=service)


def test_services_that_share_a_store_share_the_bound(spied):
    store, bounds = MemoryResidentKeys(spied.clock), ResidentBounds(of_cmk=2)
    one, two = (spied.service(resident_keys=store, resident_bounds=bounds) for _ in range(2))
    for service in (one, two):
        issue(spied, service, "one")
    refuse(spied, one, "one", "this CMK")
    refuse(spied, two, "one", "this CMK")


def test_a_hundred_and_ten_thousand_by_default():
    assert (MAX_RESIDENT_KEYS_OF_CMK, MAX_RESIDENT_KEYS) == (100, 10_000)
    assert ResidentBounds() == ResidentBounds(MAX_RESIDENT_KEYS_OF_CMK, MAX_RESIDENT_KEYS)


@pytest.mark.parametrize("bounds", [{"of_cmk": 0}, {"in_all": 0}])
def test_a_bound_that_would_refuse_everything_is_a_wrong_setting(bounds):
    with pytest.raises(ConfigurationError, match="1 or more"):
        ResidentBounds(**bounds)


def test_a_released_claim_makes_room():
    clock = Clock()
    store, bounds = MemoryResidentKeys(clock), ResidentBounds(1, 1)
    claim = store.claim("one", clock.now + timedelta(hours=1), bounds)
    with pytest.raises(TooManyWrappingKeys):
        store.claim("one", clock.now + timedelta(hours=1), bounds)
    store.release(claim)
    store.claim("one", clock.now + timedelta(hours=1), bounds)


def test_each_claim_counts_until_it_expires_or_is_released():
    clock = Clock()
    store, bounds = MemoryResidentKeys(clock), ResidentBounds(of_cmk=3, in_all=9)
    first, *_ = [
        store.claim("one", clock.now + timedelta(hours=hours), bounds) for hours in (3, 1, 2)
    ]
    store.release(first)
    store.release(first)
    store.claim("one", clock.now + timedelta(hours=4), bounds)
    with pytest.raises(TooManyWrappingKeys):
        store.claim("one", clock.now + timedelta(hours=4), bounds)
    clock.advance(minutes=90)  # over is the one of an hour, which is not the newest
    store.claim("one", clock.now + timedelta(hours=4), bounds)
    with pytest.raises(TooManyWrappingKeys):
        store.claim("one", clock.now + timedelta(hours=4), bounds)
    clock.advance(hours=9)
    store.release(store.claim("two", clock.now + timedelta(hours=1), bounds))
    assert (store._of_cmk, store._claims) == ({}, {})  # nothing grows with what was


def test_more_than_the_bound_are_refused_too(spied):
    store = MemoryResidentKeys(spied.clock)
    wide, narrow = ResidentBounds(of_cmk=9, in_all=9), ResidentBounds(of_cmk=2, in_all=2)
    issue(spied, spied.service(resident_keys=store, resident_bounds=wide), "one", "one", "one")
    service = spied.service(resident_keys=store, resident_bounds=narrow)
    refuse(spied, service, "one", "this CMK has 3 ")
    refuse(spied, service, "two", "all CMKs together have 3 ")
