"""The development SM2 engine: gmssl's arithmetic, everything else ours. Not for production.

gmssl 3.2.2 checks neither the curve nor C3, draws k from a Mersenne Twister, cuts zeros and fours
off public keys (``lstrip("04")``) and leaks by timing (field note 58). So nothing of it is used but
its scalar multiplication: points and ranges are checked here, C3 in :mod:`hsmwrap.sm2.decrypt`, and
scalars come from :mod:`secrets`. The timing stays.
"""

from __future__ import annotations

import importlib
import logging
import secrets

from hsmwrap.errors import ConfigurationError, InvalidKeyMaterial
from hsmwrap.sm2.curve import FIELD_BYTES, GX, GY, N, decode_point, encode_point
from hsmwrap.sm2.decrypt import decrypt_with_point
from hsmwrap.sm2.engine import Sm2Engine, Sm2KeyPair
from hsmwrap.sm2.formats import Sm2Ciphertext
from hsmwrap.sm2.kdf import sm2_kdf, sm3, xor

_logger = logging.getLogger(__name__)
_G = encode_point(GX, GY)


class GmsslEngine(Sm2Engine):
    """SM2 by gmssl; says at every start that it is not for production.

    Raises:
        ConfigurationError: gmssl is not installed.
    """

    name = "gmssl"
    production = False

    def __init__(self) -> None:
        try:
            module = importlib.import_module("gmssl.sm2")
        except ImportError:
            raise ConfigurationError(
                "the SM2 engine gmssl needs the extra: pip install '.[gmssl]' in a clone of hsmwrap"
            ) from None
        self._gmssl = module.CryptSM2(private_key="", public_key="")
        _logger.warning("SM2 engine gmssl is NOT FOR PRODUCTION: its timing leaks private keys")

    def generate(self) -> Sm2KeyPair:
        """Make a fresh key pair, 1 <= d <= n-2 (GB/T 32918.1, 6.1)."""
        scalar = 1 + secrets.randbelow(N - 2)
        return Sm2KeyPair(scalar.to_bytes(FIELD_BYTES), self._multiply(scalar, _G))

    def encrypt(self, public: bytes, plaintext: bytes) -> Sm2Ciphertext:
        """Encrypt to a public key; see :meth:`Sm2Engine.encrypt`."""
        decode_point(public)
        if not plaintext:
            raise ValueError("SM2 encrypts no empty message")
        mask = bytes(len(plaintext))
        while not any(mask):  # GB/T 32918.4, 6.1, step A5
            scalar = 1 + secrets.randbelow(N - 1)
            x2, y2 = _coordinates(self._multiply(scalar, public))
            mask = sm2_kdf(x2, y2, len(plaintext))
        x1, y1 = decode_point(self._multiply(scalar, _G))
        return Sm2Ciphertext(x1, y1, c3=sm3(x2 + plaintext + y2), c2=xor(plaintext, mask))

    def decrypt(self, private: bytes, public: bytes, ciphertext: Sm2Ciphertext) -> bytes:
        """Decrypt with a key pair that is checked first; see :meth:`Sm2Engine.decrypt`."""
        scalar = int.from_bytes(private)
        if not 1 <= scalar <= N - 2 or self._multiply(scalar, _G) != public:
            raise InvalidKeyMaterial
        return decrypt_with_point(ciphertext, *_coordinates(self._multiply(scalar, ciphertext.c1)))

    def _multiply(self, scalar: int, point: bytes) -> bytes:
        """[scalar]point, for a scalar of 1..n-1 and a checked uncompressed point."""
        # gmssl offers its scalar multiplication under this name only.
        product = self._gmssl._kg(scalar, point[1:].hex())  # noqa: SLF001 - see above
        return b"\x04" + bytes.fromhex(product)


def _coordinates(point: bytes) -> tuple[bytes, bytes]:
    return point[1 : 1 + FIELD_BYTES], point[1 + FIELD_BYTES :]
