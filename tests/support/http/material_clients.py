"""Encryption of key material as in the SDKs' documentation, with independent libraries."""

from __future__ import annotations

import importlib
from functools import partial

import pytest

from hsmwrap.catalog import WrappingAlgorithm
from hsmwrap.testing.clients import gmssl_encrypt, openssl_encrypt, pyca_encrypt

pyca_pkcs1 = partial(pyca_encrypt, WrappingAlgorithm.RSAES_PKCS1_V1_5)
pyca_oaep_sha1 = partial(pyca_encrypt, WrappingAlgorithm.RSAES_OAEP_SHA_1)
pyca_oaep_sha256 = partial(pyca_encrypt, WrappingAlgorithm.RSAES_OAEP_SHA_256)
gmssl_sm2 = partial(gmssl_encrypt, WrappingAlgorithm.SM2PKE)
openssl_sm2 = partial(openssl_encrypt, WrappingAlgorithm.SM2PKE)


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


def gmssl_sm2_with_04(public_key: bytes, material: bytes) -> bytes:
    return b"\x04" + gmssl_sm2(public_key, material)
