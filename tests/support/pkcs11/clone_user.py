"""Uses what was made on another HSM token: in a process of its own, which knows one token only.

Usage: python -m support.pkcs11.clone_user FILE, which is JSON: settings and what was sealed
"""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from hsmwrap.backend import KeyRef, Mac, PrivateKeyRef
from hsmwrap.catalog import KeySpec, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.customer import encrypt_key_material
from hsmwrap.registry import open_backend

OAEP1 = WrappingAlgorithm.RSAES_OAEP_SHA_1
MATERIAL = bytes(range(32))


def sealed_by(token, prefix):
    """What this process seals on a token: a key, a message, a wrapping key, a ciphertext, a MAC."""
    with open_backend("pkcs11", token.bare_settings(key_prefix=prefix)) as backend:
        wrapping = backend.generate_wrapping_key(
            WrappingKeySpec.RSA_2048, OAEP1, expires_at=datetime.now(UTC) + timedelta(hours=1)
        )
        ciphertext = encrypt_key_material(OAEP1, wrapping.public_key, MATERIAL)
        imported = backend.unwrap_material(
            wrapping.private_key, OAEP1, ciphertext, key_spec=KeySpec.ALIYUN_AES_256
        )
        mac = backend.mac(b"claims")
        return {
            "key": imported.key.to_bytes().hex(),
            "message": backend.encrypt(imported.key, b"message").hex(),
            "custody": str(wrapping.private_key.custody),
            "private_key": wrapping.private_key.data.hex(),
            "algorithm": str(OAEP1),
            "ciphertext": ciphertext.hex(),
            "key_set": mac.key_set,
            "tag": mac.tag.hex(),
        }


def used_on(token, prefix, sealed, directory):
    """The ended process that used it on another token."""
    file = directory / "asked"
    file.write_text(json.dumps(sealed | {"settings": token.bare_settings(key_prefix=prefix)}))
    return subprocess.run(
        [sys.executable, "-m", __name__, str(file)],
        env=os.environ | token.environment,
        capture_output=True,
        text=True,
        check=False,
    )


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
