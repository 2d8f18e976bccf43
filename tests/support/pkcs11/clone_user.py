"""Uses what was made on another HSM token: in a process of its own, which knows one token only.

Usage: python -m support.pkcs11.clone_user FILE, which is JSON: settings and what was sealed
"""

import json
import sys
from pathlib import Path

from hsmwrap.backend import KeyRef, Mac, PrivateKeyRef
from hsmwrap.catalog import KeySpec
from hsmwrap.registry import open_backend


def main(file):
    """Prints the decrypted message, and the check value of the import; both in hexadecimal."""
    asked = json.loads(Path(file).read_text())
    with open_backend("pkcs11", asked["settings"]) as backend:
        backend.verify_mac(b"claims", Mac(asked["key_set"], bytes.fromhex(asked["tag"])))
        key = KeyRef.from_bytes(bytes.fromhex(asked["key"]))
        message = backend.decrypt(key, bytes.fromhex(asked["message"]))
        imported = backend.unwrap_material(
            PrivateKeyRef(asked["custody"], bytes.fromhex(asked["private_key"])),
            asked["algorithm"],
            bytes.fromhex(asked["ciphertext"]),
            key_spec=KeySpec.ALIYUN_AES_256,
        )
        again = backend.encrypt(imported.key, b"again")
        assert backend.decrypt(imported.key, again) == b"again"
    print(json.dumps({"message": message.hex(), "check_value": imported.check_value.hex()}))


if __name__ == "__main__":
    main(sys.argv[1])
