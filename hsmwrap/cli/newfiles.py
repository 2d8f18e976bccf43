"""New files of a command, all or none; one that was killed is finished by running it again.

Beside the last file, ``FILE.unfinished`` exists while the command runs. Before the first file is
there it has a line for each of them, as ``sha256sum`` writes them. The same command run again finds
by it what a killed run left, removes that and begins again. No other file is removed or replaced.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from hsmwrap.errors import ConfigurationError
from hsmwrap.privatefile import PrivateFile, sync_directory

_HEAD = "# unfinished hsmwrap command: run it again with the same arguments: "
_WITHOUT_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


@contextmanager
def new_files(command: str, files: Sequence[Path]) -> Iterator[NewFiles]:
    """Files that the command makes in the block; an error in it removes them.

    Args:
        command: Its name: what another command left is refused.
        files: None of them may be there, but for what a killed run of the same command left.

    Raises:
        ConfigurationError: One is there, or cannot be made, or the command runs already.
    """
    files = [file.absolute() for file in files]
    made = NewFiles(command, files)
    try:
        yield made
    except BaseException:
        made.remove()
        raise
    made.finish()


class NewFiles:
    """What :func:`new_files` gives."""

    def __init__(self, command: str, files: Sequence[Path]) -> None:
        """Remove what a killed run left, and say that these files are unfinished."""
        self._files = files
        self._digests: dict[str, str] = {}
        self._journal = files[-1].with_name(f"{files[-1].name}.unfinished")
        self._head = f"{_HEAD}{command}\n"
        with _typed(self._journal):
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(self._journal, flags, 0o600)
        try:
            self._begin()
        except BaseException:
            os.close(self._descriptor)
            raise

    def _begin(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(f"{self._journal}: this command is running already") from None
        found = os.fstat(self._descriptor)
        if not found.st_nlink:
            raise ConfigurationError(f"{self._journal}: this command has just ended; run it again")
        written = os.pread(self._descriptor, found.st_size, 0).decode("utf-8", "surrogateescape")
        ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
        if not ours or not (written.startswith(self._head) or self._head.startswith(written)):
            raise ConfigurationError(
                f"{self._journal}: another command did not finish; run that one again, or remove "
                "this file and what it names"
            )
        # A line without an end is not followed by a file: that one was not begun.
        digests = {}
        for line in written[len(self._head) :].split("\n")[:-1]:
            digest, _, file = line.partition("  ")
            digests[file] = digest
        self._remove_leftovers(digests)
        there = next((file for file in self._files if os.path.lexists(file)), None)
        if there is not None:
            self._journal.unlink()
            raise ConfigurationError(
                f"{there}: is there already, and not of a command that did not finish; name a new "
                "file"
            )
        os.ftruncate(self._descriptor, 0)
        self._append(self._head)

    def _remove_leftovers(self, digests: dict[str, str]) -> None:
        foreign = digests.keys() - set(map(str, self._files))
        foreign |= {
            file for file in digests.keys() - foreign if _digest(file) not in (None, digests[file])
        }
        if foreign:
            raise ConfigurationError(
                f"{', '.join(sorted(foreign))}: not of this command as it is run now, but "
                f"{self._journal} names it: move it elsewhere, or run the command as before"
            )
        for file in map(Path, digests):
            _beside(file).unlink(missing_ok=True)
            file.unlink(missing_ok=True)

    def write(self, contents: Sequence[str]) -> None:
        """Write all files, each readable by this user alone.

        Args:
            contents: Of each file.

        Raises:
            ConfigurationError: One cannot be written.
        """
        written = {f: c.encode() for f, c in zip(self._files, contents, strict=True)}
        self._digests = {str(f): sha256(c).hexdigest() for f, c in written.items()}
        with _typed(self._journal):
            self._append("".join(f"{digest}  {f}\n" for f, digest in self._digests.items()))
            sync_directory(self._journal.parent)
        for file, content in written.items():
            with _typed(file):
                _write_new(file, content)

    def _append(self, text: str) -> None:
        os.lseek(self._descriptor, 0, os.SEEK_END)
        os.write(self._descriptor, text.encode("utf-8", "surrogateescape"))
        os.fsync(self._descriptor)

    def remove(self) -> None:
        """Remove what was written, as the command failed."""
        for file, digest in self._digests.items():
            if _digest(file) == digest:
                Path(file).unlink()
        self.finish()

    def finish(self) -> None:
        """Say that nothing is unfinished."""
        self._journal.unlink(missing_ok=True)
        os.close(self._descriptor)


def _write_new(file: Path, content: bytes) -> None:
    """The file, whole or not at all, which did not exist."""
    beside = _beside(file)
    PrivateFile(beside, "file").write_new(content)
    try:
        os.link(beside, file)
    except OSError as error:
        if error.errno not in _WITHOUT_LINKS:
            raise
        # The file system of a portable medium, where its holder alone writes.
        if os.path.lexists(file):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
        beside.rename(file)
    finally:
        beside.unlink(missing_ok=True)
    sync_directory(file.parent)


def _beside(file: Path) -> Path:
    return file.with_name(f".{file.name}.unfinished")


def _digest(file: str) -> str | None:
    """SHA-256 of its content; None where it is not there."""
    try:
        return sha256(Path(file).read_bytes()).hexdigest()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigurationError(f"{file}: {error.strerror}") from None


@contextmanager
def _typed(file: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        if os.path.lexists(file.parent):
            raise
        raise ConfigurationError(f"{file}: there is not a directory {file.parent}") from None
    except OSError as error:
        raise ConfigurationError(f"{file}: {error.strerror}") from None
