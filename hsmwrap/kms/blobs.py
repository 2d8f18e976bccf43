"""CiphertextBlob, the result of Encrypt.

Layout: version (1 byte) | key id (16 bytes, a UUID) | the backend's ciphertext. Decrypt takes the
key id from it. Key id and encryption context are the additional authenticated data.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from hsmwrap.errors import InvalidCiphertext

BLOB_VERSION = 1
_HEAD_LENGTH = 17


@dataclass(frozen=True, slots=True)
class CiphertextBlob:
    """A ciphertext and the id of the key that decrypts it."""

    key_id: str
    ciphertext: bytes

    def to_bytes(self) -> bytes:
        """Serialise."""
        return bytes([BLOB_VERSION]) + uuid.UUID(self.key_id).bytes + self.ciphertext

    @classmethod
    def from_bytes(cls, raw: bytes) -> Self:
        """Parse what :meth:`to_bytes` made.

        Raises:
            InvalidCiphertext: It is not a blob of a known version.
        """
        if len(raw) <= _HEAD_LENGTH or raw[0] != BLOB_VERSION:
            raise InvalidCiphertext
        return cls(str(uuid.UUID(bytes=raw[1:_HEAD_LENGTH])), raw[_HEAD_LENGTH:])


def additional_data(key_id: str, context: Mapping[str, str]) -> bytes:
    """The additional authenticated data: key id, and the encryption context in canonical form.

    Canonical form: JSON with sorted names, without white space, in ASCII. An absent context equals
    an empty one.
    """
    canonical = json.dumps(dict(context), sort_keys=True, separators=(",", ":"))
    return b"hsmwrap kms ciphertext" + uuid.UUID(key_id).bytes + canonical.encode("ascii")
