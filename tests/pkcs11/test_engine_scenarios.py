"""The engine behind the fault shim: outages, logins, leftovers, the probe, closing, secrets."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCENARIOS = Path(__file__).with_name("engine_scenarios.py")
NAMES = re.findall(r"^def (\w+)\(shim, settings\):", SCENARIOS.read_text("utf-8"), re.MULTILINE)
DEADLINE = 120


@pytest.mark.parametrize("scenario", NAMES)
def test_scenario(softhsm, tmp_path, scenario):
    settings = softhsm.settings("engine", initial_backoff=0.05, max_backoff=0.1)
    command = [sys.executable, SCENARIOS, scenario, tmp_path / "shim", json.dumps(settings)]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
