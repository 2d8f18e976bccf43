"""An import token survives a bounded number of failed imports: no attack gets more answers."""

import secrets
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pytest
from support.importing import AES, MATERIAL, OAEP1, SM2PKE, Clock, wrap

from hsmwrap.errors import (
    ConfigurationError,
    HsmUnavailable,
    InvalidImportToken,
    InvalidKeyMaterial,
)
from hsmwrap.imports import MARK_MARGIN, MAX_FAILED_IMPORTS, MemoryFailedImports

BAD = bytes(256)


def fail(desk, parameters, times, service):
    for _ in range(times):
        with pytest.raises(InvalidKeyMaterial):
            desk.bring_in(parameters, BAD, service=service)


def refuse(desk, parameters, ciphertext, service):
    with pytest.raises(InvalidImportToken, match="call GetParametersForImport again"):
        desk.bring_in(parameters, ciphertext, service=service)


@pytest.mark.parametrize("algorithm", [OAEP1, SM2PKE])
def test_a_token_takes_no_import_after_too_many_failed_ones(any_desk, algorithm):
    service = any_desk.service(max_failed_imports=3)
    parameters, other = (any_desk.issue(algorithm, service=service) for _ in range(2))
    good = wrap(parameters, MATERIAL[AES])
    fail(any_desk, parameters, 3, service)
    refuse(any_desk, parameters, good, service)
    refuse(any_desk, parameters, BAD, service)
    any_desk.bring_in(other, wrap(other, MATERIAL[AES]), service=service)


def test_one_less_is_survived_and_success_does_not_count(any_desk):
    service = any_desk.service(max_failed_imports=3)
    parameters = any_desk.issue(OAEP1, service=service)
    good = wrap(parameters, MATERIAL[AES])
    for _ in range(4):
        any_desk.bring_in(parameters, good, service=service)
    fail(any_desk, parameters, 2, service)
    any_desk.bring_in(parameters, good, service=service)
    fail(any_desk, parameters, 1, service)
    refuse(any_desk, parameters, good, service)


def test_other_material_on_a_re_import_counts(spied):
    service = spied.service(max_failed_imports=2)
    first = spied.issue(OAEP1, service=service)
    known = spied.bring_in(first, wrap(first, MATERIAL[AES]), service=service).imported.check_value
    parameters = spied.issue(OAEP1, service=service)
    again, other = spied.cmk(check_value=known), wrap(parameters, secrets.token_bytes(32))
    for _ in range(2):
        with pytest.raises(InvalidKeyMaterial):
            spied.bring_in(parameters, other, again, service=service)
    refuse(spied, parameters, wrap(parameters, MATERIAL[AES]), service)


def test_twenty_by_default(spied):
    parameters = spied.issue(OAEP1)
    service = spied.service()
    fail(spied, parameters, MAX_FAILED_IMPORTS, service)
    assert MAX_FAILED_IMPORTS == 20
    refuse(spied, parameters, wrap(parameters, MATERIAL[AES]), service)


def test_an_hsm_s_fault_does_not_count(spied):
    service = spied.service(max_failed_imports=1)
    parameters = spied.issue(OAEP1, service=service)
    spied.backend.failing["unwrap_material"] = HsmUnavailable("gone")
    for _ in range(3):
        with pytest.raises(HsmUnavailable):
            spied.bring_in(parameters, BAD, service=service)
    del spied.backend.failing["unwrap_material"]
    spied.bring_in(parameters, wrap(parameters, MATERIAL[AES]), service=service)


def test_services_that_share_a_store_share_the_bound(spied):
    store = MemoryFailedImports(spied.clock)
    one, two = (spied.service(failed_imports=store, max_failed_imports=2) for _ in range(2))
    parameters = spied.issue(OAEP1, service=one)
    for service in (one, two):
        fail(spied, parameters, 1, service)
    refuse(spied, parameters, BAD, one)
    refuse(spied, parameters, BAD, two)


def test_nothing_is_unwrapped_under_a_token_that_is_refused(spied):
    service = spied.service(max_failed_imports=1)
    parameters = spied.issue(OAEP1, service=service)
    fail(spied, parameters, 1, service)
    spied.backend.calls.clear()
    refuse(spied, parameters, BAD, service)
    assert "unwrap_material" not in spied.backend.calls


def test_the_operator_is_told_once(spied, caplog):
    service = spied.service(max_failed_imports=3)
    parameters = spied.issue(OAEP1, service=service)
    fail(spied, parameters, 3, service)
    refuse(spied, parameters, BAD, service)
    told = [record for record in caplog.records if "too many failed imports" in record.message]
    assert [(record.levelname, len(record.token_id)) for record in told] == [("WARNING", 32)]


@pytest.mark.parametrize("bound", [0, -1])
def test_a_bound_that_would_refuse_everything_is_a_wrong_setting(spied, bound):
    with pytest.raises(ConfigurationError, match="1 or more"):
        spied.service(max_failed_imports=bound)


def test_a_count_above_the_bound_refuses_too(spied):
    """Imports that ran at the same time, or a service with a higher bound on the same store."""
    store = MemoryFailedImports(spied.clock)
    service = spied.service(failed_imports=store, max_failed_imports=2)
    parameters = spied.issue(OAEP1, service=service)
    fail(spied, parameters, 3, spied.service(failed_imports=store, max_failed_imports=9))
    refuse(spied, parameters, wrap(parameters, MATERIAL[AES]), service)


@pytest.mark.parametrize("late", [timedelta(0), timedelta(seconds=1)])
def test_counts_are_forgotten_after_their_token_and_not_before(late):
    assert timedelta(hours=1) == MARK_MARGIN
    clock = Clock()
    store = MemoryFailedImports(clock)
    token, later = bytes(16), bytes([1] * 16)
    expires = clock.now + timedelta(hours=1)
    assert [store.record(token, expires) for _ in range(3)] == [1, 2, 3]
    clock.now = expires + MARK_MARGIN - timedelta(seconds=1)
    store.record(later, expires + timedelta(days=1))
    assert store.count(token) == 3
    clock.now = expires + MARK_MARGIN + late
    store.record(later, expires + timedelta(days=1))
    assert (store.count(token), store.count(later)) == (0, 2)


def test_threads_do_not_lose_a_count():
    store = MemoryFailedImports()
    expires = datetime.now(UTC) + timedelta(hours=1)
    with ThreadPoolExecutor(8) as threads:
        counted = list(threads.map(lambda _: store.record(bytes(16), expires), range(200)))
    assert sorted(counted) == list(range(1, 201))
