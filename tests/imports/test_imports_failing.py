"""Single use, and calls that fail half-way."""

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from importing import AES, MATERIAL, OAEP1, SM2PKE, Clock, wrap

from hsmwrap.catalog import WrappingAlgorithm
from hsmwrap.errors import HsmUnavailable, InvalidImportToken, InvalidKeyMaterial
from hsmwrap.imports import MemoryUsedTokens

# --- single use ---------------------------------------------------------------------------------


def test_single_use(any_desk):
    service = any_desk.service(used_tokens=MemoryUsedTokens(any_desk.clock))
    parameters = any_desk.issue(OAEP1, service=service)
    good = wrap(parameters, MATERIAL[AES])
    for bad in (b"", good[:-1], wrap(parameters, bytes(31))):
        with pytest.raises(InvalidKeyMaterial):
            any_desk.bring_in(parameters, bad, service=service)
    any_desk.bring_in(parameters, good, service=service)
    for ciphertext in (good, b""):
        with pytest.raises(InvalidImportToken, match="used before"):
            any_desk.bring_in(parameters, ciphertext, service=service)
    fresh = any_desk.issue(OAEP1, service=service)
    any_desk.bring_in(fresh, wrap(fresh, MATERIAL[AES]), service=service)


def test_one_of_many_at_once_gets_the_token(any_desk):
    service = any_desk.service(used_tokens=MemoryUsedTokens(any_desk.clock))
    parameters = any_desk.issue(SM2PKE, service=service)
    good = wrap(parameters, MATERIAL[AES])

    def one(_number):
        try:
            any_desk.bring_in(parameters, good, service=service)
        except InvalidImportToken:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(one, range(40))) == 1


def test_two_claims_at_once_do_not_both_succeed():
    class Slow(bytes):
        """Looked up so slowly that everybody else looks meanwhile."""

        def __hash__(self):
            time.sleep(0.001)
            return super().__hash__()

    used, later = MemoryUsedTokens(Clock()), Clock().now + timedelta(hours=1)
    token_id = Slow(b"token id")
    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(lambda _: used.claim(token_id, later), range(8))) == 1


def test_whatever_made_it_fail_gives_the_token_back(spied):
    service = spied.service(used_tokens=MemoryUsedTokens(spied.clock))
    parameters = spied.issue(OAEP1, service=service)
    for failure in (HsmUnavailable("away"), KeyboardInterrupt()):
        spied.backend.failing["unwrap"] = failure
        with pytest.raises(type(failure)):
            spied.bring_in(parameters, b"", service=service)
    spied.backend.failing.clear()
    spied.bring_in(parameters, b"", service=service)


def test_a_store_that_is_empty_and_falsy_is_used_all_the_same(spied):
    class Store(dict):
        def claim(self, token_id, expires_at):
            return False

    parameters = spied.issue(OAEP1)
    with pytest.raises(InvalidImportToken):
        spied.bring_in(parameters, b"", service=spied.service(used_tokens=Store()))


def test_used_tokens_are_forgotten_once_expired():
    clock = Clock()
    used, soon = MemoryUsedTokens(clock), clock.now + timedelta(hours=1)
    assert used.claim(b"a", soon)
    assert not used.claim(b"a", soon)
    used.release(b"a")
    used.release(b"unknown")
    assert used.claim(b"a", soon)
    clock.now = soon
    assert used.claim(b"b", soon + timedelta(hours=1))
    assert list(used._used) == [b"b"]


# --- nothing is left behind ---------------------------------------------------------------------


def test_a_key_is_discarded_when_no_token_can_be_issued_for_it(desk_of, monkeypatch):
    desk = desk_of("resident")
    for algorithm in WrappingAlgorithm:
        before = desk.count()
        assert desk.issue(algorithm)
        assert desk.count() == before + 1
        with monkeypatch.context() as patched:
            patched.setattr(desk.backend, "seal", _away)
            with pytest.raises(HsmUnavailable, match="while sealing"):
                desk.issue(algorithm)
        assert desk.count() == before + 1


def _away(_data):
    raise HsmUnavailable("while sealing")


def test_the_first_error_is_the_one_that_is_told(spied, caplog):
    spied.backend.failing = {
        "seal": HsmUnavailable("while sealing"),
        "discard": HsmUnavailable("while discarding"),
    }
    with pytest.raises(HsmUnavailable, match="while sealing"):
        spied.issue(OAEP1)
    assert spied.backend.calls == ["generate", "seal", "discard"]
    assert [r.getMessage() for r in caplog.records] == ["could not discard a wrapping key"]


def test_keys_of_a_key_source_are_discarded_as_well(spied):
    def source(backend, spec, algorithm, expires_at):
        return backend.generate_wrapping_key(spec, algorithm, expires_at=expires_at)

    spied.backend.failing["seal"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        spied.issue(OAEP1, service=spied.service(key_source=source))
    assert spied.backend.calls[-1] == "discard"
