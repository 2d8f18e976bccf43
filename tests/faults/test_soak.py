"""The soak, short; `scripts/soak --seconds 120` is the long one."""

import os
import subprocess
import sys

SOAK = [sys.executable, "-m", "hsmwrap.testing.soak", "--seconds", "20", "--seed"]


def soak(softhsm, *arguments):
    environment = os.environ | softhsm.environment
    return subprocess.run(
        arguments, env=environment, capture_output=True, text=True, timeout=180, check=False
    )


def test_all_holds_while_faults_come_at_random(softhsm):
    done = soak(softhsm, *SOAK, "20261124")
    summary = done.stdout.splitlines()[-1]
    assert summary.startswith("soak held"), done.stdout + done.stderr[-3000:]
    assert done.returncode == 0


BROKEN = """
import sys
from hsmwrap.pkcs11 import connection
connection.Connection._clear_up = lambda self, object_id: True  # leaves what failed calls left
from hsmwrap.testing import soak
sys.argv = ["soak", "--seconds", "20", "--seed", "1"]
sys.exit(soak.main())
"""


def test_the_soak_can_fail(softhsm):
    done = soak(softhsm, sys.executable, "-c", BROKEN)
    assert done.returncode != 0
    assert done.stdout.splitlines()[-1].startswith("soak FAILED")
