"""The keyring file: private, replaced atomically; running processes see changes at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hsmwrap.errors import ConfigurationError
from hsmwrap.locks import lock_file
from hsmwrap.privatefile import ParsedFile, PrivateFile
from hsmwrap.software._keyring import Keyring


class KeyringFile:
    """A keyring file, version 1: ``{"version": 1, "current": id, "keys": {id: base64}}``.

    Every read checks whether the file was replaced, so rotation and retirement reach running
    processes without a restart. A file that others may read is refused, also
    later on. Safe from any thread and across forks.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Take the path; the file is opened at the first use."""
        self._path = Path(path)
        self._parsed = ParsedFile(PrivateFile(path, "keyring_file"), Keyring.from_json)

    def __repr__(self) -> str:
        return f"<KeyringFile {str(self._path)!r}>"

    def read(self) -> Keyring:
        """Return the current keyring of the file.

        Raises:
            ConfigurationError: The file is missing, not a keyring, or not private
                (:mod:`hsmwrap.privatefile`).
        """
        return self._parsed.read()

    def create(self) -> Keyring:
        """Create the file with one new key, mode 600.

        Raises:
            ConfigurationError: The file exists, or the directory cannot be written.
        """
        with self._locked():
            if os.path.lexists(self._path):
                raise ConfigurationError(f"keyring_file {self._path}: exists already")
            return self._replace(Keyring.generate())

    def rotate(self) -> Keyring:
        """Add a new key and make it current; the other keys still open blobs and tokens.

        Raises:
            ConfigurationError: As for :meth:`read`, or the directory cannot be written.
        """
        return self._change(Keyring.rotated)

    def retire(self, key_id: str) -> Keyring:
        """Remove a key; blobs and tokens made under it are lost.

        Raises:
            KeyNotFound: No key has this id.
            ConfigurationError: It is the current key, or as for :meth:`rotate`.
        """
        return self._change(lambda keyring: keyring.retired(key_id))

    def _change(self, change: Callable[[Keyring], Keyring]) -> Keyring:
        with self._locked():
            return self._replace(change(self.read()))

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the directory's lock, so that concurrent changes do not lose keys."""
        try:
            directory = os.open(self._target.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                lock_file(directory)
                yield
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise ConfigurationError(f"keyring_file {self._path}: {error.strerror}") from None

    def _replace(self, keyring: Keyring) -> Keyring:
        new = self._target.with_name(f".{self._target.name}.new")
        new.unlink(missing_ok=True)  # left by a change that crashed; the lock protects it
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with open(descriptor, "wb") as file:  # noqa: PTH123  # a descriptor has no path
                self._keep_owner(descriptor)
                file.write(keyring.to_json())
                file.flush()
                os.fsync(descriptor)
            new.rename(self._target)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        return keyring

    @property
    def _target(self) -> Path:
        return self._path.resolve()  # replace the file, not a symbolic link

    def _keep_owner(self, descriptor: int) -> None:
        # If root rotates the keys of a service, the service still has to read them.
        if os.geteuid() == 0 and self._target.exists():
            owner = self._target.stat()
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
