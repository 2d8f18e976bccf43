"""Outages that have to end, behind the fault shim, each in a process and on a token of its own.

Usage: python -m support.pkcs11.outage_scenarios SCENARIO SHIM_DIRECTORY SETTINGS
"""

import contextlib
import gc
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from pkcs11.constants import TokenFlag

from hsmwrap.backend import Mac
from hsmwrap.catalog import WrappingAlgorithm
from hsmwrap.errors import (
    ConfigurationError,
    HsmError,
    HsmUnavailable,
    HsmwrapError,
    InvalidImportToken,
    InvalidKeyMaterial,
    KeyNotFound,
    PinError,
)
from hsmwrap.http import logs
from hsmwrap.kms import opening
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.pkcs11.binding.module import Module
from hsmwrap.pkcs11.sessions import connection
from hsmwrap.pkcs11.token import login
from hsmwrap.registry import open_backend
from hsmwrap.testing.faults import CKR
from support.pkcs11 import scenarios
from support.pkcs11.engine_scenarios import at_once, bring_in, outcome, wait_for, wrapped
from support.pkcs11.profile_scenarios import by_profile

OAEP_1 = WrappingAlgorithm.RSAES_OAEP_SHA_1
VENDOR = 0x80000384
TOKENS = Path(os.environ.get("HSMWRAP_TOKEN_DIR", "")) / "tokens"
HIDDEN = TOKENS.with_name("hidden")


def wait_until_ready(backend):
    wait_for(lambda: backend.health().ready)


# --- 1: the token's files are gone or replaced ---------------------------------------------------


@contextlib.contextmanager
def files_hidden():
    TOKENS.rename(HIDDEN)
    TOKENS.mkdir()
    try:
        yield
    finally:
        TOKENS.rmdir()
        HIDDEN.rename(TOKENS)


def replace_files(other):
    """Put another state of the token's files in their place; what was there is in ``hidden``."""
    shutil.rmtree(HIDDEN, ignore_errors=True)
    TOKENS.rename(HIDDEN)
    shutil.copytree(other, TOKENS)


def put_files_back():
    shutil.rmtree(TOKENS)
    HIDDEN.rename(TOKENS)


def backup(name):
    return shutil.copytree(TOKENS, TOKENS.with_name(name))


class Scene:
    """An open backend with a wrapping key and an imported key of each custody."""

    def __init__(self, settings):
        self.backends = {
            custody: Pkcs11Backend.from_settings(
                settings | {"wrapping_custody": custody, "material_custody": custody}
            )
            for custody in ("HsmEncryptedDatabase", "HsmInternal")
        }
        self.backend = self.backends["HsmEncryptedDatabase"]
        self.mac = self.backend.mac(b"data")
        self.wrapped = {c: wrapped(b, OAEP_1) for c, b in self.backends.items()}
        self.imported = {c: self.bring(c) for c in self.backends}

    def bring(self, custody):
        private, ciphertext = self.wrapped[custody]
        return bring_in(self.backends[custody], private, OAEP_1, ciphertext)

    def calls(self):
        """Each kind of call by name, and whether it is the first backend's."""
        yield "mac", lambda: self.backend.mac(b"data")
        yield "verify_mac", lambda: self.backend.verify_mac(b"data", self.mac)
        for custody, backend in self.backends.items():
            yield f"generate {custody}", lambda b=backend: wrapped(b, OAEP_1)
            yield f"import {custody}", lambda c=custody: self.bring(c)
            key = self.imported[custody].key
            yield f"encrypt {custody}", lambda b=backend, k=key: b.encrypt(k, b"message")

    def all_work(self):
        wait_for(lambda: all(b.health().ready for b in self.backends.values()))
        for name, call in self.calls():
            wait_for(lambda call=call: not isinstance(outcome(call), HsmUnavailable))
            assert not isinstance(answer := outcome(call), HsmwrapError), (name, answer)

    def close(self):
        for backend in self.backends.values():
            backend.close()


def token_files_hidden_for_one_request(shim, settings):
    """ConfigurationError with the advice to run keys init, InvalidImportToken, KeyNotFound."""
    scene = Scene(settings)
    for name, call in scene.calls():
        with files_hidden():
            answer = outcome(call)
            assert isinstance(answer, HsmUnavailable), (name, answer)
            assert "keys init" not in str(answer)
        scene.all_work()
    scene.close()
    assert shim.counters().open_sessions == 0


def token_files_hidden_for_longer(shim, settings):
    scene = Scene(settings)
    generation = scene.backend.health().facts["generation"]
    with files_hidden():
        for _name, call in scene.calls():
            assert isinstance(outcome(call), HsmUnavailable)
        for backend in scene.backends.values():
            assert not backend.health().ready
            assert "keys init" not in backend.health().detail
        time.sleep(0.5)  # the reconnecting threads try meanwhile
        assert not scene.backend.health().ready
    scene.all_work()
    assert scene.backend.health().facts["generation"] > generation
    scene.close()


def a_restored_backup(shim, settings):
    """The same keys in new files: no handle and no session is right any more."""
    scene = Scene(settings)
    replace_files(backup("backup"))
    for _ in range(3):
        for name, call in scene.calls():
            answer = outcome(call)
            fine = not isinstance(answer, HsmwrapError) or isinstance(answer, HsmUnavailable)
            assert fine, (name, answer)
    scene.all_work()
    scene.close()


def a_backup_without_the_keys(shim, settings):
    """Of the time before keys init: the token is there and the PIN is right, but no key is."""
    bare = TOKENS.with_name("bare")  # made by the test
    scene = Scene(settings)
    replace_files(bare)
    for name, call in scene.calls():
        answer = outcome(call)
        assert isinstance(answer, HsmUnavailable), (name, answer)
        assert "keys init" not in str(answer)
    assert not scene.backend.health().ready
    time.sleep(0.3)
    assert not scene.backend.health().ready
    assert isinstance(outcome(scene.backend.mac, b"data"), HsmUnavailable)
    put_files_back()
    scene.all_work()
    scene.close()


def a_backup_of_before_the_rotation(shim, settings):
    """The older set serves; what only the newer one opens is not the client's fault."""
    older = backup("older")
    Pkcs11Backend.rotate_keys(settings)
    scene = Scene(settings)
    assert scene.mac.key_set == "2"
    replace_files(older)
    for _name, call in scene.calls():
        outcome(call)
    wait_until_ready(scene.backend)
    answers = {name: outcome(call) for name, call in scene.calls()}
    assert not isinstance(answers["mac"], HsmwrapError)
    assert scene.backend.mac(b"data").key_set == "1"
    for name in ("verify_mac", "import HsmEncryptedDatabase", "encrypt HsmEncryptedDatabase"):
        assert isinstance(answers[name], HsmUnavailable), (name, answers[name])
    put_files_back()
    scene.all_work()
    scene.backend._keys._current = None  # the minute is over
    assert scene.backend.mac(b"data").key_set == "2"
    scene.close()


def a_key_set_that_was_retired_elsewhere(shim, settings):
    """The module goes on, and the import token is void."""
    with Pkcs11Backend.from_settings(settings) as backend:
        mac = backend.mac(b"data")
        key = bring_in(backend, *_as_arguments(wrapped(backend, OAEP_1))).key
        generation = backend.health().facts["generation"]
        command = "import sys, json; from hsmwrap.pkcs11 import Pkcs11Backend as B; "
        command += "s = json.loads(sys.argv[1]); B.rotate_keys(s); B.retire_keys(s, '1')"
        subprocess.run([sys.executable, "-c", command, json.dumps(settings)], check=True)
        assert type(outcome(backend.verify_mac, b"data", mac)).__name__ == "InvalidMac"
        assert type(outcome(backend.encrypt, key, b"m")).__name__ == "KeyNotFound"
        assert backend.health().ready
        assert backend.health().facts["generation"] == generation


def _as_arguments(pair):
    private, ciphertext = pair
    return private, OAEP_1, ciphertext


# --- 2: the same failure again and again, until C_Finalize ---------------------------------------


@contextlib.contextmanager
def until_finalized(shim, function, code):
    """A fault that only a restart of the module ends."""
    finalize = Module.finalize

    def ends(module):
        finalize(module)
        shim.clear()

    Module.finalize = ends
    shim.fail(function, code, always=True)
    try:
        yield
    finally:
        Module.finalize = finalize
        shim.clear()


STUCK = [
    *itertools.product(
        ("C_SignInit", "C_Sign", "C_UnwrapKey", "C_EncryptInit", "C_FindObjectsInit"),
        (VENDOR, CKR.GENERAL_ERROR, CKR.FUNCTION_FAILED, CKR.SESSION_HANDLE_INVALID),
    ),
    ("C_SignInit", CKR.USER_NOT_LOGGED_IN),
    ("C_SignInit", CKR.KEY_HANDLE_INVALID),
    ("C_SignInit", CKR.OPERATION_ACTIVE),
    ("C_GetSessionInfo", CKR.SESSION_HANDLE_INVALID),
    ("C_OpenSession", VENDOR),
]


def stuck_until_the_module_is_restarted(shim, settings):
    """An HSM that was restarted: its client library answers the same to every call."""
    with Pkcs11Backend.from_settings(settings) as backend:
        key = bring_in(backend, *_as_arguments(wrapped(backend, OAEP_1))).key
        calls = {
            "C_UnwrapKey": lambda: backend.encrypt(key, b"message"),
            "C_EncryptInit": lambda: backend.encrypt(key, b"message"),
        }
        for function, code in STUCK:
            call = calls.get(function, lambda: backend.mac(b"data"))
            call()
            generation = backend.health().facts["generation"]
            with until_finalized(shim, function, code):
                backend._connection._connector.connected.pool.close_idle()  # search and open, too
                answers = [outcome(call) for _ in range(5)]
                assert not isinstance(answers[-1], HsmwrapError), (function, code, answers)
                assert isinstance(answers[0], HsmError | HsmUnavailable | bytes | Mac), answers
            assert backend.health().facts["generation"] > generation, (function, code)
        assert not shim.counters().violations


def an_operation_that_never_works(shim, settings):
    """Not the module's fault: it is not restarted for each call."""
    with Pkcs11Backend.from_settings(settings) as backend:
        key = bring_in(backend, *_as_arguments(wrapped(backend, OAEP_1))).key
        generation = backend.health().facts["generation"]
        shim.fail("C_EncryptInit", CKR.MECHANISM_INVALID, always=True)
        for _ in range(30):
            assert isinstance(outcome(backend.encrypt, key, b"message"), HsmError)
            assert backend.mac(b"data")
        assert backend.health().facts["generation"] == generation + 1
        assert backend.health().ready


def sessions_that_the_hsm_has_ended(shim, settings):
    """All of them: the second attempt of a call met the next dead one."""
    with Pkcs11Backend.from_settings(settings) as backend:
        shim.latency("C_Sign", 20_000)
        at_once(8, lambda: backend.mac(b"data"))
        shim.latency("C_Sign", 0)
        assert backend.health().facts["sessions_idle"] > 1
        shim.fail("C_SignInit", CKR.SESSION_HANDLE_INVALID)
        assert backend.mac(b"data")
        assert backend.health().facts["sessions_idle"] == 1


# --- 3: what C_Login may mean --------------------------------------------------------------------


def an_unknown_answer_to_the_login(shim, settings):
    """The reconnecting thread tried the PIN for as long as the process lived."""
    settings |= {"lazy": True, "initial_backoff": 0.0, "max_backoff": 0.0}
    for code in (0x200, 0x05, 0x06, 0x07, 0x70, VENDOR):
        before = shim.counters().calls["C_Login"]
        shim.fail("C_Login", code, always=True)
        with Pkcs11Backend.from_settings(settings) as backend:
            wait_for(lambda backend=backend: isinstance(outcome(backend.mac, b"data"), PinError))
            time.sleep(0.3)
            assert shim.counters().calls["C_Login"] - before == 3, hex(code)
            assert not backend.health().ready
            assert f"0x{code:X}" in backend.health().detail
        shim.clear()


def an_unknown_answer_to_a_later_login(shim, settings):
    """By the thread that connects again: a vendor's may be its word for a wrong PIN."""
    with Pkcs11Backend.from_settings(settings) as backend:
        backend.mac(b"data")
        before = shim.counters().calls["C_Login"]
        shim.fail("C_Login", VENDOR, always=True)
        shim.fail("C_SignInit", CKR.USER_NOT_LOGGED_IN)
        wait_for(lambda: isinstance(outcome(backend.mac, b"data"), PinError))
        time.sleep(0.3)
        assert shim.counters().calls["C_Login"] - before == 3
        assert not backend.health().ready


def an_answer_to_a_later_login_that_is_not_about_the_pin(shim, settings):
    """Client libraries of HSMs that are gone answer so: three stopped the backend for good."""
    for code, text in ((CKR.GENERAL_ERROR, ""), (VENDOR, "tells_wrong_pins = true")):
        profile = by_profile(shim, settings, f"[login]\n{text}\n")
        with Pkcs11Backend.from_settings(profile) as backend:
            backend.mac(b"data")
            before = shim.counters().calls["C_Login"]
            shim.fail("C_Login", code, always=True)
            shim.fail("C_SignInit", CKR.USER_NOT_LOGGED_IN)
            wait_for(
                lambda backend=backend, before=before: (
                    isinstance(outcome(backend.mac, b"data"), HsmUnavailable)
                    and shim.counters().calls["C_Login"] - before > login.UNKNOWN_LOGINS
                )
            )
            assert not backend.health().ready
            shim.clear()
            wait_until_ready(backend)
            assert backend.mac(b"data")


def an_answer_to_a_login_of_a_token_that_tells_wrong_pins(shim, settings):
    """The same where the HSM is gone before the PIN has ever worked."""
    lazy = settings | {"lazy": True, "initial_backoff": 0.0, "max_backoff": 0.0}
    shim.fail("C_Login", CKR.GENERAL_ERROR, always=True)
    with Pkcs11Backend.from_settings(
        by_profile(shim, lazy, "[login]\ntells_wrong_pins = true\n")
    ) as backend:
        wait_for(
            lambda: (
                isinstance(outcome(backend.mac, b"data"), HsmUnavailable)
                and shim.counters().calls["C_Login"] > login.UNKNOWN_LOGINS
            )
        )
        shim.clear()
        wait_until_ready(backend)


def an_unknown_answer_to_a_wrong_pin(shim, settings):
    """The token's warning tells: one try, though this code is not about a PIN elsewhere."""
    pin_file = Path(settings["pin_file"])
    right = pin_file.read_bytes()
    for code in (CKR.GENERAL_ERROR, VENDOR):
        with Pkcs11Backend.from_settings(settings) as backend:
            backend.mac(b"data")
            pin_file.chmod(0o600)
            pin_file.write_bytes(b"not-the-pin")
            before = shim.counters().calls["C_Login"]
            shim.fail("C_Login", code, always=True, after=True)
            shim.fail("C_SignInit", CKR.DEVICE_ERROR)
            refused = outcome(backend.mac, b"data")
            assert isinstance(refused, PinError)
            assert "USER_PIN_COUNT_LOW" in str(refused)
            assert isinstance(outcome(backend.mac, b"data"), PinError)
            assert shim.counters().calls["C_Login"] - before == 1
        shim.clear()
        pin_file.write_bytes(right)
        login._refused.clear()


def a_login_that_collides(shim, settings):
    """Twice in a row: SoftHSM answers so while another process logs in. Not three in all."""
    with Pkcs11Backend.from_settings(settings) as backend:
        for _ in range(3):
            shim.fail("C_Login", CKR.GENERAL_ERROR)
            shim.fail("C_SignInit", CKR.DEVICE_ERROR)
            assert backend.mac(b"data")
        shim.fail("C_Login", CKR.GENERAL_ERROR)
        with Pkcs11Backend.from_settings(settings) as another:
            assert another.mac(b"data")


# --- 4: another program's wrong PIN --------------------------------------------------------------

WRONG_PIN = """
import sys, pkcs11
token = next(pkcs11.lib(sys.argv[1]).get_tokens(token_label="outage"))
try:
    token.open(user_pin="not-the-pin")
except pkcs11.exceptions.PinIncorrect:
    sys.exit(0)
sys.exit(1)
"""


def a_wrong_pin_by_another_program(shim, settings):
    """USER_PIN_COUNT_LOW stayed, the next hiccup ended the service, and it did not start again."""
    module = os.environ["HSMWRAP_PKCS11_MODULE"]
    with Pkcs11Backend.from_settings(settings) as backend:
        subprocess.run([sys.executable, "-c", WRONG_PIN, module], check=True)
        shim.fail("C_SignInit", CKR.DEVICE_ERROR)
        assert backend.mac(b"data")
        assert backend.health().ready
    subprocess.run([sys.executable, "-c", WRONG_PIN, module], check=True)
    with Pkcs11Backend.from_settings(settings) as backend:
        assert backend.mac(b"data")


def a_low_count_and_a_wrong_pin(shim, settings):
    """It is tried once, whatever the answer is."""
    flags = login.flags_of
    login.flags_of = lambda session: flags(session) | TokenFlag.USER_PIN_COUNT_LOW
    settings |= {"lazy": True, "initial_backoff": 0.0, "max_backoff": 0.0}
    for code in (CKR.PIN_INCORRECT, CKR.GENERAL_ERROR, VENDOR):
        before = shim.counters().calls["C_Login"]
        login._refused.clear()
        shim.fail("C_Login", code, always=True)
        for _ in range(2):  # the next backend of this process does not try at all
            with Pkcs11Backend.from_settings(settings) as backend:
                assert isinstance(outcome(backend.mac, b"data"), PinError)
                assert isinstance(outcome(backend.mac, b"data"), PinError)
                assert not backend.health().ready
                time.sleep(0.2)
        assert shim.counters().calls["C_Login"] - before == 1
        shim.clear()


def a_last_try_is_not_taken(shim, settings):
    """It was the operator's to end, and the thread that would have noticed had ended."""
    flags = login.flags_of
    with Pkcs11Backend.from_settings(settings) as backend:
        for flag in (TokenFlag.USER_PIN_FINAL_TRY, TokenFlag.USER_PIN_LOCKED):
            before = shim.counters().calls["C_Login"]
            login.flags_of = lambda session, flag=flag: flags(session) | flag
            shim.fail("C_SignInit", CKR.DEVICE_ERROR)
            assert isinstance(outcome(backend.mac, b"data"), PinError)
            assert not backend.health().ready
            assert flag.name in backend.health().detail
            assert isinstance(outcome(backend.mac, b"data"), PinError)
            time.sleep(0.3)
            assert shim.counters().calls["C_Login"] == before
            login.flags_of = flags  # the operator has reset the count
            wait_until_ready(backend)  # without a call
            assert backend.mac(b"data")


# --- 5: too many sessions, in other words --------------------------------------------------------


def too_many_sessions_by_another_code(shim, settings):
    """Each call beyond what the HSM allows restarted the module under all others."""
    with Pkcs11Backend.from_settings(settings | {"sessions": 12}) as backend:
        backend.mac(b"data")
        shim.latency("C_Sign", 10_000)
        at_once(3, lambda: backend.mac(b"data"))
        generation = backend.health().facts["generation"]
        for code in (CKR.ARGUMENTS_BAD, CKR.HOST_MEMORY, CKR.DEVICE_MEMORY, VENDOR):
            shim.fail("C_OpenSession", code, always=True)
            answers = at_once(24, lambda: backend.mac(b"data"))
            assert not any(isinstance(each, HsmwrapError) for each in answers), (code, answers)
            assert backend.health().facts["generation"] == generation
            assert backend.health().facts["sessions_cap"] <= 3
            assert backend.health().ready
            shim.clear("C_OpenSession")


# --- 6: blobs of our own -------------------------------------------------------------------------


def own_blobs_that_do_not_unwrap(shim, settings):
    """InvalidImportToken, KeyNotFound: the client was told to ask for what he had."""
    with Pkcs11Backend.from_settings(settings) as backend:
        private, ciphertext = wrapped(backend, OAEP_1)
        key = bring_in(backend, private, OAEP_1, ciphertext).key
        calls = {
            "import": lambda: bring_in(backend, private, OAEP_1, ciphertext),
            "encrypt": lambda: backend.encrypt(key, b"message"),
        }
        codes = (VENDOR, CKR.FUNCTION_FAILED, CKR.GENERAL_ERROR, CKR.TEMPLATE_INCONSISTENT)
        for (name, call), code in itertools.product(calls.items(), codes):
            shim.fail("C_UnwrapKey", code, always=True)
            answer = outcome(call)
            shim.clear()
            assert isinstance(answer, HsmError | HsmUnavailable), (name, code, answer)
            assert f"0x{code:X}" in str(answer), answer
            call()
        # A client's ciphertext is another matter: the third unwrapping is that of the material.
        for code in (VENDOR, CKR.GENERAL_ERROR):
            for nth in (2, 4):
                shim.fail("C_UnwrapKey", code, every=nth)
            answer = outcome(calls["import"])
            shim.clear()
            assert not isinstance(answer, HsmwrapError | InvalidKeyMaterial) or answer


def a_damaged_blob(shim, settings):
    """That is not the HSM's fault, though SoftHSM says GENERAL_ERROR."""
    with Pkcs11Backend.from_settings(settings) as backend:
        private, ciphertext = wrapped(backend, OAEP_1)
        key = bring_in(backend, private, OAEP_1, ciphertext).key
        for at in (5, len(key.data) - 1):
            damaged = bytearray(key.data)
            damaged[at] ^= 1
            assert (
                type(outcome(backend.encrypt, replace(key, data=bytes(damaged)), b"m"))
                is KeyNotFound
            )
        damaged = bytearray(private.data)
        damaged[-1] ^= 1
        reference = replace(private, data=bytes(damaged))
        assert type(outcome(bring_in, backend, reference, OAEP_1, ciphertext)) is InvalidImportToken
        assert shim.counters().session_objects == 0


# --- 7: ready means that a call would succeed ----------------------------------------------------


def not_ready_while_the_pin_cannot_be_read(shim, settings):
    """Ready, with the sessions of a generation that had ended."""
    pin_file = Path(settings["pin_file"])
    hidden = pin_file.with_name("hidden")
    for code in (CKR.DEVICE_ERROR, CKR.USER_NOT_LOGGED_IN):
        with Pkcs11Backend.from_settings(settings) as backend:
            backend.mac(b"data")
            pin_file.rename(hidden)
            shim.fail("C_SignInit", code)
            assert isinstance(outcome(backend.mac, b"data"), HsmUnavailable)
            assert not backend.health().ready
            assert str(pin_file) in backend.health().detail
            time.sleep(0.3)
            assert not backend.health().ready
            hidden.rename(pin_file)
            wait_until_ready(backend)  # without a call
            assert backend.mac(b"data")


def not_ready_while_there_are_no_keys(shim, settings):
    """200 for a token without keys, and each call failed."""
    settings |= {"key_prefix": "none-yet"}
    with Pkcs11Backend.from_settings(settings) as backend:
        assert not backend.health().ready
        assert "keys init" in backend.health().detail
        assert isinstance(outcome(backend.mac, b"data"), ConfigurationError)
        command = "import sys, json; from hsmwrap.pkcs11 import Pkcs11Backend as B; "
        command += "B.initialise_keys(json.loads(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", command, json.dumps(settings)], check=True)
        wait_until_ready(backend)  # without a call
        assert backend.mac(b"data")


def a_lazy_backend_connects_when_it_is_asked_for_its_health(shim, settings):
    """Not connected, so not ready, so no traffic, so never connected."""
    with Pkcs11Backend.from_settings(settings | {"lazy": True}) as backend:
        assert not backend.health().ready
        wait_until_ready(backend)
        assert backend.mac(b"data")


def lost_while_there_is_no_traffic(shim, settings):
    """The health page said 200 until the first request failed."""
    connection.PROOF_LIFETIME = 0.1
    with Pkcs11Backend.from_settings(settings) as backend:
        assert backend.health().ready
        shim.remove_device()
        wait_for(lambda: not backend.health().ready)
        shim.restore_device()
        wait_until_ready(backend)
        with files_hidden():
            wait_for(lambda: not backend.health().ready)
        wait_until_ready(backend)
        assert backend.mac(b"data")


def not_ready_after_a_child_of_this_process_was_made(shim, settings):
    """In the child: it connects by itself once it is asked."""
    with Pkcs11Backend.from_settings(settings) as backend:
        backend.mac(b"data")
        pid = os.fork()
        if pid == 0:
            wait_until_ready(backend)
            os._exit(0 if backend.mac(b"data") else 1)
        assert os.waitpid(pid, 0)[1] == 0


# --- 8: the start --------------------------------------------------------------------------------


def the_start_waits_for_a_token_that_no_slot_lists(shim, settings):
    """It ended with a configuration error, while the HSM was still booting."""
    waiting = threading.Event()

    class Returns(logging.Handler):
        def emit(self, record):
            assert "0 of 0 tokens match" in record.why
            waiting.set()
            TOKENS.rmdir()
            HIDDEN.rename(TOKENS)

    TOKENS.rename(HIDDEN)
    TOKENS.mkdir()
    opening._log.addHandler(Returns())
    deadline = time.monotonic() + 60
    with opening._with_retries(lambda: open_backend("pkcs11", settings), deadline) as backend:
        assert backend.mac(b"data")
    assert waiting.is_set()


# --- what is written between the lines of the log ------------------------------------------------


SECRET = os.urandom(8).hex()


class Unlucky:
    def __del__(self):
        raise ValueError(SECRET)


def no_raw_line_in_the_log(shim, settings):
    """python-pkcs11 ended a search that could not begin in a destructor, and failed again."""
    with tempfile.TemporaryFile("w+") as lines:
        stderr = os.dup(2)
        os.dup2(lines.fileno(), 2)
        try:
            write_log(settings, shim)
        finally:
            os.dup2(stderr, 2)
        lines.seek(0)
        records = [json.loads(line) for line in lines]
    assert any(each["message"] == "recovering" for each in records)
    last = [each for each in records if each["logger"] == "hsmwrap.http.logs"]
    assert [each["message"] for each in last] == ["exception ignored", "thread ended"], last
    assert SECRET not in json.dumps(records)


def write_log(settings, shim):
    logs.configure()
    with Pkcs11Backend.from_settings(settings) as backend:
        for function in ("C_FindObjectsInit", "C_FindObjects", "C_FindObjectsFinal"):
            for code in (CKR.SESSION_HANDLE_INVALID, CKR.DEVICE_ERROR, CKR.GENERAL_ERROR):
                shim.fail(function, code)
                outcome(backend.reap, datetime.now(UTC))
                shim.clear()
        shim.remove_device()
        outcome(backend.reap, datetime.now(UTC))
        shim.restore_device()
    gc.collect()
    Unlucky()
    thread = threading.Thread(target=[].pop)
    thread.start()
    thread.join()


if __name__ == "__main__":
    scenarios.main(globals())
