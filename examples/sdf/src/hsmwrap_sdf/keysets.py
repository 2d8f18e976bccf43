"""Key sets: a MAC key that the device made, and the pair that seals imported keys.

A key set is a file of JSON in the state directory. Its MAC key is encrypted under the device's
key-encryption key, so the file is not a secret, and one who can write it can plant no key that they
know (under a public key they could).

The MAC. The edition of 2012 has no HMAC, and where a device has SDF_CalculateMAC its length is not
the same everywhere. So: SM3 of the data, and the CBC-MAC of it by SDF_Encrypt, under SM4. CBC-MAC
is a MAC for messages of one length (Bellare, Kilian, Rogaway, 2000; GB/T 15852.1), and the inputs
here are always three blocks: a label, and the hash. Two labels make 32 bytes.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from hsmwrap.errors import ConfigurationError
from hsmwrap.privatefile import PrivateFile
from hsmwrap.sm2 import sm3
from hsmwrap_sdf.binding import BLOCK
from hsmwrap_sdf.device import Key, Session

HIGHEST = 65535
_FILE = re.compile(r"key-set-([1-9][0-9]{0,4})\.json")


@dataclass(frozen=True, slots=True)
class KeySet:
    """One key set.

    Attributes:
        number: Its number.
        storage_index: Index of the pair that seals keys under it.
        kek_index: Index of the key-encryption key that its MAC key is encrypted under.
        mac_key: That MAC key, encrypted.
    """

    number: int
    storage_index: int
    kek_index: int
    mac_key: bytes

    @classmethod
    def parse(cls, number: int, text: str) -> Self:
        """Read a file's content.

        Raises:
            ConfigurationError: It is not a key set's.
        """
        try:
            read = json.loads(text)
            made = cls(
                number, read["storage_index"], read["kek_index"], bytes.fromhex(read["mac_key"])
            )
            fits = read["version"] == 1 and type(made.storage_index) is type(made.kek_index) is int
        except (ValueError, TypeError, KeyError):
            fits = False
        if not fits:
            raise ConfigurationError(f"key set {number}: its file is damaged; copy it again")
        return made

    def text(self) -> str:
        """A file's content."""
        kept = {"version": 1, "storage_index": self.storage_index, "kek_index": self.kek_index}
        return json.dumps({**kept, "mac_key": self.mac_key.hex()}, indent=1) + "\n"

    def mac(self, session: Session, purpose: bytes, data: bytes) -> bytes:
        """32 bytes over data of any length, for one purpose (up to 15 bytes)."""
        with session.opened_under_kek(self.kek_index, self.mac_key) as key:
            return mac_under(key, purpose, data)


def mac_under(key: Key, purpose: bytes, data: bytes) -> bytes:
    """The MAC under a key in the device."""
    digest, label = sm3(data), purpose.ljust(BLOCK - 1, b"\0")
    return b"".join(key.cbc(label + part + digest)[-BLOCK:] for part in (b"\x01", b"\x02"))


class KeySets:
    """The key sets of a state directory. Others may add and remove files at any time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: dict[int, KeySet] = {}

    def numbers(self) -> list[int]:
        """The numbers of all, the current one last."""
        found = (_FILE.fullmatch(path.name) for path in self._directory.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def get(self, number: int) -> KeySet | None:
        """A key set, None if it is not there (any more).

        Raises:
            ConfigurationError: Its file is damaged or not private.
        """
        path = self._path(number)
        if not path.exists():
            return None
        if number not in self._known:
            text = PrivateFile(path, "key set file").read_text()
            self._known[number] = KeySet.parse(number, text)
        return self._known[number]

    def current(self) -> KeySet:
        """The newest.

        Raises:
            ConfigurationError: There is none.
        """
        numbers = self.numbers()
        found = self.get(numbers[-1]) if numbers else None
        if found is None:
            raise ConfigurationError(
                f"no key set in {self._directory}: make one by `hsmwrap keys init`, or copy the "
                "files of another host of this device"
            )
        return found

    def add(self, key_set: KeySet) -> None:
        """Write a file.

        Raises:
            ConfigurationError: There is one of this number.
        """
        if key_set.number > HIGHEST:
            raise ConfigurationError(f"key sets end at {HIGHEST}")
        with self._written(key_set.text()) as whole:
            try:
                os.link(whole, self._path(key_set.number))
            except FileExistsError:
                raise ConfigurationError(f"there is a key set {key_set.number}") from None
        self._sync()

    def remove(self, number: int) -> None:
        """Remove a file."""
        self._path(number).unlink()
        self._sync()

    def _path(self, number: int) -> Path:
        return self._directory / f"key-set-{number}.json"

    @contextmanager
    def _written(self, text: str) -> Iterator[Path]:
        path = self._directory / f".new-{os.urandom(8).hex()}"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            yield path
        finally:
            path.unlink()

    def _sync(self) -> None:
        descriptor = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
