"""Keys move while two processes use them and import more; `scripts/soak moves`: 10,000 keys."""

import json
import os
import subprocess
import sys

from support.services.softhsm import make_softhsm

SOAK = ["-m", "soak", "moves", "--keys", "30", "--lifetime", "0", "--pause", "0.1"]


def test_no_call_fails_and_no_key_is_left_behind(tmp_path):
    token = make_softhsm(tmp_path / "token")
    run = subprocess.run(
        [sys.executable, *SOAK],
        env=os.environ | token.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    done = json.loads(run.stdout)
    assert (done["failures"], done["failed calls"]) == ([], 0)
    imported = done["calls"]["ImportKeyMaterial"]
    assert done["keys"] == 30 + imported
    assert imported > 0
    assert done["calls"]["Decrypt"] > 30
