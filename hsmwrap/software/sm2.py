"""SM2 wrapping keys, by an engine of :mod:`hsmwrap.sm2`."""

from __future__ import annotations

from collections.abc import Iterable

from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec
from hsmwrap.sm2.engine import Sm2Engine
from hsmwrap.sm2.formats import check_layouts, parse
from hsmwrap.sm2.spki import encode_spki

_PRIVATE_LENGTH = 32


class Sm2Scheme:
    """Key pairs and decryption by one engine, for the configured ciphertext layouts."""

    spec = WrappingKeySpec.EC_SM2
    algorithm = WrappingAlgorithm.SM2PKE

    def __init__(self, engine: Sm2Engine, layouts: Iterable[str]) -> None:
        """Take the engine and the names of the layouts.

        Raises:
            ConfigurationError: The layouts are unknown or ambiguous.
        """
        self._engine = engine
        self._layouts = check_layouts(layouts)

    @property
    def path(self) -> str:
        """The implementation, for the capability report."""
        return f"SM2 by {self._engine.name}"

    @property
    def production(self) -> bool:
        """False if the engine is for development only."""
        return self._engine.production

    def generate(self) -> tuple[bytes, bytes]:
        """Generate a key pair: DER SubjectPublicKeyInfo (91 bytes), secret for :meth:`decrypt`.

        The secret is the private scalar (32 bytes) ‖ the public point (65 bytes).
        """
        pair = self._engine.generate()
        return encode_spki(pair.public), pair.private + pair.public

    def decrypt(self, secret: bytes, ciphertext: bytes, material_length: int) -> bytes:
        """Decrypt a client's ciphertext to exactly ``material_length`` bytes.

        Raises:
            InvalidKeyMaterial: It does not decrypt; never says why.
        """
        parsed = parse(ciphertext, material_length, self._layouts)
        private, public = secret[:_PRIVATE_LENGTH], secret[_PRIVATE_LENGTH:]
        # The secret comes out of a blob that our own AEAD has authenticated.
        return self._engine.decrypt_sealed(private, public, parsed)
