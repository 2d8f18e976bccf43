"""Outages end without a restart of the KMS, whatever return code began them."""

import json
import shutil
import subprocess
import sys

import pytest
from support.pkcs11 import leaving, outage_scenarios, scenarios
from support.services.softhsm import make_softhsm

from hsmwrap.pkcs11.sessions._repeats import FIRST_PAUSE, LONGEST_PAUSE, RepeatedFailures


@pytest.mark.parametrize("scenario", scenarios.names_of(outage_scenarios))
def test_outage(tmp_path, scenario):
    token = make_softhsm(tmp_path / "token", label="outage")
    shutil.copytree(token.directory / "tokens", token.directory / "bare")
    settings = token.settings("outage", trusted=False, initial_backoff=0.05, max_backoff=0.1)
    scenarios.run(outage_scenarios, scenario, tmp_path, settings, **token.environment)


def test_a_process_that_ends_leaves_no_thread_in_the_module(softhsm):
    """Its destructors ran under the calls of daemon threads: 5 of 20 such processes crashed."""
    done = subprocess.run(
        [sys.executable, "-m", leaving.__name__, json.dumps(softhsm.settings("outage"))],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_the_module_is_restarted_for_failures_in_a_row_and_not_for_ever():
    now = [0.0]
    failures = RepeatedFailures(lambda: now[0])
    assert [failures.failed("mac") for _ in range(3)] == [False, False, True]
    assert not any(failures.failed("mac") for _ in range(100))  # it did not help
    now[0] = FIRST_PAUSE
    assert failures.failed("mac")
    now[0] += 2 * FIRST_PAUSE - 0.1
    assert not any(failures.failed("mac") for _ in range(100))
    now[0] += 0.1
    assert failures.failed("mac")
    failures.succeeded("mac")
    assert [failures.failed("mac") for _ in range(3)] == [False, False, True]
    now[0] += LONGEST_PAUSE
    assert [failures.failed("encrypt") for _ in range(2)] == [False, False]
    failures.succeeded("mac")
    assert failures.failed("encrypt")
