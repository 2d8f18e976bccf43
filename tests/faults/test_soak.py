"""The soak for 20 seconds; `scripts/soak --seconds 120` is the long one."""

import os
import subprocess
import sys

import pytest
from support.services.softhsm import make_softhsm

SOAK = ["-m", "soak", "--seconds", "20", "--least-speed", "0.3", "--seed", "20261124"]
# The same check value for every key.
BROKEN = """
import sys
from dataclasses import replace
from hsmwrap.pkcs11 import Pkcs11Backend
right = Pkcs11Backend.unwrap_material
Pkcs11Backend.unwrap_material = lambda *args, **more: replace(
    right(*args, **more), check_value=b"\\x01" + bytes(16)
)
from soak.__main__ import main
sys.exit(main(["--seconds", "8", "--seed", "1"]))
"""


@pytest.fixture
def soak(tmp_path):
    """Runs Python on a token of its own, because a soak may leave objects in it."""
    token = make_softhsm(tmp_path / "token", label="soaked")
    environment = os.environ | token.environment

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )

    return run


def test_it_passes_while_faults_come_at_random(soak):
    done = soak(*SOAK)
    summary = done.stdout.splitlines()[-1]
    assert summary.startswith("soak held"), done.stdout + done.stderr[-3000:]
    assert done.returncode == 0


def test_it_can_fail(soak):
    done = soak("-c", BROKEN)
    assert done.returncode != 0
    assert done.stdout.splitlines()[-1].startswith("soak FAILED: import_")
