"""Key sets behind the fault shim, each scenario in a process of its own.

Usage: python -m support.pkcs11.key_set_scenarios SCENARIO SHIM_DIRECTORY SETTINGS SO_PIN_FILE
"""

import json
import sys
from datetime import UTC, datetime, timedelta

from pkcs11.constants import Attribute

from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import HsmError, HsmUnavailable, HsmwrapError
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.pkcs11.keysets.keys import ROLES
from hsmwrap.pkcs11.sessions.connection import Connection
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.testing.faults import CKR
from support.faults.shim import fault_shim

RSA = WrappingKeySpec.RSA_2048, WrappingAlgorithm.RSAES_OAEP_SHA_1


def outcome(call, *arguments, **more):
    try:
        call(*arguments, **more)
    except HsmwrapError as error:
        return type(error)
    return None


def listed(settings):
    return [(each.key_set, each.current) for each in Pkcs11Backend.list_keys(settings)]


def labels(settings):
    """Labels of all keys of this prefix, sorted."""
    start = f"{settings['key_prefix']}:"
    connection = Connection(Pkcs11Settings.from_mapping(settings))
    try:
        found = connection.run(
            lambda pooled: [each[Attribute.LABEL] for each in pooled.session.get_objects()]
        )
    finally:
        connection.close()
    return sorted(label for label in found if label.startswith(start))


def of_set(settings, number):
    return sorted(f"{settings['key_prefix']}:{role}:{number}" for role in ROLES)


def seals_under(settings, key_set):
    with Pkcs11Backend.from_settings(settings) as backend:
        expires = datetime.now(UTC) + timedelta(hours=1)
        sealed = backend.generate_wrapping_key(*RSA, expires_at=expires).private_key.data
        assert int.from_bytes(sealed[2:4], "big") == int(key_set)
        assert backend.mac(b"data").key_set == key_set


# First it is tried whether the HSM token tells where a key is from: with one session key that is
# generated, and five that are created, unwrapped and derived (hsmwrap.pkcs11.keysets.origin).
# Then three keys show which own keys it can use (hsmwrap.pkcs11.keysets.needs).
MAKING = range(5, 5 + len(ROLES))
"""Which calls of C_GenerateKey make a key set."""
RETIRING = range(7, 7 + len(ROLES))
"""Which calls of C_DestroyObject retire one."""


def failed_making(shim, settings, so_pin_file):
    """Whichever key fails to be made, even if only its answer was lost: nothing is kept."""
    for after in (False, True):
        for nth in range(1, MAKING.stop):
            shim.fail("C_GenerateKey", CKR.DEVICE_MEMORY, nth=nth, after=after)
            assert outcome(Pkcs11Backend.initialise_keys, settings, so_pin_file=so_pin_file)
            assert not shim.pending(), nth
            assert labels(settings) == []
    Pkcs11Backend.initialise_keys(settings, so_pin_file=so_pin_file)
    assert labels(settings) == of_set(settings, 1)
    for nth in MAKING:
        shim.fail("C_GenerateKey", CKR.SESSION_HANDLE_INVALID, nth=nth)
        error = outcome(Pkcs11Backend.rotate_keys, settings, so_pin_file=so_pin_file)
        assert error is HsmUnavailable, (nth, error)
        assert labels(settings) == of_set(settings, 1)
        seals_under(settings, "1")
    Pkcs11Backend.rotate_keys(settings, so_pin_file=so_pin_file)
    assert listed(settings) == [("1", False), ("2", True)]
    seals_under(settings, "2")


def failed_making_untrusted(shim, settings, _so_pin_file):
    failed_making(shim, settings, None)


def failed_cleaning_up(shim, settings, _so_pin_file):
    """Objects that a failed rotation left and could not remove do no harm."""
    Pkcs11Backend.initialise_keys(settings)
    shim.fail("C_GenerateKey", CKR.DEVICE_MEMORY, nth=MAKING[3])
    shim.fail("C_DestroyObject", CKR.GENERAL_ERROR, always=True)
    assert outcome(Pkcs11Backend.rotate_keys, settings)
    shim.clear()
    assert len(labels(settings)) == len(ROLES) + 3
    assert listed(settings) == [("1", True), ("2", False)]
    assert "NOT finished" in Pkcs11Backend.list_keys(settings)[1].detail
    seals_under(settings, "1")
    assert Pkcs11Backend.rotate_keys(settings).key_set == "3"
    seals_under(settings, "3")
    Pkcs11Backend.retire_keys(settings, "2")
    assert labels(settings) == sorted(of_set(settings, 1) + of_set(settings, 3))


def partial_retirement(shim, settings, _so_pin_file):
    """It can be called again, and the set is listed until all of it is gone."""
    Pkcs11Backend.initialise_keys(settings)
    Pkcs11Backend.rotate_keys(settings)
    for nth in RETIRING:
        shim.fail("C_DestroyObject", CKR.TEMPLATE_INCONSISTENT, nth=nth)
        error = outcome(Pkcs11Backend.retire_keys, settings, "1")
        if not shim.pending():
            assert error is HsmError, (nth, error)
            assert f"{settings['key_prefix']}:mac:1" in labels(settings)
            assert listed(settings) == [("1", False), ("2", True)]
        shim.clear()
    assert outcome(Pkcs11Backend.retire_keys, settings, "1") is None or listed(settings) == [
        ("2", True)
    ]
    assert labels(settings) == of_set(settings, 2)


def faults_while_reading(shim, settings, _so_pin_file):
    """python-pkcs11 makes every code of C_GetAttributeValue FUNCTION_FAILED (field note 33)."""
    Pkcs11Backend.initialise_keys(settings)
    for code in (CKR.SESSION_HANDLE_INVALID, CKR.DEVICE_ERROR):
        for nth in range(1, 13):
            shim.fail("C_GetAttributeValue", code, nth=nth)
            assert listed(settings) == [("1", True)], nth
            assert not shim.pending(), nth
    expires = datetime.now(UTC) + timedelta(hours=1)
    with Pkcs11Backend.from_settings(settings) as backend:
        backend.capabilities()
        for nth in range(1, 13):
            backend.mac(b"data")  # a session that knows the MAC key
            shim.fail("C_GetAttributeValue", CKR.SESSION_HANDLE_INVALID, nth=nth)
            error = outcome(backend.generate_wrapping_key, *RSA, expires_at=expires)
            assert error in {None, HsmUnavailable}, (nth, error)
            shim.clear()


if __name__ == "__main__":
    directory, arguments = sys.argv[2], json.loads(sys.argv[3])
    shim = fault_shim(arguments["module"], directory)
    globals()[sys.argv[1]](shim, arguments | {"module": str(shim.path)}, sys.argv[4])
