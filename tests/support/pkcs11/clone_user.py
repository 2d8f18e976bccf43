"""What was made on another HSM token is used: in a process of its own, which knows one token only.

Usage: python -m support.pkcs11.clone_user seal|use FILE

FILE is JSON: the settings, and what was sealed.
"""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from hsmwrap.backend import KeyRef, Mac, PrivateKeyRef
from hsmwrap.catalog import KeySpec, ProtectionLevel, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.customer import encrypt_key_material
from hsmwrap.imports import Cmk, ImportService
from hsmwrap.policy import Deployment
from hsmwrap.registry import open_backend

OAEP1 = WrappingAlgorithm.RSAES_OAEP_SHA_1
MATERIAL = bytes(range(32))
CMK = Cmk("key-1", KeySpec.ALIYUN_AES_256, ProtectionLevel.HSM)


def sealed_by(token, prefix):
    """What this process seals on a token; see :func:`seal`."""
    with open_backend("pkcs11", token.bare_settings(key_prefix=prefix)) as backend:
        return seal(backend)


def sealed_on(token, prefix, directory):
    """The same by a process of its own."""
    done = _run("seal", token, prefix, {}, directory)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def used_on(token, prefix, sealed, directory):
    """The ended process that used it on another token."""
    return _run("use", token, prefix, sealed, directory)


def _run(do, token, prefix, asked, directory):
    file = directory / "asked"
    file.write_text(json.dumps(asked | {"settings": token.bare_settings(key_prefix=prefix)}))
    return subprocess.run(
        [sys.executable, "-m", __name__, do, str(file)],
        env=os.environ | token.environment,
        capture_output=True,
        text=True,
        check=False,
    )


def seal(backend):
    """A key, a message, a wrapping key, a ciphertext, a MAC; and an import token with another."""
    wrapping = backend.generate_wrapping_key(
        WrappingKeySpec.RSA_2048, OAEP1, expires_at=datetime.now(UTC) + timedelta(hours=1)
    )
    ciphertext = encrypt_key_material(OAEP1, wrapping.public_key, MATERIAL)
    imported = backend.unwrap_material(
        wrapping.private_key, OAEP1, ciphertext, key_spec=KeySpec.ALIYUN_AES_256
    )
    mac = backend.mac(b"claims")
    parameters = _service(backend).get_parameters_for_import(CMK, "RSA_2048", OAEP1)
    return {
        "key": imported.key.to_bytes().hex(),
        "message": backend.encrypt(imported.key, b"message").hex(),
        "custody": str(wrapping.private_key.custody),
        "private_key": wrapping.private_key.data.hex(),
        "algorithm": str(OAEP1),
        "ciphertext": ciphertext.hex(),
        "key_set": mac.key_set,
        "tag": mac.tag.hex(),
        "import_token": parameters.import_token.hex(),
        "encrypted": encrypt_key_material(OAEP1, parameters.public_key, MATERIAL).hex(),
    }


def use(backend, asked):
    """The decrypted message, and the check value of both imports; in hexadecimal."""
    sealed = {name: bytes.fromhex(asked[name]) for name in ("tag", "key", "message", "private_key")}
    backend.verify_mac(b"claims", Mac(asked["key_set"], sealed["tag"]))
    message = backend.decrypt(KeyRef.from_bytes(sealed["key"]), sealed["message"])
    unwrapped = backend.unwrap_material(
        PrivateKeyRef(asked["custody"], sealed["private_key"]),
        asked["algorithm"],
        bytes.fromhex(asked["ciphertext"]),
        key_spec=KeySpec.ALIYUN_AES_256,
    )
    encrypted, import_token = (bytes.fromhex(asked[name]) for name in ("encrypted", "import_token"))
    imported = _service(backend).import_key_material(CMK, encrypted, import_token).imported
    for each in (unwrapped, imported):
        assert backend.decrypt(each.key, backend.encrypt(each.key, b"again")) == b"again"
    assert imported.check_value == unwrapped.check_value
    return {"message": message.hex(), "check_value": imported.check_value.hex()}


def _service(backend):
    return ImportService({ProtectionLevel.HSM: backend}, Deployment())


def main(do, file):
    asked = json.loads(Path(file).read_text())
    with open_backend("pkcs11", asked["settings"]) as backend:
        print(json.dumps(seal(backend) if do == "seal" else use(backend, asked)))


if __name__ == "__main__":
    main(*sys.argv[1:])
