"""Imports by SM2PKE into an HSM that has SM2 and SM4 of its vendor's, and no AES (played).

As a forked process (:mod:`support.forked`): import a key and encrypt by it, or decrypt by it.
"""

import json
from dataclasses import replace

from hsmwrap.backend import KeyRef
from hsmwrap.catalog import WrappingKeySpec
from hsmwrap.registry import open_backend
from hsmwrap.sm2 import decode_spki, open_engine
from hsmwrap.testing._conformance.base import tomorrow
from support.importing import MATERIAL, SM2PKE, SM4
from support.pkcs11.vendors import SM_ONLY, R, with_keys

WITH_RSA = replace(SM_ONLY, restrictions=R.NO_AES)
WITH_AES = replace(SM_ONLY, restrictions=R(0))


def played(shim, directory, softhsm, prefix, sm4=None, *, trusted=True, hsm=SM_ONLY):
    """Settings for the HSM, with a key set; ``sm4``: another such table of the profile."""
    simulated = hsm if sm4 is None else replace(hsm, sm4=sm4)
    settings = simulated.play(shim, directory, softhsm, key_prefix=f"sm-{prefix}")
    return with_keys(settings, softhsm, trusted=trusted)


def issue(backend):
    return backend.generate_wrapping_key(WrappingKeySpec.EC_SM2, SM2PKE, expires_at=tomorrow())


def bring(backend, key, material=MATERIAL[SM4], key_spec=SM4, **more):
    """Import material as a client does."""
    public = decode_spki(key.public_key)
    ciphertext = open_engine("libcrypto").encrypt(public, material).to_c1c3c2()
    return backend.unwrap_material(key.private_key, SM2PKE, ciphertext, key_spec=key_spec, **more)


def perform(settings, key=None, message=None):
    with open_backend("pkcs11", settings) as backend:
        if key is None:
            made = bring(backend, issue(backend)).key
            found = made.to_bytes(), backend.encrypt(made, b"message")
            print(json.dumps([each.hex() for each in found]))
        else:
            reference = KeyRef.from_bytes(bytes.fromhex(key))
            assert backend.decrypt(reference, bytes.fromhex(message)) == b"message"
