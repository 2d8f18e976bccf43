"""The reaper, and the command that calls it."""

import json
import logging
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from pkcs11.constants import Attribute
from pkcs11.exceptions import (
    DeviceRemoved,
    FunctionFailed,
    GeneralError,
    KeyHandleInvalid,
    ObjectHandleInvalid,
    SessionHandleInvalid,
    UserNotLoggedIn,
)
from support.services.softhsm import ROOT

from hsmwrap import registry
from hsmwrap.backend import ReapsWrappingKeys
from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec
from hsmwrap.pkcs11.sessions.session import PooledSession
from hsmwrap.pkcs11.wrapping.reaper import GRACE, expiry, label, reap

SM2 = WrappingKeySpec.EC_SM2, WrappingAlgorithm.SM2PKE
NOW = datetime.now(UTC).replace(microsecond=0)
LONG_AGO = NOW - GRACE - timedelta(seconds=1)


@pytest.fixture
def backend(softhsm):
    with registry.open_backend("pkcs11", softhsm.settings("reaper")) as backend:
        ReapsWrappingKeys.of(backend).reap(NOW + timedelta(days=9))
        yield backend


def test_labels_round_trip():
    assert expiry("p", label("p", NOW)) == NOW


@pytest.mark.parametrize(
    "text", ["", "p", "q:wrapping:1", "p:wrapping:", "p:wrapping:x", "p:material:1"]
)
def test_other_labels_are_left_alone(text):
    assert expiry("p", text) is None


def test_only_the_expired_are_removed_and_reported(backend):
    old = backend.generate_wrapping_key(*SM2, expires_at=LONG_AGO)
    backend.generate_wrapping_key(*SM2, expires_at=NOW + timedelta(hours=1))
    report = ReapsWrappingKeys.of(backend).reap(NOW)
    assert (report.examined, len(report.removed), report.failed) == (2, 1, ())
    assert bytes.fromhex(report.removed[0]) in old.private_key.data
    assert ReapsWrappingKeys.of(backend).reap(NOW).examined == 1


def test_a_clock_that_is_a_little_ahead_destroys_no_live_key(backend):
    backend.generate_wrapping_key(*SM2, expires_at=NOW)
    assert ReapsWrappingKeys.of(backend).reap(NOW + timedelta(minutes=14)).removed == ()
    assert ReapsWrappingKeys.of(backend).reap(NOW + GRACE).removed == ()
    assert len(ReapsWrappingKeys.of(backend).reap(NOW + GRACE + timedelta(seconds=1)).removed) == 1


def test_another_prefix_is_another_backend_s_business(backend, softhsm):
    backend.generate_wrapping_key(*SM2, expires_at=LONG_AGO)
    with registry.open_backend("pkcs11", softhsm.settings("reaper-2")) as other:
        assert ReapsWrappingKeys.of(other).reap(NOW).examined == 0
    assert len(ReapsWrappingKeys.of(backend).reap(NOW).removed) == 1


def test_the_command_removes_what_a_dead_process_left(backend, softhsm):
    backend.generate_wrapping_key(*SM2, expires_at=LONG_AGO)
    report = json.loads(softhsm.run_keys("reap", "reaper"))
    assert (report["examined"], len(report["removed"]), report["failed"]) == (1, 1, [])


class Key:
    """An expired key; ``reading`` and ``destroying`` are what the HSM answers instead."""

    def __init__(self, number, *, reading=None, destroying=None):
        self.handle = number
        self.reading, self.destroying = reading, destroying
        self.destroyed = False

    def get_attributes(self, _keys):
        if self.reading:
            raise self.reading
        return {Attribute.LABEL: label("p", LONG_AGO), Attribute.ID: bytes([self.handle])}

    def destroy(self):
        if self.destroying:
            raise self.destroying
        self.destroyed = True


class Session:
    """Searches answer in turn; an exception in the list ends that search."""

    def __init__(self, *searches):
        self.searches = iter(searches)

    def get_objects(self, _template):
        for each in next(self.searches):
            if isinstance(each, Exception):
                raise each
            yield each


def reap_in(*searches, logged_in=lambda _session: True):
    return reap(PooledSession(Session(*searches), logged_in), "p", NOW)


GONE = [ObjectHandleInvalid(), KeyHandleInvalid()]


@pytest.mark.parametrize("gone", [*GONE, FunctionFailed()], ids=lambda e: type(e).__name__)
def test_a_key_that_another_removed_before_it_was_read_stops_nothing(gone):
    keys = [Key(1), Key(2, reading=gone), Key(3)]
    report = reap_in(keys)
    assert (report.examined, report.removed, report.failed) == (2, ("01", "03"), ())


@pytest.mark.parametrize("gone", GONE, ids=lambda e: type(e).__name__)
def test_a_key_that_another_removed_before_it_was_destroyed_stops_nothing(gone):
    report = reap_in([Key(1), Key(2, destroying=gone), Key(3)])
    assert (report.examined, report.removed, report.failed) == (3, ("01", "03"), ())


def test_a_key_that_vanishes_during_the_search_stops_nothing():
    first, second, third = Key(1), Key(2), Key(3)
    report = reap_in([first, ObjectHandleInvalid()], [first, second, third])
    assert (report.examined, report.removed) == (3, ("01", "02", "03"))


def test_a_search_that_never_ends_well_is_given_up():
    searches = [[Key(number), ObjectHandleInvalid()] for number in range(50)]
    assert len(reap_in(*searches).removed) == 10


def test_a_key_that_may_not_be_destroyed_is_reported():
    refused = Key(1, destroying=GeneralError())
    report = reap_in([refused, Key(2)], [refused], [refused])
    assert (report.removed, report.failed) == (("02",), ("01",))


@pytest.mark.parametrize(
    "answer", [FunctionFailed(), GeneralError()], ids=lambda e: type(e).__name__
)
def test_a_key_that_another_removes_at_the_same_time_is_in_no_list(answer):
    report = reap_in([Key(1, destroying=answer), Key(2)], [], [])
    assert (report.removed, report.failed) == (("02",), ())


def test_a_key_that_was_in_the_way_of_another_s_write_is_removed_at_the_second_try():
    report = reap_in([Key(1, destroying=GeneralError())], [Key(1)])
    assert (report.removed, report.failed) == (("01",), ())


@pytest.mark.parametrize("where", ["reading", "destroying"])
@pytest.mark.parametrize("lost", [SessionHandleInvalid(), DeviceRemoved()])
def test_a_lost_connection_is_not_taken_for_a_vanished_key(where, lost):
    with pytest.raises(type(lost)):
        reap_in([Key(1, **{where: lost}), Key(2)])


@pytest.mark.parametrize(
    "gone",
    [{"reading": FunctionFailed()}, {"reading": GONE[0]}, {"destroying": GONE[0]}],
    ids=["read", "read for good", "destroyed"],
)
def test_a_lost_login_is_not_taken_for_a_vanished_key(gone):
    """Some tokens forget the handles of private objects with the login."""
    with pytest.raises(UserNotLoggedIn):
        reap_in([Key(1, **gone)], logged_in=lambda _session: False)


def test_two_reapers_share_the_work(softhsm, caplog):
    caplog.set_level(logging.ERROR)
    settings = softhsm.settings("reapers")
    with registry.open_backend("pkcs11", settings) as backend:
        for _ in range(40):
            backend.generate_wrapping_key(*SM2, expires_at=LONG_AGO)
        command = [sys.executable, "-m", "hsmwrap.cli", "keys", "reap", "--json"]
        reapers = [
            subprocess.Popen(
                [*command, "--key-prefix", "reapers"],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=os.environ | softhsm.environment,
                cwd=ROOT,
                text=True,
            )
            for _ in range(2)
        ]
        ended = [(*reaper.communicate(), reaper.returncode) for reaper in reapers]
        assert [(err, code) for _, err, code in ended] == [("", 0), ("", 0)]
        removed = [key for out, _, _ in ended for key in json.loads(out)["removed"]]
        assert len(removed) == len(set(removed)) == 40
        assert ReapsWrappingKeys.of(backend).reap(NOW).examined == 0


FULL = """
import json, sys
from datetime import UTC, datetime, timedelta
from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import HsmResourceExhausted
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.testing.faults import CKR
from support.faults.shim import fault_shim
settings = json.loads(sys.argv[1])
shim = fault_shim(settings["module"], sys.argv[2])
backend = Pkcs11Backend.from_settings(settings | {"module": str(shim.path)})
sm2 = WrappingKeySpec.EC_SM2, WrappingAlgorithm.SM2PKE
backend.generate_wrapping_key(*sm2, expires_at=datetime.now(UTC) - timedelta(hours=1))
before = shim.counters().token_objects_destroyed
shim.fail("C_SignInit", CKR.DEVICE_MEMORY)
try:
    backend.mac(b"data")
except HsmResourceExhausted:
    print(shim.counters().token_objects_destroyed - before)
"""


def test_an_hsm_without_memory_is_reaped_at_once(softhsm, tmp_path):
    settings = json.dumps(softhsm.settings("reaper"))
    command = [sys.executable, "-c", FULL, settings, tmp_path / "shim"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=ROOT, env=os.environ
    )
    assert done.stdout.strip() == "1"
