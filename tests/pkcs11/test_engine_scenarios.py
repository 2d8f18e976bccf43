"""The engine behind the fault shim: outages, logins, leftovers, the probe, closing, secrets."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.pkcs11 import engine_scenarios

SCENARIOS = "support.pkcs11.engine_scenarios"
SOURCE = Path(engine_scenarios.__file__).read_text("utf-8")
NAMES = re.findall(r"^def (\w+)\(shim, settings\):", SOURCE, re.MULTILINE)
DEADLINE = 120


@pytest.mark.parametrize("scenario", NAMES)
def test_scenario(softhsm, tmp_path, scenario):
    settings = softhsm.settings("engine", initial_backoff=0.05, max_backoff=0.1)
    command = [sys.executable, "-m", SCENARIOS, scenario, tmp_path / "shim", json.dumps(settings)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
