"""The import service over real backends, with a settable clock and an independent client."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import pytest

from hsmwrap import registry
from hsmwrap.backend import Backend
from hsmwrap.catalog import KeySpec, ProtectionLevel, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.imports import Cmk, ImportService
from hsmwrap.policy import Deployment
from hsmwrap.testing.clients import openssl_encrypt

AES, SM4 = KeySpec
SOFTWARE, HSM = ProtectionLevel
PKCS1, OAEP1, OAEP256, SM2PKE = WrappingAlgorithm
RSA_ALGORITHMS = (PKCS1, OAEP1, OAEP256)

MATERIAL = {AES: bytes(range(32)), SM4: bytes(range(16))}
each_algorithm = pytest.mark.parametrize("algorithm", WrappingAlgorithm)
each_key_spec = pytest.mark.parametrize("key_spec", KeySpec)


def spec_of(algorithm):
    return WrappingKeySpec.EC_SM2 if algorithm is SM2PKE else WrappingKeySpec.RSA_2048


def flip(data, bit):
    """``data`` with one bit changed."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


class Clock:
    """Stands still until it is set."""

    def __init__(self):
        self.now = datetime(2026, 1, 1, 12, tzinfo=UTC)

    def __call__(self):
        return self.now

    def advance(self, **step):
        self.now += timedelta(**step)


@dataclass
class Desk:
    """A backend behind an import service in an SCA region, serving CMKs of level HSM.

    ``count`` counts the objects on the HSM token; it always says 0 where there is none.
    """

    backend: Backend
    count: object = lambda: 0
    clock: Clock = field(default_factory=Clock)

    def service(self, **options):
        deployment = options.pop("deployment", Deployment())
        levels = self.backend.capabilities().protection_levels
        backends = dict.fromkeys(levels, self.backend)
        return ImportService(backends, deployment, clock=self.clock, **options)

    def cmk(self, key_id="cmk-1", key_spec=AES, level=HSM, **more):
        return Cmk(key_id, key_spec, level, **more)

    def issue(self, algorithm, cmk=None, service=None):
        service = service or self.service()
        return service.get_parameters_for_import(cmk or self.cmk(), spec_of(algorithm), algorithm)

    def bring_in(self, parameters, ciphertext, cmk=None, service=None, **more):
        """Import ``ciphertext`` with the token of ``parameters``."""
        service = service or self.service()
        return service.import_key_material(
            cmk or self.cmk(parameters.key_id), ciphertext, parameters.import_token, **more
        )


def wrap(parameters, material):
    """Encrypt as a client does, by the openssl command."""
    return openssl_encrypt(parameters.algorithm, parameters.public_key, material)


def open_software(**more):
    return registry.open_backend("software", {"serve_hsm_level": True, **more})


def open_pkcs11(softhsm, prefix, **more):
    return registry.open_backend("pkcs11", softhsm.settings(prefix, **more))
