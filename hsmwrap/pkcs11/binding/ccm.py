"""CCM with an imported key, by the ECB or CTR and the CBC of the HSM token (:mod:`hsmwrap.ccm`)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, ClassVar

from pkcs11.mechanisms import Mechanism

from hsmwrap import ccm
from hsmwrap.backend import MESSAGE_VERSION_CCM

_COUNTER_BITS = 32


@dataclass(frozen=True, slots=True)
class Ccm:
    """CCM by keys of one type; the tag (16 bytes) follows the ciphertext.

    Attributes:
        cbc: Mechanism; its parameter is the initialisation vector.
        counter: Mechanism of the counter blocks: ECB, or CTR with ``by_ctr``.
        by_ctr: Its parameter is CK_AES_CTR_PARAMS.
    """

    name: ClassVar[str] = "CCM"
    version: ClassVar[int] = MESSAGE_VERSION_CCM

    cbc: Mechanism
    counter: Mechanism
    by_ctr: bool = False

    def encrypt(self, key: Any, nonce: bytes, plaintext: bytes, additional_data: bytes) -> bytes:
        """Encrypt under a key object; returns ciphertext ‖ tag.

        Raises:
            InvalidParameter: The plaintext is too long.
            PKCS11Error: The HSM token refuses.
        """
        return ccm.seal(*self._blocks(key), nonce, plaintext, additional_data)

    def decrypt(self, key: Any, nonce: bytes, sealed: bytes, additional_data: bytes) -> bytes:
        """Decrypt ciphertext ‖ tag under a key object.

        Raises:
            InvalidCiphertext: The tag does not fit.
            PKCS11Error: The HSM token refuses. It encrypts whole blocks, whatever the client sent.
        """
        return ccm.unseal(*self._blocks(key), nonce, sealed, additional_data)

    def _blocks(self, key: Any) -> tuple[ccm.Blocks, ccm.Blocks]:
        def encrypted(data: bytes, mechanism: Mechanism, parameter: bytes | None) -> bytes:
            return bytes(key.encrypt(data, mechanism=mechanism, mechanism_param=parameter))

        def counters(blocks: bytes) -> bytes:
            if not self.by_ctr:
                return encrypted(blocks, self.counter, None)
            # They count up, and do so in their last bytes: the key stream from the first one.
            parameter = bytes(ctypes.c_ulong(_COUNTER_BITS)) + blocks[: ccm.BLOCK]
            return encrypted(bytes(len(blocks)), self.counter, parameter)

        return counters, lambda blocks: encrypted(blocks, self.cbc, bytes(ccm.BLOCK))
