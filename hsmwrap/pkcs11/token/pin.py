"""Where the HSM token's PIN comes from, and the one object that holds it.

A :class:`PinSource` is read at each login, so a PIN that was changed is picked up without a
restart. What is read is overwritten after the login, and the PIN of a file or a command is nowhere
else in this process's memory, so that a core dump does not have it. Whatever is wrong with a source
is a :class:`ConfigurationError` that names the source and never holds the PIN: neither in its text
nor in the exceptions behind it.
"""

from __future__ import annotations

import codecs
import hmac
import os
import re
import shlex
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NoReturn, Self
from urllib.parse import unquote_to_bytes

from hsmwrap.errors import ConfigurationError, HsmwrapError, strip_tracebacks
from hsmwrap.privatefile import PrivateFile, read_erasable, require_utf8
from hsmwrap.settings import Kind, typed

MAX_PIN_BYTES = 1024
"""Longest PIN accepted, in bytes of UTF-8; HSM tokens stop far below."""

COMMAND_TIMEOUT = 30.0
"""Seconds that a PIN command may take."""

_HIDDEN = "<Pin>"
# Lone surrogates (0xED 0xA0 to 0xBF) are bytes of the environment that are not UTF-8.
_PRINTED = re.compile(rb"(?:[^\x00-\x1f\x7f\xed]|\xed[\x80-\x9f])*")
_FILE_URI = re.compile(r"(?i:file:(?://(?:localhost)?)?)(/(?!/)[^?#]*)")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class Pin:
    """A PIN that only :meth:`reveal` shows; a ``with`` block overwrites it at its end.

    Attributes:
        utf8: The PIN as a login call takes it.
    """

    __slots__ = ("utf8",)

    def __init__(self, value: str | bytearray) -> None:
        """Take the PIN; a ``bytearray`` (UTF-8) is not copied, and is overwritten later."""
        # Parsed text of a URI or an environment may have surrogates; checked_pin refuses them.
        self.utf8 = value if isinstance(value, bytearray) else _encoded(value)

    def encode(self, _encoding: str) -> bytearray:
        """The PIN itself, as python-pkcs11 asks a text for it: so it makes no copy."""
        return self.utf8

    def reveal(self) -> str:
        """The PIN as text, which cannot be overwritten."""
        return self.utf8.decode(errors="surrogatepass")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.utf8[:] = bytes(len(self.utf8))

    def __repr__(self) -> str:
        return _HIDDEN

    def __format__(self, _spec: str) -> str:
        return _HIDDEN

    def __eq__(self, other: object) -> bool:
        """Compare in constant time."""
        if not isinstance(other, Pin):
            return NotImplemented
        return hmac.compare_digest(self.utf8, other.utf8)

    # A hash would be a check value of a short secret.
    __hash__ = None  # type: ignore[assignment]

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _memo: object) -> Self:
        return self

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        """Refuse to be pickled."""
        raise TypeError("a PIN is not serialised")


def _encoded(text: str) -> bytearray:
    return bytearray(text, "utf-8", "surrogatepass")


def checked_pin(given: str | bytearray, where: str) -> Pin:
    """Make a PIN of text or UTF-8, or say what is wrong with what ``where`` gave.

    A control character is a second line or a stray line end, not a PIN, and a byte-order mark is
    an editor's: they are refused here, before the HSM token counts a wrong try.

    Raises:
        ConfigurationError: The PIN is empty, longer than :data:`MAX_PIN_BYTES`, begins with a
            byte-order mark, or holds a control character.
    """
    pin = Pin(given)
    if fault := _fault(pin.utf8):
        with pin:
            raise ConfigurationError(f"{where}: {fault}")
    return pin


def _fault(utf8: bytearray) -> str | None:
    if not utf8:
        return "the PIN is empty"
    if len(utf8) > MAX_PIN_BYTES:
        return f"a PIN has at most {MAX_PIN_BYTES} bytes"
    if utf8.startswith(codecs.BOM_UTF8):
        return "the PIN begins with a byte-order mark"
    if not _PRINTED.fullmatch(utf8):
        return "the PIN holds a line end or another control character"
    return None


class PinSource(ABC):
    """Something that a PIN can be read from."""

    __slots__ = ()

    @abstractmethod
    def read(self) -> Pin:
        """Read the PIN now; the caller overwrites it, by a ``with`` block.

        Raises:
            ConfigurationError: The source gives no usable PIN; the text names the source.
        """

    def check(self) -> None:
        """Raise what :meth:`read` would, as far as that shows without running foreign code."""
        with self.read():
            pass


@dataclass(frozen=True, slots=True)
class PinPad(PinSource):
    """A PIN that is typed at the HSM token (protected authentication path)."""

    def read(self) -> Pin:
        """Not in the host.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError("the PIN is typed at the HSM token")


@dataclass(frozen=True, slots=True)
class PinFile(PinSource):
    """A private file that holds the PIN, and at most one line end after it.

    Attributes:
        path: Absolute, so that it means the same in every working directory.
    """

    path: str

    def __post_init__(self) -> None:
        """Refuse what is not an absolute path, without repeating it: it may be the PIN itself."""
        if not self.path.startswith("/") or "\0" in self.path:
            raise ConfigurationError("PIN file: takes an absolute path")

    def read(self) -> Pin:
        """Read the file, which has to be private (:mod:`hsmwrap.privatefile`)."""
        file = PrivateFile(self.path, "PIN file")
        return _pin_of(file.read_erasable(), str(file))


PIN_PAD = "pin-pad"
"""In place of the path of a file with the SO PIN: it is typed at the HSM token."""


def officer_pin(given: str | None) -> PinSource | None:
    """The security officer's PIN: from a file, or :data:`PIN_PAD`; None where none is given.

    Raises:
        ConfigurationError: It is neither that word nor an absolute path.
    """
    if given is None:
        return None
    return PinPad() if given == PIN_PAD else PinFile(given)


@dataclass(frozen=True, slots=True)
class PinEnvironment(PinSource):
    """An environment variable that holds the PIN."""

    variable: str

    def __post_init__(self) -> None:
        """Refuse what is not a name, without repeating it: it may be the PIN itself."""
        if not _VARIABLE.fullmatch(self.variable):
            raise ConfigurationError("PIN environment variable: takes a name, not a value")

    def read(self) -> Pin:
        """Read the variable as it is now."""
        value = os.environ.get(self.variable)
        if value is None:
            raise ConfigurationError(f"environment variable {self.variable} (the PIN) is not set")
        return checked_pin(value, f"environment variable {self.variable}")


@dataclass(frozen=True, slots=True)
class PinCallback(PinSource):
    """A callable of the embedder that returns the PIN as ``str``.

    Its own :class:`HsmwrapError` passes through (so a secret store can say that it is unavailable);
    any other exception is reported by its type only, as its text may hold the PIN.
    """

    # A functools.partial shows its arguments.
    function: Callable[[], str] = field(repr=False)

    def read(self) -> Pin:
        """Call the callable."""
        try:
            value: object = self.function()
        except HsmwrapError:
            raise
        except Exception as error:  # noqa: BLE001 (anything may come out of foreign code)
            failure = type(error).__name__
        else:
            if isinstance(value, str):
                return checked_pin(value, "PIN callback")
            failure = f"it returned {type(value).__name__}, not str"
        raise ConfigurationError(f"PIN callback failed: {failure}")

    def check(self) -> None:
        """Nothing: calling it may do more than to return the PIN."""


@dataclass(frozen=True, slots=True)
class PinCommand(PinSource):
    """A program that prints the PIN; run without a shell, its stderr is not shown.

    Attributes:
        argv: Absolute path of the program, then its arguments.
        timeout: Seconds that it may take.
    """

    argv: tuple[str, ...] = field(repr=False)
    timeout: float = COMMAND_TIMEOUT

    def __post_init__(self) -> None:
        """Refuse a program that would be looked for on PATH."""
        if not self.argv or not self.argv[0].startswith("/"):
            raise ConfigurationError("PIN command: the program needs its absolute path")
        if any("\0" in part for part in self.argv):
            raise ConfigurationError("PIN command: no part holds a NUL")

    def __repr__(self) -> str:
        """Show the program only; arguments may be secrets."""
        return f"PinCommand({self.argv[0]!r})"

    def check(self) -> None:
        """Look whether the program is there; it is not run."""
        if not os.access(self.argv[0], os.X_OK):
            raise ConfigurationError(
                f"PIN command {self.argv[0]}: is not there, or is not a program"
            )

    def read(self) -> Pin:
        """Run the program."""
        where = f"PIN command {self.argv[0]}"
        # Not a pipe, which subprocess reads into bytes that cannot be overwritten.
        output = os.memfd_create("hsmwrap")
        try:
            status = self._run(output)
            printed = read_erasable(output)
        except OSError as error:
            raise ConfigurationError(f"{where}: {error.strerror}") from error
        finally:
            os.close(output)
        if status is None:
            raise ConfigurationError(f"{where}: no answer within {self.timeout:g} seconds")
        if status:
            raise ConfigurationError(f"{where}: exit status {status}")
        return _pin_of(printed, where)

    def _run(self, output: int) -> int | None:
        try:
            return subprocess.run(  # noqa: S603 (the operator's own program, no shell)
                self.argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.DEVNULL,
                timeout=self.timeout,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            return None


@dataclass(frozen=True, slots=True)
class PinLiteral(PinSource):
    """A PIN that is already known: a URI's ``pin-value``, where that is allowed."""

    pin: Pin

    def read(self) -> Pin:
        """Return a copy: this PIN stays in memory, as the configuration has it."""
        return Pin(bytearray(self.pin.utf8))


def from_pin_source(value: str) -> PinSource:
    """The source that a URI's ``pin-source`` names (RFC 7512 section 2.4).

    ``|/program arguments``, a ``file:`` URI (RFC 8089, local), or an absolute path.

    Raises:
        ConfigurationError: It is none of these. The text does not repeat the value.
    """
    if value.startswith("|"):
        return _command(value[1:])
    if value.startswith("/"):
        return PinFile(value)
    match = _FILE_URI.fullmatch(value)
    if not match:
        raise ConfigurationError(
            "pin-source: takes an absolute path, a local file: URI, or | and a command"
        )
    return PinFile(os.fsdecode(unquote_to_bytes(match[1])))


@strip_tracebacks
def from_settings(settings: Mapping[str, Any]) -> PinSource:
    """The one PIN source that ``settings`` name; other keys are not looked at.

    Args:
        settings: May hold ``pin_file``, ``pin_env``, ``pin_command`` (a list, or a string that
            is split as a shell would), ``pin_callback``, and from a URI ``pin-source`` (str) and
            ``pin-value`` (:class:`Pin`). None counts as absent.

    Raises:
        ConfigurationError: None of them, more than one, or one of the wrong kind.
    """
    given = [name for name in SOURCES if settings.get(name) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise ConfigurationError(f"give exactly one of {', '.join(SOURCES)}; found {found}")
    name = given[0]
    kind, value = SOURCES[name], settings[name]
    try:
        source: PinSource = kind.read(value)
    except ValueError:
        text = f"{name}: takes {kind.takes}, not {type(value).__name__}"
        raise ConfigurationError(text) from None
    return source


def _command(command: str | Sequence[str]) -> PinCommand:
    if not isinstance(command, str):
        if not all(isinstance(part, str) for part in command):
            raise ConfigurationError("PIN command: every part is a string")
        return PinCommand(tuple(command))
    try:
        return PinCommand(tuple(shlex.split(command)))
    except ValueError as error:
        raise ConfigurationError(f"PIN command: {error}") from None


def _source(takes: str, make: Callable[[Any], PinSource], *types: type) -> Kind:
    def read(value: Any) -> PinSource:
        return value if isinstance(value, PinSource) else make(typed(value, *types))

    return Kind(takes, read)


def _callback(function: Any) -> PinCallback:
    if not callable(function):
        raise ValueError  # noqa: TRY004 (a kind's way to refuse)
    return PinCallback(function)


SOURCES: Mapping[str, Kind] = MappingProxyType(
    {
        "pin_file": _source(
            "an absolute path", lambda path: PinFile(os.fspath(path)), str, os.PathLike
        ),
        "pin_env": _source("the name of an environment variable", PinEnvironment, str),
        "pin_command": _source("a command, as a list or text", _command, str, list, tuple),
        "pin_callback": _source("a callable", _callback, object),
        "pin-source": _source("text", from_pin_source, str),
        "pin-value": _source("a Pin", PinLiteral, Pin),
    }
)
"""The settings that name a PIN source; the last two come from a PKCS#11 URI."""


def _pin_of(content: bytearray, where: str) -> Pin:
    require_utf8(content, where)
    if content.endswith(b"\n"):
        del content[-2 if content.endswith(b"\r\n") else -1 :]
    return checked_pin(content, where)
