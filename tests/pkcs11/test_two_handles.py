"""One object under two handles, and two objects under one id.

SoftHSM lists an object twice in the process that made it if another process wrote at that moment
(see hsmwrap.pkcs11.wrapping.material); once in a few hundred objects, so here every search does.
"""

import secrets
from datetime import UTC, datetime, timedelta

import pytest
from pkcs11.exceptions import KeyHandleInvalid
from support.pkcs11.attacker import AES, OAEP1, SM2, bring, issue

from hsmwrap.backend import ReapsWrappingKeys
from hsmwrap.errors import KeyNotFound
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.pkcs11.sessions.session import PooledSession
from hsmwrap.pkcs11.wrapping import reaper

LATER = datetime.now(UTC) + timedelta(days=9)


@pytest.fixture
def backend(softhsm):
    settings = softhsm.settings(f"handles-{secrets.token_hex(4)}", material_custody="HsmInternal")
    with Pkcs11Backend.from_settings(settings) as backend:
        backend.capabilities()
        yield backend
        ReapsWrappingKeys.of(backend).reap(LATER)


@pytest.fixture
def twice(monkeypatch):
    find, search = PooledSession.find, reaper._search

    def search_twice(pooled):
        found, complete = search(pooled)
        return found * 2, complete

    monkeypatch.setattr(PooledSession, "find", lambda *given: find(*given) * 2)
    monkeypatch.setattr(reaper, "_search", search_twice)


@pytest.mark.usefixtures("twice")
@pytest.mark.parametrize("algorithm", [OAEP1, SM2])
def test_a_key_with_two_handles_is_made_used_and_destroyed(backend, attacker, algorithm):
    before = len(attacker.objects())
    wrapping = issue(backend, algorithm)
    key = bring(backend, wrapping, secrets.token_bytes(32), AES).key
    assert backend.decrypt(key, backend.encrypt(key, b"message")) == b"message"
    backend.destroy_key(key)
    backend.discard_wrapping_key(wrapping.private_key)
    assert len(attacker.objects()) == before
    assert backend.health().facts["pending_objects"] == 0
    assert backend.health().facts["recoveries"] == {}


@pytest.mark.usefixtures("twice")
def test_the_reaper_counts_and_removes_it_once(backend):
    issue(backend, SM2)
    assert ReapsWrappingKeys.of(backend).reap(datetime.now(UTC)).examined == 1
    report = ReapsWrappingKeys.of(backend).reap(LATER)
    assert (report.examined, len(report.removed), report.failed) == (1, 1, ())


def test_a_key_that_was_planted_under_the_id_of_another_is_not_used(backend, attacker):
    key = bring(backend, issue(backend, OAEP1), secrets.token_bytes(32), AES).key
    message = backend.encrypt(key, b"message")
    planted, _ = attacker.known_key(TOKEN=True, ID=key.data)
    for use in (backend.encrypt, backend.decrypt):
        with pytest.raises(KeyNotFound, match="more than one"):
            use(key, message)
    planted.destroy()
    assert backend.decrypt(key, message) == b"message"


def test_a_planted_key_that_cannot_encrypt_is_not_in_the_way(backend, attacker):
    key = bring(backend, issue(backend, OAEP1), secrets.token_bytes(32), AES).key
    planted, _ = attacker.known_key(TOKEN=True, ID=key.data, ENCRYPT=False)
    assert backend.decrypt(key, backend.encrypt(key, b"message")) == b"message"
    planted.destroy()


def test_what_is_found_again_was_not_gone(backend, monkeypatch):
    """A handle that was invalid for another reason leaves its object where it was."""
    wrapping = issue(backend, SM2)
    # As in a process that did not issue it, and searches.
    backend.ability(Pkcs11Backend)._connection._connector.connected.pool._handles._known.clear()
    find, calls = PooledSession.find, []

    class Stale:
        def destroy(self):
            raise KeyHandleInvalid

    def stale_first(pooled, template):
        calls.append(template)
        return [Stale()] if len(calls) == 1 else find(pooled, template)

    monkeypatch.setattr(PooledSession, "find", stale_first)
    backend.discard_wrapping_key(wrapping.private_key)
    assert ReapsWrappingKeys.of(backend).reap(datetime.now(UTC)).examined == 0
