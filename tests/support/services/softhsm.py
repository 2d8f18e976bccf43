"""Tokens beside that of the session, which is the fixture ``hsmwrap_softhsm``."""

from pathlib import Path

import pytest

from hsmwrap.testing.softhsm import SoftHsm, SoftHsmNotInstalledError
from pytest_hsmwrap import NOT_INSTALLED
from support.fast import needs_service

ROOT = Path(__file__).resolve().parents[3]


def make_softhsm(directory: Path, label="hsmwrap-tests") -> SoftHsm:
    """A fresh token in ``directory``; skips without SoftHSM2."""
    needs_service()
    try:
        return SoftHsm.make(directory, label)
    except SoftHsmNotInstalledError:
        pytest.skip(NOT_INSTALLED)


def two_slots(directory):
    """Two tokens of one module, with PINs of their own."""
    tokens = []
    for label in ("first", "second"):
        made = SoftHsm.make(directory, label)
        for name in ("HSMWRAP_PIN_FILE", "HSMWRAP_SO_PIN_FILE"):
            file = Path(made.environment[name])
            made.environment[name] = str(file.rename(directory / f"{label}-{file.name}"))
        tokens.append(made)
    return tokens
