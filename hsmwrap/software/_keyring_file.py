"""The keyring file: private, replaced atomically; running processes see changes at once."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hsmwrap.errors import ConfigurationError
from hsmwrap.software._keyring import Keyring

_Stamp = tuple[int, int, int, int, int]


class KeyringFile:
    """A keyring file, version 1: ``{"version": 1, "current": id, "keys": {id: base64}}``.

    Every read checks whether the file was replaced, so rotation and retirement reach running
    processes without a restart. A file that others may read is refused, also
    later on. Safe from any thread and across forks.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Take the path; the file is opened at the first use."""
        self._path = Path(path)
        self._cached: tuple[_Stamp, Keyring] | None = None

    def __repr__(self) -> str:
        return f"<KeyringFile {str(self._path)!r}>"

    def read(self) -> Keyring:
        """Return the current keyring of the file.

        Raises:
            ConfigurationError: The file is missing, no keyring, not a regular file, accessible to
                group or others, or owned by someone else than this user or root.
        """
        cached = self._cached
        try:
            if cached and cached[0] == _stamp(os.stat(self._path)):  # noqa: PTH116  # hot path
                return cached[1]
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                self._refuse_exposed(status)
                keyring = Keyring.from_json(file.read())
        except OSError as error:
            raise ConfigurationError(f"keyring_file {self._path}: {error.strerror}") from None
        self._cached = (_stamp(status), keyring)
        return keyring

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
                fcntl.flock(directory, fcntl.LOCK_EX)
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

    def _refuse_exposed(self, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            raise ConfigurationError(f"keyring_file {self._path}: not a regular file")
        if status.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            mode = stat.S_IMODE(status.st_mode)
            raise ConfigurationError(
                f"keyring_file {self._path}: mode {mode:04o} lets others at the master keys; "
                f"chmod 600 it, and rotate if someone may have read it"
            )
        if status.st_uid not in (os.geteuid(), 0):
            raise ConfigurationError(
                f"keyring_file {self._path}: owned by uid {status.st_uid}, "
                f"must be owned by this user or root"
            )


def _stamp(status: os.stat_result) -> _Stamp:
    # ctime and mode too, so that a chmod is noticed.
    return (
        status.st_dev,
        status.st_ino,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_mode,
    )
