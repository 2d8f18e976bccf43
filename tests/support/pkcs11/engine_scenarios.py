"""Scenarios of the engine behind the fault shim, each in a process of its own.

Usage: python -m support.pkcs11.engine_scenarios SCENARIO SHIM_DIRECTORY SETTINGS
"""

import ctypes
import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

from hsmwrap.catalog import KeySpec, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import (
    BackendClosed,
    HsmUnavailable,
    HsmwrapError,
    InvalidKeyMaterial,
    PinError,
)
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.pkcs11.binding.module import Module, _InitializeArgs, shared_function_list
from hsmwrap.pkcs11.keysets import hardening
from hsmwrap.testing.clients import pyca_encrypt
from hsmwrap.testing.faults import CKR
from support.frames import assert_no_secret
from support.pkcs11 import scenarios

AES = KeySpec.ALIYUN_AES_256
OAEP_1 = WrappingAlgorithm.RSAES_OAEP_SHA_1
OAEP_256 = WrappingAlgorithm.RSAES_OAEP_SHA_256
OBJECT_ID = os.urandom(16)
MATERIAL = os.urandom(32)


def outcome(call, *arguments, **more):
    try:
        return call(*arguments, **more)
    except HsmwrapError as error:
        return error


def at_once(threads, call):
    """Call from so many threads at once; what came of it."""
    start = threading.Barrier(threads)

    def work(_):
        start.wait()
        return outcome(call)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, range(threads)))


def wait_for(condition):
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come")


def wrapped(backend, algorithm):
    """A wrapping key, and key material under it."""
    expires = datetime.now(UTC) + timedelta(hours=1)
    key = backend.generate_wrapping_key(WrappingKeySpec.RSA_2048, algorithm, expires_at=expires)
    return key.private_key, pyca_encrypt(algorithm, key.public_key, MATERIAL)


def bring_in(backend, reference, algorithm, ciphertext, object_id=None):
    return backend.unwrap_material(
        reference, algorithm, ciphertext, key_spec=AES, object_id=object_id
    )


# --- a lost HSM ----------------------------------------------------------------------------------


def one_outage_many_threads(shim, settings):
    """Each thread doubled the backoff: half a second unavailable, thirty seconds out of service."""
    settings |= {"initial_backoff": 1.0, "max_backoff": 600.0, "sessions": 12}
    with Pkcs11Backend.from_settings(settings) as backend:
        backend.mac(b"data")
        shim.latency("C_Sign", 20_000)
        shim.remove_device()
        answers = at_once(12, lambda: backend.mac(b"data"))
        assert {type(each) for each in answers} == {HsmUnavailable}
        assert 0.0 < backend._connection._breaker.wait <= 1.0


def thread_names():
    return [thread.name for thread in threading.enumerate()]


def comes_back_without_traffic(shim, settings):
    """A load balancer that believes the health report sends no call."""
    with Pkcs11Backend.from_settings(settings) as backend:
        shim.remove_device()
        assert isinstance(outcome(backend.mac, b"data"), HsmUnavailable)
        breaker = backend._connection._breaker
        wait_for(lambda: breaker.state == "half-open")
        assert not backend.health().ready
        shim.restore_device()
        wait_for(lambda: backend.health().ready)
        assert backend.mac(b"data")
        wait_for(lambda: "hsmwrap-reconnect" not in thread_names())


def closed_while_away(shim, settings):
    backend = Pkcs11Backend.from_settings(settings)
    shim.remove_device()
    assert isinstance(outcome(backend.mac, b"data"), HsmUnavailable)
    backend.close()
    assert "hsmwrap-reconnect" not in thread_names()


def odd_answer_to_open_session(shim, settings):
    """The HSM never counted as unavailable: an internal error for each call, until a restart."""
    with Pkcs11Backend.from_settings(settings) as backend:
        backend.mac(b"data")
        shim.fail("C_SignInit", CKR.SESSION_HANDLE_INVALID)
        shim.fail("C_OpenSession", CKR.GENERAL_ERROR, always=True)
        assert isinstance(outcome(backend.mac, b"data"), HsmUnavailable)
        assert not backend.health().ready
        shim.clear()
        wait_for(lambda: backend.health().ready)
        assert backend.mac(b"data")


def no_module_to_log_in_again(shim, settings):
    """A raw return code came out: another thread's restart had failed meanwhile."""
    with Pkcs11Backend.from_settings(settings) as backend:
        backend.mac(b"data")
        connection = backend._connection
        log_in_again = connection._attempts._log_in_again

        def without_module(failure):
            connection._host._finalise()
            shim.fail("C_Initialize", CKR.GENERAL_ERROR, always=True)
            log_in_again(failure)

        connection._attempts._log_in_again = without_module
        shim.fail("C_SignInit", CKR.USER_NOT_LOGGED_IN)
        assert isinstance(outcome(backend.mac, b"data"), HsmUnavailable)
        shim.clear()


def initialised_by_somebody_else(shim, settings):
    """It must not be finalised then, so a restart has to close the sessions that it leaves."""
    functions = shared_function_list(str(shim.path))
    assert functions.c_initialize(ctypes.byref(_InitializeArgs(flags=2))) == 0
    with Pkcs11Backend.from_settings(settings) as backend:
        assert backend.health().facts["one_at_a_time"]
        backend.mac(b"data")
        before = shim.counters().open_sessions
        for _ in range(3):
            shim.fail("C_SignInit", CKR.DEVICE_ERROR)
            assert backend.mac(b"data")
        assert backend.health().facts["generation"] == 4
        assert shim.counters().open_sessions == before
    counted = shim.counters()
    assert (counted.open_sessions, counted.calls["C_Finalize"]) == (0, 0)


# --- logins --------------------------------------------------------------------------------------


class SlowHandler(logging.Handler):
    def emit(self, _record):
        time.sleep(0.05)


def many_threads_one_wrong_pin(shim, settings):
    logging.getLogger("hsmwrap").addHandler(SlowHandler())
    shim.fail("C_Login", CKR.PIN_INCORRECT, always=True)
    with Pkcs11Backend.from_settings(settings | {"lazy": True}) as backend:
        answers = at_once(12, lambda: backend.mac(b"data"))
        assert {type(each) for each in answers} == {PinError}
        assert shim.counters().calls["C_Login"] == 1
        assert len({id(each) for each in answers}) == 12


VENDOR_S_OWN = 0x80000042


def a_vendor_s_answer_to_the_login(shim, settings):
    """Perhaps this HSM token's word for a wrong PIN: once a call, and not for ever."""
    shim.fail("C_Login", VENDOR_S_OWN, always=True)
    settings |= {"lazy": True, "initial_backoff": 0.0, "max_backoff": 0.0}
    with Pkcs11Backend.from_settings(settings) as backend:
        assert isinstance(outcome(backend.mac, b"data"), HsmUnavailable)
        assert shim.counters().calls["C_Login"] == 1
        wait_for(lambda: isinstance(outcome(backend.mac, b"data"), PinError))
        time.sleep(0.3)
        assert shim.counters().calls["C_Login"] == 3


def a_vendor_s_answer_to_the_login_and_a_right_one(shim, settings):
    """Not three in all: three in a row."""
    with Pkcs11Backend.from_settings(settings | {"lazy": True}) as backend:
        for _ in range(4):
            shim.fail("C_Login", VENDOR_S_OWN)
            shim.fail("C_SignInit", CKR.DEVICE_ERROR)
            outcome(backend.mac, b"data")
            wait_for(lambda: not isinstance(outcome(backend.mac, b"data"), HsmUnavailable))
            assert backend.mac(b"data")


# --- leftovers -----------------------------------------------------------------------------------


def an_id_that_an_earlier_call_left(shim, settings):
    """The reaper destroyed the second import, which was acknowledged, by the first one's id."""
    with Pkcs11Backend.from_settings(settings | {"material_custody": "HsmInternal"}) as backend:
        reference, ciphertext = wrapped(backend, OAEP_1)
        arguments = backend, reference, OAEP_1, ciphertext, OBJECT_ID
        shim.fail("C_UnwrapKey", CKR.DEVICE_REMOVED, nth=3, after=True)  # the token object's
        shim.fail("C_Initialize", CKR.GENERAL_ERROR, always=True)
        assert isinstance(outcome(bring_in, *arguments), HsmUnavailable)
        assert backend.health().facts["pending_objects"] == 1
        shim.clear()
        wait_for(lambda: backend.health().ready)
        imported = bring_in(*arguments)
        backend.reap(datetime.now(UTC))
        assert backend.encrypt(imported.key, b"message")


def a_trial_call_that_destroys_what_is_left(shim, settings):
    """It failed, and no other call might ever find out whether the HSM was back."""
    with Pkcs11Backend.from_settings(settings | {"material_custody": "HsmInternal"}) as backend:
        connection = backend._connection
        reference, ciphertext = wrapped(backend, OAEP_1)
        imported = bring_in(backend, reference, OAEP_1, ciphertext)
        shim.fail("C_DestroyObject", CKR.DEVICE_MEMORY, always=True)
        assert isinstance(outcome(backend.destroy_key, imported.key), HsmwrapError)
        assert backend.health().facts["pending_objects"] == 1
        connection._reconnector.stop()  # it makes the trial calls otherwise
        shim.fail("C_Initialize", CKR.GENERAL_ERROR, always=True)
        shim.fail("C_SignInit", CKR.DEVICE_REMOVED)
        assert isinstance(outcome(backend.mac, b"data"), HsmUnavailable)
        wait_for(lambda: connection._breaker.state == "half-open")
        connection.destroy_pending()
        assert backend.health().facts["pending_objects"] == 1
        shim.clear()
        assert backend.mac(b"data")
        connection.destroy_pending()
        assert backend.health().facts["pending_objects"] == 0


def a_wrapping_key_that_cannot_be_discarded_yet(shim, settings):
    """The import token was never issued, and the key would have stayed until it expired."""
    with Pkcs11Backend.from_settings(settings) as backend:
        before = shim.counters().token_objects_delta
        key = backend.generate_wrapping_key(
            WrappingKeySpec.EC_SM2,
            WrappingAlgorithm.SM2PKE,
            expires_at=datetime.now(UTC) + timedelta(hours=24),
        )
        assert shim.counters().token_objects_delta == before + 1
        shim.fail("C_DestroyObject", CKR.DEVICE_MEMORY, always=True)
        failed = outcome(backend.discard_wrapping_key, key.private_key)
        assert isinstance(failed, HsmwrapError)
        shim.clear()
        backend.reap(datetime.now(UTC))
        assert shim.counters().token_objects_delta == before


def a_key_whose_destruction_collides(shim, settings):
    """SoftHSM answers GENERAL_ERROR to some destructions beside other processes' writes."""
    with Pkcs11Backend.from_settings(settings | {"material_custody": "HsmInternal"}) as backend:
        reference, ciphertext = wrapped(backend, OAEP_1)
        before = shim.counters().token_objects_delta
        first, second = (bring_in(backend, reference, OAEP_1, ciphertext) for _ in range(2))
        shim.fail("C_DestroyObject", CKR.GENERAL_ERROR, nth=1)
        backend.destroy_key(first.key)
        assert shim.counters().token_objects_delta == before + 1
        shim.fail("C_DestroyObject", CKR.DEVICE_MEMORY, always=True)
        assert isinstance(outcome(backend.destroy_key, second.key), HsmwrapError)
        shim.clear()
        backend.reap(datetime.now(UTC))  # destroys what remained to be destroyed
        assert shim.counters().token_objects_delta == before


def a_bad_ciphertext_under_an_id_in_use(shim, settings):
    with Pkcs11Backend.from_settings(settings | {"material_custody": "HsmInternal"}) as backend:
        reference, ciphertext = wrapped(backend, OAEP_1)
        imported = bring_in(backend, reference, OAEP_1, ciphertext, OBJECT_ID)
        bad = outcome(bring_in, backend, reference, OAEP_1, bytes(256), OBJECT_ID)
        assert isinstance(bad, HsmwrapError)
        assert backend.encrypt(imported.key, b"message")


def closing_clears_up_once_more(shim, settings):
    backend = Pkcs11Backend.from_settings(settings | {"material_custody": "HsmInternal"})
    reference, ciphertext = wrapped(backend, OAEP_1)
    backend.destroy_key(bring_in(backend, reference, OAEP_1, ciphertext).key)
    before = shim.counters().token_objects_delta
    shim.fail("C_UnwrapKey", CKR.DEVICE_MEMORY, nth=3, after=True)
    shim.fail("C_FindObjectsInit", CKR.GENERAL_ERROR, always=True)
    outcome(bring_in, backend, reference, OAEP_1, ciphertext, OBJECT_ID)
    assert backend.health().facts["pending_objects"] == 1
    shim.clear()
    wait_for(lambda: backend.health().ready)  # it counts as lost: nothing was found any more
    backend.close()
    assert shim.counters().token_objects_delta == before
    counted = shim.counters()
    assert isinstance(outcome(backend.reap, datetime.now(UTC)), BackendClosed)
    assert shim.counters().calls_since(counted) == {}
    assert shim.counters().open_sessions == 0


# --- the probe -----------------------------------------------------------------------------------


def a_fault_while_probing(shim, settings):
    """It was kept as what the HSM token cannot, for as long as the process lived."""
    with Pkcs11Backend.from_settings(settings) as backend:
        undisturbed = backend.capabilities(), backend._probed.features
    missing_on = hardening.missing_on
    for function in ("C_GetAttributeValue", "C_UnwrapKey", "C_Decrypt", "C_WrapKey", "C_DeriveKey"):
        for code in (CKR.DEVICE_ERROR, CKR.GENERAL_ERROR):
            with Pkcs11Backend.from_settings(settings) as backend:

                def disturbed(key, function=function, code=code):
                    shim.fail(function, code)
                    return missing_on(key)

                hardening.missing_on = disturbed
                outcome(backend.capabilities)
                shim.clear()
                hardening.missing_on = missing_on
                assert (backend.capabilities(), backend._probed.features) == undisturbed, function


# --- closing, forks, and two backends of one module ----------------------------------------------


def closing_lets_an_import_through_the_host_end(shim, settings):
    backend = Pkcs11Backend.from_settings(settings)
    reference, ciphertext = wrapped(backend, OAEP_256)
    shim.latency("C_UnwrapKey", 200_000)
    before = shim.counters().calls["C_UnwrapKey"]
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(bring_in, backend, reference, OAEP_256, ciphertext)
        wait_for(lambda: shim.counters().calls["C_UnwrapKey"] > before)
        backend.close()
        assert running.result().check_value


def a_child_that_only_closes(shim, settings):
    with Pkcs11Backend.from_settings(settings) as backend:
        backend.mac(b"data")
        before = shim.counters()
        pid = os.fork()
        if pid == 0:
            backend.close()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert shim.counters().calls_since(before) == {}
        pid = os.fork()
        if pid == 0:
            backend.close()
            with Pkcs11Backend.from_settings(settings) as its_own:
                os._exit(0 if its_own.mac(b"data") else 1)
        assert os.waitpid(pid, 0)[1] == 0
        # Its own C_Initialize, not the one that it inherited.
        assert shim.counters().initialized_with_locking == before.initialized_with_locking + 1
        assert backend.mac(b"data")
    assert not shim.counters().violations


def opened_while_the_last_one_closes(shim, settings):
    """C_Finalize ran under the new backend's calls."""
    backend = Pkcs11Backend.from_settings(settings)
    backend.mac(b"data")
    finalize, finalising = Module.finalize, threading.Event()

    def slowly(module):
        finalising.set()
        time.sleep(0.3)
        finalize(module)

    Module.finalize = slowly
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(backend.close)
        finalising.wait()
        with Pkcs11Backend.from_settings(settings) as other:
            for _ in range(50):
                assert other.mac(b"data")
            closing.result()
    assert not shim.counters().violations
    assert shim.counters().open_sessions == 0


def closing_beside_a_busy_backend_on_a_module_that_cannot_lock(shim, settings):
    """It raised PoolTimeout, and the module was never given up."""
    shim.fail("C_Initialize", CKR.CANT_LOCK)
    settings |= {"session_wait": 0.2}
    quick, busy = (Pkcs11Backend.from_settings(settings) for _ in range(2))
    quick.mac(b"data")
    inside, may_leave = threading.Event(), threading.Event()

    def operation(_pooled):
        inside.set()
        may_leave.wait()

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(busy._connection.run, operation)
        inside.wait()
        quick.close()
        may_leave.set()
        running.result()
    busy.close()
    assert shim.counters().calls["C_Finalize"] == 1


# --- secrets -------------------------------------------------------------------------------------


def what_an_error_carries(shim, settings):
    """Its frames held the PIN, or the material that had come through the host."""
    secrets = {"PIN": Path(settings["pin_file"]).read_bytes().strip(), "material": MATERIAL}
    shim.fail("C_Login", CKR.PIN_INCORRECT, always=True)
    backend = Pkcs11Backend.from_settings(settings | {"lazy": True})
    for _ in range(2):
        refused = outcome(backend.mac, b"data")
        assert isinstance(refused, PinError)
        assert_no_secret(refused, secrets)
    backend.close()
    shim.clear()
    with Pkcs11Backend.from_settings(settings) as backend:
        reference, ciphertext = wrapped(backend, OAEP_256)
        bring_in(backend, reference, OAEP_256, ciphertext)
        for function in ("C_CreateObject", "C_EncryptInit", "C_WrapKey"):
            shim.fail(function, CKR.DEVICE_MEMORY, always=True)
            failed = outcome(bring_in, backend, reference, OAEP_256, ciphertext)
            assert isinstance(failed, HsmwrapError)
            assert_no_secret(failed, secrets)
            shim.clear()
        again = {"key_spec": AES, "expected_check_value": bytes(17)}
        wrong = outcome(backend.unwrap_material, reference, OAEP_256, ciphertext, **again)
        assert isinstance(wrong, InvalidKeyMaterial)
        assert_no_secret(wrong, secrets)


if __name__ == "__main__":
    scenarios.main(globals())
