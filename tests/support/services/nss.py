"""NSS softokn as an HSM token: a database in a directory, reached by pReserved of C_Initialize."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from pkcs11.exceptions import PKCS11Error

from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.pkcs11.binding.host import ModuleHost
from support.fast import needs_service

LABEL = "NSS Certificate DB"
FIPS_LABEL = "NSS FIPS 140-2 Certificate DB"
_FIPS_MODE = """
unsigned long FC_GetFunctionList(void *);
unsigned long C_GetFunctionList(void *list) { return FC_GetFunctionList(list); }
"""
NO_NSS = "capability: NSS softokn is not installed"
_PIN = "A temporary PIN 1"  # FIPS mode wants three kinds of characters
_PLACES = ("lib/*/libsoftokn3.so", "lib/*/nss/libsoftokn3.so", "lib64/libsoftokn3.so")


@dataclass(frozen=True)
class Nss:
    """A fresh database with a PIN."""

    module: str
    parameters: str
    pin_file: Path
    label: str = LABEL

    def settings(self, prefix="hsmwrap", **more):
        return {
            "module": self.module,
            "library_parameters": self.parameters,
            "token_label": self.label,
            "pin_file": str(self.pin_file),
            "key_prefix": prefix,
            **more,
        }

    def settings_with_keys(self, prefix, **more):
        """Settings for a backend with keys of its own; NSS's officer cannot help."""
        settings = self.settings(prefix, **more)
        if not Pkcs11Backend.list_keys(settings):
            Pkcs11Backend.initialise_keys(settings)
        return settings


def find_module():
    """Path of libsoftokn3.so, or None."""
    found = (path for place in _PLACES for path in sorted(Path("/usr").glob(place)))
    return next(map(str, found), None)


def make_nss(directory: Path, *, fips=False) -> Nss:
    """A fresh token in ``directory``, in FIPS mode or not; skips without NSS."""
    needs_service()
    # Otherwise 10,000 rounds for each private attribute of each object; NSS's own tests set it too.
    os.environ["NSS_MAX_MP_PBE_ITERATION_COUNT"] = "1"
    module = find_module()
    if module is None:
        pytest.skip(NO_NSS)
    label = FIPS_LABEL if fips else LABEL
    if fips:
        module = _in_fips_mode(module, directory)
    parameters = f"configdir='sql:{directory}' certPrefix='' keyPrefix='' secmod='' flags=noModDB"
    pin_file = directory / "pin"
    pin_file.write_text(_PIN)
    pin_file.chmod(0o400)
    _set_first_pin(module, parameters, label)
    return Nss(module, parameters, pin_file, label)


def _in_fips_mode(module, directory):
    """A module whose function list is softokn's for FIPS mode, which has a symbol of its own."""
    source, library = directory / "fips.c", directory / "fips.so"
    source.write_text(_FIPS_MODE)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, module], check=True)
    return str(library)


def _set_first_pin(module, parameters, label):
    # A new database has an empty security officer's PIN, until the user's is set.
    host = ModuleHost.acquire(module, parameters)
    try:
        with host.inside(5) as (library, _):
            token = library.get_token(token_label=label)
            with token.open(rw=True, so_pin="") as session:
                session.init_pin(_PIN)
    except PKCS11Error as error:
        pytest.fail(f"NSS takes no first PIN: {error!r}")
    finally:
        host.release()
