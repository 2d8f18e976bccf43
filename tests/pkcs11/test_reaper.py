"""The reaper, and the command that calls it."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from softhsm_token import ROOT

from hsmwrap import registry
from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec
from hsmwrap.pkcs11.reaper import expiry, label

SM2 = WrappingKeySpec.EC_SM2, WrappingAlgorithm.SM2PKE
NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture
def backend(softhsm):
    with registry.open_backend("pkcs11", softhsm.settings("reaper")) as backend:
        backend.reap(NOW + timedelta(days=9))
        yield backend


def test_labels_round_trip():
    assert expiry("p", label("p", NOW)) == NOW


@pytest.mark.parametrize(
    "text", ["", "p", "q:wrapping:1", "p:wrapping:", "p:wrapping:x", "p:material:1"]
)
def test_other_labels_are_left_alone(text):
    assert expiry("p", text) is None


def test_only_the_expired_are_removed_and_reported(backend):
    old = backend.generate_wrapping_key(*SM2, expires_at=NOW - timedelta(seconds=1))
    backend.generate_wrapping_key(*SM2, expires_at=NOW + timedelta(hours=1))
    report = backend.reap(NOW)
    assert (report.examined, len(report.removed), report.failed) == (2, 1, ())
    assert bytes.fromhex(report.removed[0]) in old.private_key.data
    assert backend.reap(NOW).examined == 1


def test_another_prefix_is_another_backend_s_business(backend, softhsm):
    backend.generate_wrapping_key(*SM2, expires_at=NOW - timedelta(seconds=1))
    with registry.open_backend("pkcs11", softhsm.settings("reaper-2")) as other:
        assert other.reap(NOW).examined == 0
    assert len(backend.reap(NOW).removed) == 1


def test_the_command_removes_what_a_dead_process_left(backend, softhsm):
    backend.generate_wrapping_key(*SM2, expires_at=NOW - timedelta(seconds=1))
    report = json.loads(softhsm.run_keys("reap", "reaper"))
    assert (report["examined"], len(report["removed"]), report["failed"]) == (1, 1, [])


FULL = """
import json, sys
from datetime import UTC, datetime, timedelta
from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import HsmResourceExhausted
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.testing.faults import CKR, FaultShim
settings = json.loads(sys.argv[1])
shim = FaultShim(settings["module"], sys.argv[2])
backend = Pkcs11Backend.from_settings(settings | {"module": str(shim.path)})
sm2 = WrappingKeySpec.EC_SM2, WrappingAlgorithm.SM2PKE
backend.generate_wrapping_key(*sm2, expires_at=datetime.now(UTC) - timedelta(hours=1))
before = shim.counters().token_objects_destroyed
shim.fail("C_SignInit", CKR.DEVICE_MEMORY)
try:
    backend.seal(b"data")
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
