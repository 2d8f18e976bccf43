"""SM2 engines: who does the arithmetic where no HSM does.

``libcrypto`` is the one for production. ``gmssl`` is a development engine for systems whose
libcrypto was built without SM2; it runs only where it is asked for by name, and neither ever
stands in for the other.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import ClassVar, Final, NoReturn, cast

from hsmwrap.errors import ConfigurationError, HsmwrapError, InvalidKeyMaterial, SelfTestFailed
from hsmwrap.sm2 import known_answer
from hsmwrap.sm2.formats import Sm2Ciphertext

ENGINES: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "libcrypto": ("hsmwrap.sm2.libcrypto", "LibcryptoEngine"),
        "gmssl": ("hsmwrap.sm2.gmssl_engine", "GmsslEngine"),
    }
)
"""Engines by name: module and class."""


@dataclass(frozen=True, slots=True)
class Sm2KeyPair:
    """An SM2 key pair; does not pickle or copy.

    Attributes:
        private: The scalar d, 32 bytes big-endian.
        public: The point [d]G, uncompressed, 65 bytes.
    """

    private: bytes = field(repr=False)
    public: bytes

    def __reduce__(self) -> NoReturn:
        raise TypeError("an SM2 key pair does not pickle or copy: it holds a private key")


class Sm2Engine(ABC):
    """SM2 key generation, encryption and decryption. Thread-safe, usable after ``fork()``.

    Attributes:
        name: The name in the configuration.
        production: False for an engine that must not protect real keys.
    """

    name: ClassVar[str]
    production: ClassVar[bool]

    @abstractmethod
    def generate(self) -> Sm2KeyPair:
        """Make a fresh key pair."""

    @abstractmethod
    def encrypt(self, public: bytes, plaintext: bytes) -> Sm2Ciphertext:
        """Encrypt ``plaintext`` (not empty) to an uncompressed point (65 bytes).

        Raises:
            ValueError: ``plaintext`` is empty or ``public`` no point of the curve.
        """

    @abstractmethod
    def decrypt(self, private: bytes, public: bytes, ciphertext: Sm2Ciphertext) -> bytes:
        """Decrypt with the scalar (32 bytes big-endian) whose uncompressed point is ``public``.

        Raises:
            InvalidKeyMaterial: The keys do not belong together, or C3 does not confirm the
                plaintext.
        """

    def decrypt_sealed(self, private: bytes, public: bytes, ciphertext: Sm2Ciphertext) -> bytes:
        """Decrypt with a pair of :meth:`generate` that was kept in an authenticated blob since.

        The pair is what was sealed, so an engine need not prove again that its halves belong
        together. Range of the scalar and curve of the point are checked all the same.

        Raises:
            InvalidKeyMaterial: As for :meth:`decrypt`.
        """
        return self.decrypt(private, public, ciphertext)

    def self_test(self) -> None:
        """Known answer, the same with C3 changed, and a round trip under a fresh pair.

        Raises:
            SelfTestFailed: The engine must not be used.
        """
        try:
            known = self.decrypt(known_answer.PRIVATE, known_answer.PUBLIC, known_answer.CIPHERTEXT)
            pair = self.generate()
            ciphertext = self.encrypt(pair.public, known_answer.MESSAGE)
            echoed = self.decrypt(pair.private, pair.public, ciphertext)
            again = self.decrypt_sealed(pair.private, pair.public, ciphertext)
        except (HsmwrapError, ValueError):
            raise SelfTestFailed(f"SM2 engine {self.name}: cannot decrypt") from None
        if not known == echoed == again == known_answer.MESSAGE:
            raise SelfTestFailed(f"SM2 engine {self.name}: decrypts to something else")
        self._test_refusal()

    def _test_refusal(self) -> None:
        genuine = known_answer.CIPHERTEXT
        changed = replace(genuine, c3=genuine.c3[::-1])
        try:
            self.decrypt(known_answer.PRIVATE, known_answer.PUBLIC, changed)
        except InvalidKeyMaterial:
            return
        raise SelfTestFailed(f"SM2 engine {self.name}: takes a changed ciphertext")


def open_engine(name: str) -> Sm2Engine:
    """Open the engine of this name and run its self test. It never falls back to another.

    Raises:
        ConfigurationError: No such engine, or what it needs is not installed.
        SelfTestFailed: It does not compute SM2.
    """
    if name not in ENGINES:
        raise ConfigurationError(f"unknown SM2 engine {name!r}; there are {', '.join(ENGINES)}")
    # Imported here, so that nothing of an engine is loaded that was not asked for.
    module, attribute = ENGINES[name]
    engine = cast("Sm2Engine", getattr(importlib.import_module(module), attribute)())
    engine.self_test()
    return engine
