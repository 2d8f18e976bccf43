"""What an HSM token says of itself after a wrong PIN and after a right one."""

from pathlib import Path

import pytest
from pkcs11.constants import TokenFlag

from hsmwrap.pkcs11.binding.host import ModuleHost
from hsmwrap.pkcs11.binding.returncodes import CryptokiError
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.pkcs11.token.login import flags_of
from hsmwrap.pkcs11.token.pin import Pin
from hsmwrap.pkcs11.token.selection import find_token


def low_counts(settings):
    """CKF_USER_PIN_COUNT_LOW before, after a wrong PIN, after a right one; nothing is logged in."""
    checked = Pkcs11Settings.from_mapping(settings)
    right = Path(settings["pin_file"]).read_text("ascii").strip()
    host = ModuleHost.acquire(checked.module, checked.reserved, checked.traits)
    try:
        with host.inside(5) as (module, _), find_token(module, checked.selector).open() as session:

            def low():
                return TokenFlag.USER_PIN_COUNT_LOW in flags_of(session)

            told = [low()]
            with pytest.raises(CryptokiError, match="PIN_INCORRECT"):
                module.log_in(session, Pin("not-the-pin"))
            told.append(low())
            module.log_in(session, Pin(right))
            told.append(low())
            return told
    finally:
        host.release()
