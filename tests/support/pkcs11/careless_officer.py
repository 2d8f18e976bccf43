"""Makes a trusted key-encryption key as a careless security officer would, in a process of its own.

It pins what it unwraps as this backend's keys do, but wraps whatever a trusted key may.
"""

import os
import sys
from pathlib import Path

import pkcs11
from pkcs11.constants import Attribute, MechanismFlag
from pkcs11.mechanisms import KeyType

from hsmwrap.pkcs11.binding.templates import HsmAttributeMapper, NestedTemplate
from hsmwrap.pkcs11.keysets.keys import UNWRAPPED, Role
from hsmwrap.pkcs11.keysets.movability import ONLY_UNDER_TRUSTED


def main(label):
    token = pkcs11.lib(os.environ["HSMWRAP_PKCS11_MODULE"]).get_token(
        token_label=os.environ["HSMWRAP_TOKEN_LABEL"]
    )
    so_pin = Path(os.environ["HSMWRAP_SO_PIN_FILE"]).read_text().strip()
    becomes = UNWRAPPED[Role.MATERIAL_AES] | ONLY_UNDER_TRUSTED
    pinned = {name: value for name, value in becomes.items() if name is not Attribute.TOKEN}
    with token.open(rw=True, so_pin=so_pin, attribute_mapper=HsmAttributeMapper()) as session:
        session.generate_key(
            KeyType.AES,
            256,
            id=label.encode(),
            label=label,
            store=True,
            capabilities=MechanismFlag.WRAP | MechanismFlag.UNWRAP,
            template={
                Attribute.PRIVATE: False,
                Attribute.TRUSTED: True,
                Attribute.UNWRAP_TEMPLATE: NestedTemplate(pinned),
            },
        )


if __name__ == "__main__":
    main(sys.argv[1])
