"""Makes trusted keys as a security officer would, in a process of its own.

Usage: python -m support.pkcs11.careless_officer LABEL KIND; the kinds are those of KINDS
"""

import os
import sys
from pathlib import Path

import pkcs11
from pkcs11.constants import Attribute
from pkcs11.mechanisms import KeyType

from hsmwrap.pkcs11.binding.templates import HsmAttributeMapper, NestedTemplate, secret_key
from hsmwrap.pkcs11.keysets.backup import backup_key_template
from hsmwrap.pkcs11.keysets.keys import EVERYTHING, UNWRAPPED, Role
from hsmwrap.pkcs11.keysets.movability import ONLY_UNDER_TRUSTED

BACKUP_KEY = bytes(range(64, 96))
"""The value of every key."""


def _careless_kek():
    """It pins what it unwraps as this backend's keys do, but wraps whatever a trusted key may."""
    becomes = UNWRAPPED[Role.MATERIAL_AES] | ONLY_UNDER_TRUSTED
    pinned = {name: value for name, value in becomes.items() if name is not Attribute.TOKEN}
    return {
        **secret_key(KeyType.AES, Attribute.WRAP, Attribute.UNWRAP),
        Attribute.UNWRAP_TEMPLATE: NestedTemplate(pinned),
    }


def _careless_backup_key():
    """It does what such a key is for, and more."""
    uses = (Attribute.WRAP, Attribute.UNWRAP, Attribute.ENCRYPT, Attribute.DECRYPT)
    return secret_key(KeyType.AES, *uses)


KINDS = {
    "kek": _careless_kek,
    "backup": _careless_backup_key,
    # The backend's own, but that it stays in the HSM token.
    "backup-wrap": lambda: backup_key_template(Attribute.WRAP, EVERYTHING),
    "backup-unwrap": lambda: backup_key_template(Attribute.UNWRAP, EVERYTHING),
}


def main(label, kind):
    token = pkcs11.lib(os.environ["HSMWRAP_PKCS11_MODULE"]).get_token(
        token_label=os.environ["HSMWRAP_TOKEN_LABEL"]
    )
    so_pin = Path(os.environ["HSMWRAP_SO_PIN_FILE"]).read_text().strip()
    with token.open(rw=True, so_pin=so_pin, attribute_mapper=HsmAttributeMapper()) as session:
        template = {
            **KINDS[kind](),
            Attribute.TOKEN: True,
            Attribute.PRIVATE: False,
            Attribute.TRUSTED: True,
            Attribute.ID: label.encode(),
            Attribute.LABEL: label,
            Attribute.VALUE: BACKUP_KEY,
        }
        session.create_object(template)


if __name__ == "__main__":
    main(*sys.argv[1:])
