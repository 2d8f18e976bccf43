"""Scenarios behind the fault shim: functions of a module, each run in a process of its own."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from support.faults.shim import fault_shim

DEADLINE = 120


def names_of(module):
    """The names of the scenarios, in their order."""
    source = Path(module.__file__).read_text("utf-8")
    return re.findall(r"^def (\w+)\(shim, settings\):", source, re.MULTILINE)


def run(module, scenario, directory, settings, **environment):
    """Run a scenario; its traceback is in the failure."""
    arguments = [scenario, directory / "shim", json.dumps(settings)]
    done = subprocess.run(
        [sys.executable, "-m", module.__name__, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def main(scenarios):
    """What such a module runs: SCENARIO SHIM_DIRECTORY SETTINGS."""
    settings = json.loads(sys.argv[3])
    shim = fault_shim(settings["module"], sys.argv[2])
    with contextlib.suppress(BrokenPipeError):
        scenarios[sys.argv[1]](shim, settings | {"module": str(shim.path)})
