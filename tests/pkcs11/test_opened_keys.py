"""Sealed keys that sessions keep open: fewer calls, the same answers, and a bound in time."""

from dataclasses import replace

import pytest
from support.importing import AES, MATERIAL, OAEP1, spec_of

from hsmwrap import registry
from hsmwrap.backend import ReapsWrappingKeys
from hsmwrap.ckr import CKR
from hsmwrap.errors import HsmResourceExhausted, InvalidCiphertext, KeyNotFound
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.pkcs11.binding import identity
from hsmwrap.pkcs11.sessions import opened
from hsmwrap.pkcs11.sessions.opened import OPENED_SECONDS
from hsmwrap.testing._conformance.base import tomorrow
from hsmwrap.testing.clients import pyca_encrypt

MOST = 3
USE = {"C_GetAttributeValue": 1, "C_EncryptInit": 1, "C_Encrypt": 1}


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(opened, "time", clock)
    return clock


def open_backend(softhsm, shim, prefix="opened", **more):
    settings = {**softhsm.settings(prefix), "module": str(shim.path), **more}
    return registry.open_backend("pkcs11", settings)


@pytest.fixture
def backend(softhsm, shim, clock):
    with open_backend(softhsm, shim, opened_keys=MOST) as backend:
        # What the probe used, and which would expire otherwise.
        backend.capabilities()
        clock.now += OPENED_SECONDS
        reap(backend)
        yield backend


def import_key(backend, material=MATERIAL[AES]):
    made = backend.generate_wrapping_key(spec_of(OAEP1), OAEP1, expires_at=tomorrow())
    ciphertext = pyca_encrypt(OAEP1, made.public_key, material)
    return backend.unwrap_material(made.private_key, OAEP1, ciphertext, key_spec=AES).key


def reap(backend):
    ReapsWrappingKeys.of(backend).reap(tomorrow())


def calls_of(shim, call):
    before = shim.counters()
    call()
    return shim.counters().calls_since(before)


def kept(backend):
    """The opened keys of the session that is used next."""
    connection = backend.ability(Pkcs11Backend)._connection
    return connection._connector.connected.pool._state.idle[-1].opened._keys


def test_a_key_in_use_is_unwrapped_once(backend, shim):
    key = import_key(backend)
    assert calls_of(shim, lambda: backend.encrypt(key, b"text"))["C_UnwrapKey"] == 1
    assert calls_of(shim, lambda: backend.encrypt(key, b"text")) == USE
    message = backend.encrypt(key, b"text", b"data")
    calls = calls_of(shim, lambda: backend.decrypt(key, message, b"data"))
    assert calls == {"C_GetAttributeValue": 1, "C_DecryptInit": 1, "C_Decrypt": 1}
    assert backend.decrypt(key, message, b"data") == b"text"


def test_without_the_setting_each_use_unwraps_its_key(softhsm, shim):
    with open_backend(softhsm, shim) as backend:
        key = import_key(backend)
        for _ in range(2):
            calls = calls_of(shim, lambda: backend.encrypt(key, b"text"))
            assert calls["C_UnwrapKey"] == calls["C_DestroyObject"] == 1


def test_each_session_keeps_a_bounded_number(backend, shim):
    keys = [import_key(backend, bytes([number]) * 32) for number in range(MOST + 2)]
    before = shim.counters().session_objects
    messages = [backend.encrypt(key, b"text") for key in keys]
    assert shim.counters().session_objects == before + MOST
    assert [backend.decrypt(*each) for each in zip(keys, messages, strict=True)] == (
        [b"text"] * len(keys)
    )
    assert shim.counters().session_objects == before + MOST


def test_after_its_time_a_key_is_unwrapped_anew(backend, shim, clock):
    key = import_key(backend)
    backend.encrypt(key, b"text")
    clock.now += OPENED_SECONDS - 0.001
    assert calls_of(shim, lambda: backend.encrypt(key, b"text")) == USE
    clock.now += 0.001
    before = shim.counters().session_objects
    assert calls_of(shim, lambda: backend.encrypt(key, b"text"))["C_UnwrapKey"] == 1
    assert shim.counters().session_objects == before


def test_what_no_call_uses_any_more_is_closed_by_the_reaper(backend, shim, clock):
    before = shim.counters().session_objects
    backend.encrypt(import_key(backend), b"text")
    reap(backend)
    assert shim.counters().session_objects == before + 1
    clock.now += OPENED_SECONDS
    reap(backend)
    assert shim.counters().session_objects == before


def test_closing_the_backend_leaves_nothing(softhsm, shim):
    before = shim.counters().held
    with open_backend(softhsm, shim, opened_keys=MOST) as backend:
        backend.encrypt(import_key(backend), b"text")
        assert shim.counters().session_objects > before[1]
    assert shim.counters().held == before


def test_a_retired_key_set_ends_within_the_time(softhsm, shim, clock):
    with open_backend(softhsm, shim, "opened-retired", opened_keys=MOST) as backend:
        key = import_key(backend)
        backend.encrypt(key, b"text")
        softhsm.run_keys("rotate", "opened-retired")
        softhsm.run_keys("retire", "opened-retired", "1", "--force")
        backend.encrypt(key, b"text")  # that the key was open is why there has to be a bound
        clock.now += OPENED_SECONDS
        with pytest.raises(KeyNotFound, match="key set 1, which sealed this key, was retired"):
            backend.encrypt(key, b"text")


@pytest.mark.parametrize("shared_functions", [True, False])
def test_a_handle_that_means_another_key_is_not_used(
    softhsm, shim, clock, monkeypatch, shared_functions
):
    """A module may give the handle of an object that is gone to another one."""
    if not shared_functions:  # as with p11-kit's client
        monkeypatch.setattr(identity, "shared_function_list", lambda _module: None)
    with open_backend(softhsm, shim, opened_keys=MOST) as backend:
        one, other = (import_key(backend, bytes([number]) * 32) for number in (1, 2))
        backend.encrypt(one, b"text")
        backend.encrypt(other, b"text")
        keys = kept(backend)
        first, second = keys[AES, one.data], keys[AES, other.data]
        keys[AES, one.data] = replace(first, key=second.key)
        message = backend.encrypt(one, b"text")
    with open_backend(softhsm, shim) as plain:
        assert plain.decrypt(one, message) == b"text"


def test_a_key_that_is_gone_is_unwrapped_anew_without_a_recovery(backend):
    key = import_key(backend)
    backend.encrypt(key, b"text")
    (known,) = kept(backend).values()
    known.key.destroy()
    message = backend.encrypt(key, b"text")
    assert backend.decrypt(key, message) == b"text"
    assert backend.health().facts["recoveries"] == {}


def test_a_bad_ciphertext_does_not_close_the_key(backend, shim):
    key = import_key(backend)
    message = backend.encrypt(key, b"text")
    with pytest.raises(InvalidCiphertext):
        backend.decrypt(key, message[:-1] + bytes([message[-1] ^ 1]))
    assert calls_of(shim, lambda: backend.encrypt(key, b"text")) == USE


def test_open_keys_are_not_why_an_hsm_has_no_memory(backend, softhsm, shim):
    one, other = import_key(backend), import_key(backend, bytes(32))
    backend.encrypt(one, b"text")
    shim.fail("C_UnwrapKey", CKR.DEVICE_MEMORY, nth=1)
    assert backend.decrypt(other, backend.encrypt(other, b"text")) == b"text"
    with open_backend(softhsm, shim) as plain:  # control: otherwise the caller is told so
        plain.encrypt(one, b"text")
        shim.fail("C_UnwrapKey", CKR.DEVICE_MEMORY, nth=1)
        with pytest.raises(HsmResourceExhausted):
            plain.encrypt(one, b"text")
