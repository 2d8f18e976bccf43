"""The keyring: master keys by id, one of them current."""

from __future__ import annotations

import base64
import binascii
import json
import re
import secrets
from collections.abc import Mapping
from typing import Any, NoReturn, Self

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hsmwrap.errors import ConfigurationError, KeyNotFound, strip_tracebacks

MASTER_KEY_LENGTH = 32
"""Length of a master key in bytes."""
KEY_ID_LENGTH = 4
"""Length of a key id in bytes; as text, twice as many lowercase hexadecimal digits."""

_KEY_ID = re.compile(r"[0-9a-f]{8}")
_VERSION = 1


class Keyring:
    """An immutable set of master keys by id; new blobs are sealed under the current one.

    Keys are in slots, not in a ``__dict__``, and never in a repr; a keyring cannot be pickled or
    copied.
    """

    __slots__ = ("_current", "_derived", "_keys")

    @strip_tracebacks
    def __init__(self, current: str, keys: Mapping[str, bytes]) -> None:
        """Take the current key's id, and all keys (32 bytes) by id (8 hex digits).

        Raises:
            ConfigurationError: An id or a length is wrong, or ``current`` is not among the keys.
        """
        # Only valid ids are quoted: a key may be in the place of an id.
        for key_id, key in keys.items():
            if not _KEY_ID.fullmatch(key_id):
                raise ConfigurationError("keyring: an id is not 8 lowercase hex digits")
            if len(key) != MASTER_KEY_LENGTH:
                raise ConfigurationError(f"keyring: the key {key_id} is not 32 bytes long")
        if current not in keys:
            raise ConfigurationError("keyring: the current key is not in it")
        self._current = current
        self._keys = dict(keys)
        self._derived: dict[tuple[str, bytes], bytes] = {}

    @classmethod
    def generate(cls) -> Self:
        """Generate a keyring with one key."""
        key_id = _fresh_id(())
        return cls(key_id, {key_id: secrets.token_bytes(MASTER_KEY_LENGTH)})

    @property
    def current(self) -> str:
        """The id of the key that new blobs are sealed under."""
        return self._current

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids of all keys, oldest first."""
        return tuple(self._keys)

    def key(self, key_id: str) -> bytes:
        """Return a master key.

        Raises:
            KeyNotFound: No key has this id.
        """
        try:
            return self._keys[key_id]
        except KeyError:
            raise KeyNotFound(f"the keyring has no key {key_id!r}") from None

    def derived(self, key_id: str, purpose: bytes) -> bytes:
        """Derive 32 bytes from a master key by HKDF-SHA-256 (RFC 5869); ``purpose`` is its info.

        Kept for as long as the keyring is: three are needed in each import, and deriving one takes
        longer than using it.

        Raises:
            KeyNotFound: No key has this id.
        """
        known = self._derived.get((key_id, purpose))
        if known is None:
            hkdf = HKDF(algorithm=SHA256(), length=32, salt=None, info=purpose)
            known = self._derived[key_id, purpose] = hkdf.derive(self.key(key_id))
        return known

    def rotated(self) -> Self:
        """Return a keyring with a new current key; the other keys still open blobs."""
        key_id = _fresh_id(self.ids)
        key = secrets.token_bytes(MASTER_KEY_LENGTH)
        return type(self)(key_id, {**self._keys, key_id: key})

    def retired(self, key_id: str) -> Self:
        """Return a keyring without this key; everything sealed under it is lost.

        Raises:
            KeyNotFound: No key has this id.
            ConfigurationError: It is the current key; rotate first.
        """
        self.key(key_id)
        if key_id == self._current:
            raise ConfigurationError(f"keyring: {key_id} is the current key; rotate first")
        rest = {other: key for other, key in self._keys.items() if other != key_id}
        return type(self)(self._current, rest)

    def to_json(self) -> bytes:
        """Serialise, with the keys in plaintext; only for a keyring file."""
        keys = {key_id: base64.b64encode(key).decode() for key_id, key in self._keys.items()}
        document = {"version": _VERSION, "current": self._current, "keys": keys}
        return json.dumps(document, indent=2).encode() + b"\n"

    @classmethod
    @strip_tracebacks
    def from_json(cls, raw: str | bytes) -> Self:
        """Parse the output of :meth:`to_json`.

        Raises:
            ConfigurationError: It is not a keyring, or its version is unknown.
        """
        try:
            document: Any = json.loads(raw)
            version, current, keys = (document[name] for name in ("version", "current", "keys"))
            decoded = {key_id: base64.b64decode(key, validate=True) for key_id, key in keys.items()}
        except (ValueError, KeyError, TypeError, AttributeError, binascii.Error):
            # The parser's error would quote the file, so it is not chained.
            raise ConfigurationError("keyring: not a keyring in JSON") from None
        if version != _VERSION or not isinstance(current, str):
            raise ConfigurationError("keyring: unknown version")
        return cls(current, decoded)

    def __repr__(self) -> str:
        return f"<Keyring current={self._current} ids={','.join(self.ids)}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a keyring cannot be pickled or copied: it holds master keys")


def _fresh_id(taken: tuple[str, ...]) -> str:
    while (key_id := secrets.token_hex(KEY_ID_LENGTH)) in taken:
        pass
    return key_id
