"""Private files: PINs, the keyring, access keys and the audit key. One reader, one policy.

:meth:`PrivateFile.write_new` makes a new one, for all commands that write a file.

A private file is a regular file (symbolic links are followed: Kubernetes mounts secrets as links),
belongs to this process's user or to root, and is closed to everyone else. Only where root owns it,
its group may read it: Kubernetes mounts secrets as root:fsGroup 0440. An access control list may
let this process's user read it: systemd gives a service's credential as root's, with such a list,
and the group bits of its mode 0440 are then the list's mask. All of this is checked on the opened
file, so that it cannot be exchanged between check and read.
"""

from __future__ import annotations

import codecs
import errno
import logging
import os
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from hsmwrap.errors import ConfigurationError, strip_tracebacks

MAX_BYTES = 1024 * 1024
"""Longest private file that is read."""

_T = TypeVar("_T")
_Stamp = tuple[int, ...]

_log = logging.getLogger(__name__)

_ACL_HEAD = struct.Struct("<I")
_ACL_ENTRY = struct.Struct("<HHI")
# Tags of linux/posix_acl.h; the owner's own entry (0x01) does not matter here.
_ACL_USER, _ACL_GROUP_OBJ, _ACL_GROUP, _ACL_MASK, _ACL_OTHER = 0x02, 0x04, 0x08, 0x10, 0x20
_READ, _ALL = 0o4, 0o7


def sync_directory(directory: Path) -> None:
    """Put names that were made in a directory on the disk.

    Raises:
        OSError: It cannot be opened or flushed.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class PrivateFile:
    """A file that holds a secret.

    Attributes:
        path: Where it is.
        what: What errors call it (``PIN file``).
    """

    path: str | os.PathLike[str]
    what: str

    def __str__(self) -> str:
        return f"{self.what} {os.fspath(self.path)}"

    @strip_tracebacks
    def read_bytes(self) -> bytes:
        """Check the file and read it.

        Raises:
            ConfigurationError: It cannot be read, is open to others, belongs to another user, is
                not a regular file, or has more than :data:`MAX_BYTES`.
        """
        return bytes(self.read_erasable())

    @strip_tracebacks
    def read_erasable(self) -> bytearray:
        """As :meth:`read_bytes`, into the one copy, which the caller can overwrite."""
        return self._read()[0]

    @strip_tracebacks
    def read_text(self) -> str:
        """Check the file and read it as UTF-8.

        Raises:
            ConfigurationError: As for :meth:`read_bytes` and :func:`decode`.
        """
        return decode(self.read_bytes(), str(self))

    @strip_tracebacks
    def write_new(self, content: bytes) -> None:
        """Make the file, of mode 0600 and on the disk with its whole content, or none.

        Raises:
            ConfigurationError: It exists, also as a link that leads nowhere, or cannot be written.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(self.path, flags, 0o600)
            try:
                with open(descriptor, "wb") as file:  # noqa: PTH123 (a descriptor has no path)
                    file.write(content)
                    file.flush()
                    os.fsync(descriptor)
                sync_directory(Path(self.path).absolute().parent)
            except BaseException:
                Path(self.path).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise ConfigurationError(f"{self}: {error.strerror}") from None

    def _read(self) -> tuple[bytearray, _Stamp]:
        # O_NONBLOCK: opening a FIFO must not wait for a writer; it is refused below.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            descriptor = os.open(self.path, flags)
            try:
                status = os.fstat(descriptor)
                if fault := _fault(status, _access_acl(descriptor)):
                    raise ConfigurationError(f"{self}: {fault}")
                content = read_erasable(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise ConfigurationError(f"{self}: {error.strerror}") from None
        if len(content) > MAX_BYTES:
            raise ConfigurationError(f"{self}: has more than {MAX_BYTES} bytes")
        return content, _stamp(status)


class ParsedFile(Generic[_T]):
    """What a private text file holds, parsed again when it was replaced or changed.

    Safe from any thread and across forks.

    Attributes:
        fault: Why the value is an earlier one than the file's, with ``keep``; None: it is not.
    """

    def __init__(
        self,
        file: PrivateFile,
        parse: Callable[[Any], _T],
        *,
        keep: bool = False,
        erasable: bool = False,
    ) -> None:
        """Take the file, which is opened at the first use, and what makes a value of its text.

        Args:
            file: The file.
            parse: Makes the value of a ``str``, or raises ``ConfigurationError``.
            erasable: True: ``parse`` gets a ``bytearray`` of UTF-8 in place of a ``str``, the only
                copy of the file's content.
            keep: True: a changed text that does not parse (the file may be half written) leaves the
                value as it was. A file that is not private any more is refused regardless.
        """
        self._file = file
        self._parse = parse
        self._keep = keep
        self._erasable = erasable
        self._cached: tuple[_Stamp, _T] | None = None
        self.fault: str | None = None

    @strip_tracebacks
    def read(self) -> _T:
        """Return what the file holds now, or with ``keep`` what it held when it parsed last.

        Raises:
            ConfigurationError: As for :meth:`PrivateFile.read_text`, or it does not parse.
        """
        cached = self._cached
        try:
            if cached and cached[0] == _stamp(os.stat(self._file.path)):  # noqa: PTH116 (hot path)
                return cached[1]
        except OSError as error:
            raise ConfigurationError(f"{self._file}: {error.strerror}") from None
        content, stamp = self._file._read()  # noqa: SLF001 (of this module)
        try:
            value, fault = self._parsed(content), None
        except ConfigurationError as error:
            if cached is None or not self._keep:
                raise
            value, fault = cached[1], str(error)
            event = "a changed file does not parse: what it held before stays in use"
            _log.error(event, extra={"why": fault})
        self._cached, self.fault = (stamp, value), fault
        return value

    def _parsed(self, content: bytearray) -> _T:
        given: str | bytearray = content
        if self._erasable:
            require_utf8(content, str(self._file))
        else:
            given = decode(content, str(self._file))
        try:
            return self._parse(given)
        except ConfigurationError as error:
            raise ConfigurationError(f"{self._file}: {error}") from None


def read_erasable(descriptor: int) -> bytearray:
    """The file, or its first :data:`MAX_BYTES` and one byte, read into memory of the caller."""
    content = bytearray(min(os.fstat(descriptor).st_size, MAX_BYTES) + 1)
    length = 0
    while got := os.preadv(descriptor, [memoryview(content)[length:]], length):
        length += got
        if length == len(content) <= MAX_BYTES:  # it grew meanwhile, or says 0 as in /proc
            content += bytes(min(len(content), MAX_BYTES + 1 - length))
    del content[length:]
    return content


@strip_tracebacks
def decode(content: bytes | bytearray, where: str) -> str:
    """Decode UTF-8 without a byte-order mark, which editors on Windows write.

    Raises:
        ConfigurationError: It is something else; the text begins with ``where``.
    """
    _require_no_mark(content, where)
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise _not_utf8(where) from None


@strip_tracebacks
def require_utf8(content: bytearray, where: str) -> None:
    """Check what :func:`decode` checks, and make no text of it: that could not be overwritten.

    Raises:
        ConfigurationError: As :func:`decode`.
    """
    _require_no_mark(content, where)
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for byte in content:
            decoder.decode(bytes((byte,)))
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise _not_utf8(where) from None


def _require_no_mark(content: bytes | bytearray, where: str) -> None:
    marks = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    if content.startswith(marks):
        raise ConfigurationError(
            f"{where}: begins with a byte-order mark; save it as UTF-8 without one"
        )


def _not_utf8(where: str) -> ConfigurationError:
    return ConfigurationError(f"{where}: is not UTF-8")


def owner_fault(status: os.stat_result) -> str | None:
    """Say what is wrong with the owner of a file or directory, or None: it is ours or root's."""
    if status.st_uid in {os.geteuid(), 0}:
        return None
    return f"belongs to uid {status.st_uid}; it has to belong to uid {os.geteuid()} or to root"


def _fault(status: os.stat_result, acl: bytes) -> str | None:
    """Say what is wrong with a file of this status and access control list, and what to do."""
    me, owner = os.geteuid(), status.st_uid
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"
    if fault := owner_fault(status):
        return fault
    if _is_open_to_others(status, acl):
        mode, right = stat.S_IMODE(status.st_mode), 0o400 if owner == me else 0o440
        return (
            f"is open to others (mode {mode:04o}): chmod {right:04o} it, and replace what it "
            "holds if others may have read it"
        )
    return None


def _is_open_to_others(status: os.stat_result, acl: bytes) -> bool:
    """Whether anyone has a permission but root, this process's user and a group of root's file.

    With an access control list the group bits of the mode are its mask, not the group's.
    """
    mode = status.st_mode
    entries = list(_ACL_ENTRY.iter_unpack(acl[_ACL_HEAD.size :])) or [
        (_ACL_GROUP_OBJ, mode >> 3 & _ALL, 0),
        (_ACL_OTHER, mode & _ALL, 0),
    ]
    mask = next((permissions for tag, permissions, _ in entries if tag == _ACL_MASK), _ALL)
    granted = {
        _ACL_GROUP_OBJ: mask & ~(_READ if status.st_uid == 0 else 0),
        _ACL_GROUP: mask,
        _ACL_USER: mask,
        _ACL_OTHER: _ALL,
    }
    return any(
        permissions & granted.get(tag, 0)
        for tag, permissions, user in entries
        if not (tag == _ACL_USER and user in {os.geteuid(), 0})
    )


def _access_acl(descriptor: int) -> bytes:
    try:
        return os.getxattr(descriptor, "system.posix_acl_access")
    except OSError as error:
        if error.errno in {errno.ENODATA, errno.ENOTSUP}:
            return b""
        raise


def _stamp(status: os.stat_result) -> _Stamp:
    # ctime, mode and owner: a chmod or chown alone has to reach the check as well.
    return (
        status.st_dev,
        status.st_ino,
        status.st_mtime_ns,
        status.st_ctime_ns,
        status.st_mode,
        status.st_uid,
        status.st_gid,
        status.st_size,
    )
