"""Resident wrapping keys that this process has made or found are used without a search."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import pytest
from support.importing import AES, MATERIAL, OAEP1, SM2PKE, spec_of

from hsmwrap import registry
from hsmwrap.backend import Custody
from hsmwrap.ckr import CKR
from hsmwrap.errors import InvalidImportToken
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.pkcs11.binding import identity
from hsmwrap.pkcs11.sessions import handles
from hsmwrap.testing._conformance.base import tomorrow
from hsmwrap.testing.clients import openssl_encrypt

SEARCH = "C_FindObjectsInit"
EVERYTHING_STAYS = {"wrapping_custody": "HsmInternal", "material_custody": "HsmInternal"}


def open_backend(softhsm, shim, **more):
    settings = {**softhsm.settings("known"), "module": str(shim.path), **more}
    return registry.open_backend("pkcs11", settings)


@pytest.fixture(scope="module")
def opened(softhsm, shim):
    with open_backend(softhsm, shim, **EVERYTHING_STAYS) as backend:
        backend.capabilities()
        yield backend


@pytest.fixture
def backend(opened):
    """With every session's own keys found, which takes searches."""
    opened.mac(b"")
    import_key(opened, issue(opened))
    known_handles(opened)._known.clear()
    return opened


@pytest.fixture(scope="module")
def another(softhsm, shim):
    """Another backend of this process on the same module, as another process would be."""
    with open_backend(softhsm, shim, **EVERYTHING_STAYS) as backend:
        backend.capabilities()
        yield backend


def issue(backend, algorithm=SM2PKE):
    made = backend.generate_wrapping_key(spec_of(algorithm), algorithm, expires_at=tomorrow())
    assert made.private_key.custody is Custody.HSM_INTERNAL
    return made


def import_key(backend, made, material=MATERIAL[AES]):
    ciphertext = openssl_encrypt(made.algorithm, made.public_key, material)
    return backend.unwrap_material(made.private_key, made.algorithm, ciphertext, key_spec=AES).key


def searches(shim, call):
    before = shim.counters()
    call()
    return shim.counters().calls_since(before).get(SEARCH, 0)


def pool_of(backend):
    return backend.ability(Pkcs11Backend)._connection._connector.connected.pool


def known_handles(backend):
    return pool_of(backend)._handles


@pytest.mark.parametrize("algorithm", [SM2PKE, OAEP1])
def test_an_import_of_what_this_process_issued_searches_nothing(backend, shim, algorithm):
    made = issue(backend, algorithm)
    assert searches(shim, lambda: import_key(backend, made)) == 0
    known_handles(backend)._known.clear()
    assert searches(shim, lambda: import_key(backend, made)) == 1  # control
    assert searches(shim, lambda: import_key(backend, made)) == 0


def test_any_session_knows_what_another_one_has_made(backend, shim):
    made = issue(backend)
    pool = pool_of(backend)
    maker = pool._state.idle[-1]
    pool.close_idle()
    import_key(backend, issue(backend))  # the new session finds the key sets
    assert pool._state.idle[-1] is not maker
    assert searches(shim, lambda: import_key(backend, made)) == 0


def test_a_key_of_another_process_is_searched_for_once(backend, another, shim):
    made = issue(another)
    assert [searches(shim, lambda: import_key(backend, made)) for _ in range(2)] == [1, 0]


def test_discarding_searches_nothing_and_leaves_nothing(backend, shim):
    before = shim.counters().held
    made = issue(backend)
    assert searches(shim, lambda: backend.discard_wrapping_key(made.private_key)) == 0
    assert shim.counters().held == before
    with pytest.raises(InvalidImportToken):
        import_key(backend, made)
    backend.discard_wrapping_key(made.private_key)


def test_what_another_process_destroyed_is_gone(backend, another):
    made = issue(backend)
    another.discard_wrapping_key(made.private_key)
    with pytest.raises(InvalidImportToken):
        import_key(backend, made)
    assert backend.health().facts["recoveries"] == {}


@pytest.mark.parametrize("code", [CKR.KEY_HANDLE_INVALID, CKR.OBJECT_HANDLE_INVALID])
def test_a_handle_that_is_refused_is_searched_for(backend, shim, code):
    made = issue(backend)
    shim.fail("C_DeriveKey", code, nth=1)
    before = shim.counters()
    key = import_key(backend, made)
    assert shim.counters().calls_since(before)[SEARCH] > 0
    assert backend.decrypt(key, backend.encrypt(key, b"text")) == b"text"


@pytest.mark.parametrize("code", [CKR.GENERAL_ERROR, CKR.FUNCTION_FAILED])
def test_a_handle_that_does_not_tell_its_id_is_searched_for(backend, shim, code):
    made = issue(backend)
    shim.fail("C_GetAttributeValue", code, nth=1)
    assert searches(shim, lambda: import_key(backend, made)) == 1


def test_a_handle_that_means_another_key_is_not_used(backend):
    """A module may give the handle of an object that is gone to another one."""
    one, other = issue(backend), issue(backend)
    known = known_handles(backend)._known
    first, second = list(known)[-2:]
    known[first], known[second] = known[second], known[first]
    keys = [import_key(backend, one, bytes(32)), import_key(backend, other, bytes([1]) * 32)]
    messages = [backend.encrypt(key, b"text") for key in keys]
    assert [backend.decrypt(*each) for each in zip(keys, messages, strict=True)] == [b"text"] * 2


def test_no_handle_survives_a_restart_of_the_module(softhsm, shim):
    with open_backend(softhsm, shim, **EVERYTHING_STAYS) as backend:
        made = issue(backend)
        before = known_handles(backend)
        shim.fail("C_Sign", CKR.DEVICE_ERROR, nth=1)
        backend.mac(b"")
        assert len(before) > 0
        assert len(known_handles(backend)) == 0
        assert searches(shim, lambda: import_key(backend, made)) > 0


def test_no_handle_reaches_a_child(softhsm, shim):
    with open_backend(softhsm, shim, **EVERYTHING_STAYS) as backend:
        made = issue(backend)
        assert len(known_handles(backend)) > 0
        child = os.fork()
        if not child:
            with suppress(BaseException):
                backend.mac(b"")
                empty = len(known_handles(backend)) == 0
                import_key(backend, made)
                os._exit(0 if empty else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        import_key(backend, made)


def test_an_epoch_ends_all_handles(backend, shim):
    made = issue(backend)
    known = known_handles(backend)
    (handle,) = known._known.values()
    backend.ability(Pkcs11Backend)._connection._connector.epoch.end()
    assert searches(shim, lambda: import_key(backend, made)) > 0
    assert [each.epoch for each in known._known.values()] == [handle.epoch + 1]
    backend.mac(b"")  # the MAC key is looked up anew as well
    assert searches(shim, lambda: import_key(backend, made)) == 0


def test_without_a_shared_function_table_each_is_searched_for(softhsm, shim, monkeypatch):
    monkeypatch.setattr(identity, "shared_function_list", lambda _module: None)  # p11-kit's client
    with open_backend(softhsm, shim, **EVERYTHING_STAYS) as backend:
        made = issue(backend)
        for _ in range(2):
            assert searches(shim, lambda: import_key(backend, made)) >= 1
        backend.discard_wrapping_key(made.private_key)


def test_threads_use_what_others_have_made(backend):
    made = [issue(backend) for _ in range(4)]

    def work(number):
        material = bytes([number]) * 32
        key = import_key(backend, made[number % 4], material)
        return backend.decrypt(key, backend.encrypt(key, material)) == material

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(24)))


def test_the_number_of_handles_is_bounded(monkeypatch):
    class Key:
        handle, key_type = 7, 0

    monkeypatch.setattr(handles, "MOST", 3)
    known = handles.KnownHandles()
    for number in range(5):
        known.keep(bytes([number]), 0, Key)
        known.keep(bytes([2]), 0, Key)
    assert [known.get(bytes([number]), 0) is not None for number in range(5)] == [
        *(False, False, True, True, True)
    ]
    assert known.get(bytes([2]), 1) is None
    known.forget(bytes([2]))
    assert known.get(bytes([2]), 0) is None
    assert replace(known.get(bytes([3]), 0), epoch=1).handle == 7
