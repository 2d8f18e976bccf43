"""tpm2-pkcs11 on a TPM in software (swtpm), with a token and a PIN."""

import os
import shutil
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.fast import needs_service

NO_TPM2 = "capability: tpm2-pkcs11 and swtpm are not installed"
LABEL = "tpm"
_PIN, _SO_PIN = "usersecret", "sosecret"
_PLACES = ("lib/*/libtpm2_pkcs11.so.1", "lib/*/pkcs11/libtpm2_pkcs11.so")
_PROGRAMS = ("swtpm", "tpm2_ptool", "tpm2_flushcontext")
_START = 20
# A TPM has room for three transient objects, and without a resource manager nothing frees them.
_FLUSHING = '#!/bin/sh\n"{program}" "$@"\nstatus=$?\ntpm2_flushcontext -t >&2\nexit $status\n'


@dataclass(frozen=True)
class Tpm2:
    """A fresh token."""

    module: str
    pin_file: Path

    def settings(self, **more):
        return {
            "module": self.module,
            "token_label": LABEL,
            "pin_file": str(self.pin_file),
            **more,
        }


def find_module():
    """Path of the module, or None."""
    found = (path for place in _PLACES for path in sorted(Path("/usr").glob(place)))
    return next(map(str, found), None)


@contextmanager
def tpm2(directory, monkeypatch):
    """A token in ``directory``, with its TPM running; skips where it is not installed."""
    needs_service()
    module = find_module()
    if module is None or not all(map(shutil.which, _PROGRAMS)):
        pytest.skip(NO_TPM2)
    socket, store, tools = (directory / name for name in ("socket", "store", "tools"))
    for each in (directory / "state", store, tools):
        each.mkdir()
    process = subprocess.Popen(
        [
            *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={directory / 'state'}"),
            *("--server", f"type=unixio,path={socket}"),
            *("--ctrl", f"type=unixio,path={socket}.ctrl"),
            *("--flags", "not-need-init,startup-clear"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + _START
        while not (socket.exists() and Path(f"{socket}.ctrl").exists()):
            assert time.monotonic() < end, "swtpm does not start"
            time.sleep(0.05)
        for name in ("TPM2_PKCS11_TCTI", "TPM2TOOLS_TCTI"):
            monkeypatch.setenv(name, f"swtpm:path={socket}")
        monkeypatch.setenv("TPM2_PKCS11_STORE", str(store))
        _make_token(store, tools)
        pin_file = directory / "pin"
        pin_file.write_text(_PIN)
        pin_file.chmod(0o400)
        yield Tpm2(module, pin_file)
    finally:
        process.terminate()
        process.wait(_START)


def _make_token(store, tools):
    for program in Path("/usr/bin").glob("tpm2_*"):
        if program.name not in {"tpm2_ptool", "tpm2_flushcontext"}:
            flushing = tools / program.name
            flushing.write_text(_FLUSHING.format(program=program))
            flushing.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    pins = (f"--sopin={_SO_PIN}", f"--userpin={_PIN}")
    for arguments in (["init"], ["addtoken", "--pid=1", f"--label={LABEL}", *pins]):
        done = subprocess.run(
            ["/usr/bin/tpm2_ptool", *arguments, f"--path={store}"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
