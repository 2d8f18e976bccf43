"""Imports by RSA-OAEP into an HSM with SM4 of its vendor's (played), and what its report says."""

from hsmwrap import registry
from hsmwrap.catalog import WrappingKeySpec
from hsmwrap.testing._conformance.base import tomorrow
from hsmwrap.testing.clients import pyca_encrypt
from support.importing import MATERIAL, OAEP1, SM4


def issue(backend):
    return backend.generate_wrapping_key(WrappingKeySpec.RSA_2048, OAEP1, expires_at=tomorrow())


def bring(backend, key, material=MATERIAL[SM4]):
    ciphertext = pyca_encrypt(OAEP1, key.public_key, material)
    return backend.unwrap_material(key.private_key, OAEP1, ciphertext, key_spec=SM4)


def told(report):
    return " ".join([*report.notes, *(f"{t.step}: {t.consequence}" for t in report.failed)])


def report_of(settings):
    with registry.open_backend("pkcs11", settings) as opened:
        report = opened.capabilities()
        if report.key_for(SM4).usable:
            key = bring(opened, issue(opened)).key
            assert opened.decrypt(key, opened.encrypt(key, b"message")) == b"message"
        return report
