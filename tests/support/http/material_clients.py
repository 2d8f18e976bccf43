"""Encryption of key material as in the SDKs' documentation, with independent libraries."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.serialization import load_der_public_key


def pyca_pkcs1(public_key: bytes, material: bytes) -> bytes:
    return load_der_public_key(public_key).encrypt(material, padding.PKCS1v15())


def pyca_oaep_sha1(public_key: bytes, material: bytes) -> bytes:
    return _pyca_oaep(public_key, material, hashes.SHA1())


def pyca_oaep_sha256(public_key: bytes, material: bytes) -> bytes:
    return _pyca_oaep(public_key, material, hashes.SHA256())


def _pyca_oaep(public_key: bytes, material: bytes, digest: hashes.HashAlgorithm) -> bytes:
    oaep = padding.OAEP(mgf=padding.MGF1(digest), algorithm=digest, label=None)
    return load_der_public_key(public_key).encrypt(material, oaep)


def pycryptodome_pkcs1(public_key: bytes, material: bytes) -> bytes:
    rsa = pytest.importorskip("Crypto.PublicKey.RSA")
    from Crypto.Cipher import PKCS1_v1_5

    return PKCS1_v1_5.new(rsa.import_key(public_key)).encrypt(material)


def pycryptodome_oaep_sha1(public_key: bytes, material: bytes) -> bytes:
    return _pycryptodome_oaep(public_key, material, "SHA1")


def pycryptodome_oaep_sha256(public_key: bytes, material: bytes) -> bytes:
    return _pycryptodome_oaep(public_key, material, "SHA256")


def _pycryptodome_oaep(public_key: bytes, material: bytes, digest: str) -> bytes:
    rsa = pytest.importorskip("Crypto.PublicKey.RSA")
    from Crypto.Cipher import PKCS1_OAEP

    module = importlib.import_module(f"Crypto.Hash.{digest}")
    return PKCS1_OAEP.new(rsa.import_key(public_key), hashAlgo=module).encrypt(material)


def gmssl_sm2(public_key: bytes, material: bytes) -> bytes:
    """C1C3C2 without the leading 04; the point is the last 64 bytes of the 91."""
    sm2 = pytest.importorskip("gmssl.sm2")
    client = sm2.CryptSM2(private_key="", public_key="", mode=1)
    # Not by the constructor: it takes a leading 04 for a format byte and strips all 0s and 4s.
    client.public_key = public_key[-64:].hex()
    return client.encrypt(material)


def gmssl_sm2_with_04(public_key: bytes, material: bytes) -> bytes:
    return b"\x04" + gmssl_sm2(public_key, material)


def openssl_sm2(public_key: bytes, material: bytes) -> bytes:
    """DER, as in GM/T 0009."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    command = ["openssl", "pkeyutl", "-encrypt", "-pubin", "-keyform", "DER", "-inkey"]
    with tempfile.TemporaryDirectory() as directory:
        key = Path(directory, "wrapping.der")
        key.write_bytes(public_key)
        return subprocess.run(
            [*command, key], input=material, capture_output=True, check=True
        ).stdout
