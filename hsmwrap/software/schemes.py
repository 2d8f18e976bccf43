"""The wrapping schemes that this host supports, one for each wrapping algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import ConfigurationError
from hsmwrap.locks import LIBCRYPTO
from hsmwrap.sm2.engine import Sm2Engine, open_engine
from hsmwrap.software import rsa
from hsmwrap.software.rsa import RsaScheme
from hsmwrap.software.settings import SoftwareSettings
from hsmwrap.software.sm2 import Sm2Scheme


class Scheme(Protocol):
    """Key pairs and decryption for one wrapping algorithm."""

    @property
    def spec(self) -> WrappingKeySpec:
        """The wrapping key spec."""

    @property
    def algorithm(self) -> WrappingAlgorithm:
        """The wrapping algorithm."""

    @property
    def path(self) -> str:
        """The implementation, for the capability report."""

    @property
    def production(self) -> bool:
        """False if it is for development only."""

    def generate(self) -> tuple[bytes, bytes]:
        """Generate a key pair: DER SubjectPublicKeyInfo, secret for :meth:`decrypt`."""

    def decrypt(self, secret: bytes, ciphertext: bytes, material_length: int) -> bytes:
        """Decrypt a client's ciphertext that should hold ``material_length`` bytes.

        Raises:
            InvalidKeyMaterial: It does not decrypt; never says why.
        """


def open_schemes(settings: SoftwareSettings) -> Mapping[WrappingAlgorithm, Scheme]:
    """Open the schemes of all algorithms that these settings allow.

    Raises:
        ConfigurationError: The configured SM2 engine or layouts cannot be used.
        SelfTestFailed: The SM2 engine fails its known-answer test.
    """
    schemes: list[Scheme] = [
        RsaScheme(algorithm)
        for algorithm in RsaScheme.ALGORITHMS
        if algorithm is not WrappingAlgorithm.RSAES_PKCS1_V1_5 or _serves_pkcs1(settings)
    ]
    if engine := _open_engine(settings):
        schemes.append(Sm2Scheme(engine, settings.sm2_layouts))
    return MappingProxyType({scheme.algorithm: scheme for scheme in schemes})


def _serves_pkcs1(settings: SoftwareSettings) -> bool:
    if not settings.require_implicit_rejection:
        return True
    with LIBCRYPTO.read():
        return rsa.rejects_implicitly()


def _open_engine(settings: SoftwareSettings) -> Sm2Engine | None:
    if settings.sm2_engine is not None:
        return open_engine(settings.sm2_engine)
    try:
        return open_engine("libcrypto")
    except ConfigurationError:
        return None  # built without SM2 (RHEL and derivatives); RSA still works
