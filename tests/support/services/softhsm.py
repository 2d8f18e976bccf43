"""Tokens beside that of the session, which is the fixture ``hsmwrap_softhsm``."""

from pathlib import Path

import pytest
from pkcs11.constants import Attribute

from hsmwrap.pkcs11.binding.host import ModuleHost
from hsmwrap.pkcs11.token.pin import Pin
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


def destroy_imported(token: SoftHsm):
    """Destroy wrapping keys and imported keys; key sets stay.

    SoftHSM reads the file of each object at each search. Hundreds that earlier tests left make
    each of the later ones slower.
    """
    host = ModuleHost.acquire(token.module)
    try:
        with host.inside(5) as (module, _):
            label = token.environment["HSMWRAP_TOKEN_LABEL"]
            with module.get_token(token_label=label).open(rw=True) as session:
                pin = Path(token.environment["HSMWRAP_PIN_FILE"]).read_text().strip()
                module.log_in(session, Pin(pin))
                for key in list(session.get_objects({Attribute.TOKEN: True})):
                    if not _is_of_a_key_set(key):
                        key.destroy()
    finally:
        host.release()


def _is_of_a_key_set(key):
    """The id of such a key begins with its label; other ids are random."""
    try:
        return key[Attribute.ID].startswith(key[Attribute.LABEL].encode())
    except UnicodeDecodeError:  # a label that a test planted
        return False
