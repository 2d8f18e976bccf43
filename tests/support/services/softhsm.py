"""The private SoftHSM token of a test session, and key sets on it under prefixes of their own."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
VARIABLES = ("SOFTHSM2_CONF", "HSMWRAP_PKCS11_MODULE", "HSMWRAP_PIN_FILE", "HSMWRAP_SO_PIN_FILE")
NO_SOFTHSM = "capability: SoftHSM2 is not installed"


@dataclass
class SoftHsm:
    """A token made by softhsm/init-token; this process's environment points to it."""

    environment: dict[str, str]
    initialised: set[str] = field(default_factory=set)

    @property
    def module(self) -> str:
        return self.environment["HSMWRAP_PKCS11_MODULE"]

    @property
    def directory(self) -> Path:
        return Path(self.environment["SOFTHSM2_CONF"]).parent

    def bare_settings(self, **more):
        """Settings for the token, whatever keys are on it."""
        return {
            "module": self.module,
            "token_label": self.environment["HSMWRAP_TOKEN_LABEL"],
            "pin_file": self.environment["HSMWRAP_PIN_FILE"],
            **more,
        }

    def settings(self, prefix="hsmwrap", *, trusted=True, **more):
        """Settings for a backend with keys of its own, made by `hsmwrap keys init` elsewhere.

        In another process: the security officer cannot log in where a user is.
        """
        if prefix not in self.initialised:
            self.run_keys("init", prefix, trusted=trusted)
            self.initialised.add(prefix)
        return self.bare_settings(key_prefix=prefix, **more)

    def run_keys(self, action, prefix, *arguments, trusted=True):
        environment = os.environ | self.environment
        if not trusted:
            environment.pop("HSMWRAP_SO_PIN_FILE")
        command = [sys.executable, "-m", "hsmwrap.cli", "keys", action, *arguments]
        done = subprocess.run(
            [*command, "--key-prefix", prefix, "--json"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


def make_softhsm(directory: Path, label="hsmwrap-tests") -> SoftHsm:
    """A fresh token in ``directory``; skips where there is no SoftHSM2."""
    environment = os.environ | {"HSMWRAP_TOKEN_DIR": str(directory), "HSMWRAP_TOKEN_LABEL": label}
    done = subprocess.run(
        [ROOT / "softhsm" / "init-token", "env", "-0"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if "no libsofthsm2.so" in done.stderr:
        pytest.skip(NO_SOFTHSM)
    assert done.returncode == 0, done.stderr
    made = dict(line.split("=", 1) for line in done.stdout.split("\0") if line)
    names = (*VARIABLES, "HSMWRAP_TOKEN_LABEL", "HSMWRAP_TOKEN_DIR")
    return SoftHsm({name: made[name] for name in names})
