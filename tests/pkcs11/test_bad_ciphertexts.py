"""Bad ciphertexts behind the fault shim: the same work whatever is wrong, no session lost."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.pkcs11 import ciphertext_scenarios

SOURCE = Path(ciphertext_scenarios.__file__).read_text("utf-8")
NAMES = re.findall(r"^def (\w+)\(shim, settings\):", SOURCE, re.MULTILINE)


@pytest.mark.parametrize("scenario", NAMES)
def test_scenario(softhsm, tmp_path, scenario):
    module, shim = ciphertext_scenarios.__name__, tmp_path / "shim"
    settings = json.dumps(softhsm.settings("ciphertexts"))
    done = subprocess.run(
        [sys.executable, "-m", module, scenario, shim, settings],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
