"""NSS softokn as an HSM token: a database in a directory, reached by pReserved of C_Initialize."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from pkcs11.exceptions import PKCS11Error

from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.pkcs11.binding.host import ModuleHost
from support.fast import needs_service

LABEL = "NSS Certificate DB"
NO_NSS = "capability: NSS softokn is not installed"
_PIN = "a temporary PIN"
_PLACES = ("lib/*/libsoftokn3.so", "lib/*/nss/libsoftokn3.so", "lib64/libsoftokn3.so")


@dataclass(frozen=True)
class Nss:
    """A fresh database with a PIN."""

    module: str
    parameters: str
    pin_file: Path

    def settings(self, prefix="hsmwrap", **more):
        return {
            "module": self.module,
            "library_parameters": self.parameters,
            "token_label": LABEL,
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


def make_nss(directory: Path) -> Nss:
    """A fresh token in ``directory``; skips without NSS."""
    needs_service()
    module = find_module()
    if module is None:
        pytest.skip(NO_NSS)
    parameters = f"configdir='sql:{directory}' certPrefix='' keyPrefix='' secmod='' flags=noModDB"
    pin_file = directory / "pin"
    pin_file.write_text(_PIN)
    pin_file.chmod(0o400)
    _set_first_pin(module, parameters)
    return Nss(module, parameters, pin_file)


def _set_first_pin(module, parameters):
    # A new database has an empty security officer's PIN, until the user's is set.
    host = ModuleHost.acquire(module, parameters)
    try:
        with host.inside(5) as (library, _):
            token = library.get_token(token_label=LABEL)
            with token.open(rw=True, so_pin="") as session:
                session.init_pin(_PIN)
    except PKCS11Error as error:
        pytest.fail(f"NSS takes no first PIN: {error!r}")
    finally:
        host.release()
