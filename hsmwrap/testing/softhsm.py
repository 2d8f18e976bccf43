"""A private SoftHSM2 token: the one place that makes one.

``softhsm/init-token`` runs this file by its path, before there is a virtual environment. It needs
nothing but the standard library. :class:`SoftHsm` runs it in the same way for tests; the pytest
fixtures (``pytest_hsmwrap``) use that.

``softhsm2-util`` takes PINs from its command line, which every process can read, or from a
terminal. The few PKCS#11 calls here take them from files.
"""

from __future__ import annotations

import ctypes
import fcntl
import glob
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from ctypes import byref, c_char, c_ubyte, c_ulong
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# No variable overrides these: a token is initialised through this module, and that must never be
# another HSM.
_MODULES = tuple(
    f"{directory}/softhsm/libsofthsm2.so"
    for directory in ("/usr/lib", "/usr/lib/*-linux-*", "/usr/lib64", "/usr/local/lib")
)
_CONFIGURATION = """\
# Made by hsmwrap. The settings are those of softhsm2.conf(5).
directories.tokendir = {directory}/tokens
objectstore.backend = file
log.level = ERROR
slots.removable = false
"""

# PKCS #11 v2.40, base specification, sections 3.2 and 5
_CKU_SO = 0
_CKF_RW_SESSION = 0x2
_CKF_SERIAL_SESSION = 0x4
_CKF_USER_PIN_INITIALIZED = 0x8
_CKF_TOKEN_INITIALIZED = 0x400
_LABEL_LENGTH = 32


class SoftHsmError(Exception):
    """The token could not be made; the text says why."""


class SoftHsmNotInstalledError(SoftHsmError):
    """SoftHSM2 is not installed on this machine."""


@dataclass
class SoftHsm:
    """A private SoftHSM2 token in a directory, and key sets on it.

    Attributes:
        environment: What a process needs to use the token: SOFTHSM2_CONF, HSMWRAP_PKCS11_MODULE,
            HSMWRAP_TOKEN_DIR, HSMWRAP_TOKEN_LABEL, HSMWRAP_PIN_FILE and HSMWRAP_SO_PIN_FILE.
    """

    environment: dict[str, str]
    _with_keys: set[str] = field(default_factory=set, init=False, repr=False)

    @classmethod
    def make(cls, directory: Path, label: str = "hsmwrap") -> SoftHsm:
        """Make a token in ``directory``, or find it made.

        Another process does it: SoftHSM reads its configuration once per process. Set
        :attr:`environment` before this process loads SoftHSM's module.

        Args:
            directory: Made if missing. Holds everything: configuration, token and PINs.
            label: Label of the token, at most 32 bytes.

        Raises:
            SoftHsmNotInstalledError: SoftHSM2 is not installed on this machine.
            SoftHsmError: The token could not be made.
        """
        environment = _environment(directory, label)
        done = subprocess.run(  # noqa: S603  # this file
            [sys.executable, "-I", __file__],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SoftHsmError(done.stderr.strip())
        return cls(environment)

    @property
    def module(self) -> str:
        """Path of SoftHSM's PKCS#11 module."""
        return self.environment["HSMWRAP_PKCS11_MODULE"]

    @property
    def directory(self) -> Path:
        """The directory that holds everything."""
        return Path(self.environment["HSMWRAP_TOKEN_DIR"])

    def bare_settings(self, **more: Any) -> dict[str, Any]:
        """Settings of the backend ``pkcs11`` for this token, whether it has keys or not."""
        return {
            "module": self.module,
            "token_label": self.environment["HSMWRAP_TOKEN_LABEL"],
            "pin_file": self.environment["HSMWRAP_PIN_FILE"],
            **more,
        }

    def settings(
        self, prefix: str = "hsmwrap", *, trusted: bool = True, **more: Any
    ) -> dict[str, Any]:
        """Settings of the backend ``pkcs11`` for a key set under ``prefix``, made at first use.

        Args:
            prefix: The setting ``key_prefix``. Backends of different prefixes share no key.
            trusted: Whether the security officer makes the key set trusted.
            more: Other settings of the backend.
        """
        if prefix not in self._with_keys:
            self.run_keys("init", prefix, trusted=trusted)
            self._with_keys.add(prefix)
        return self.bare_settings(key_prefix=prefix, **more)

    def forget_keys(self) -> None:
        """Make key sets anew where :meth:`settings` asks for them: those made were destroyed."""
        self._with_keys.clear()

    def run_keys(self, action: str, prefix: str, *arguments: str, trusted: bool = True) -> str:
        """Run ``hsmwrap keys ACTION --key-prefix PREFIX --json`` and return what it printed.

        In another process: the security officer cannot log in where a user is logged in.

        Raises:
            SoftHsmError: The command failed.
        """
        environment = os.environ | self.environment
        if not trusted:
            environment.pop("HSMWRAP_SO_PIN_FILE")
        command = [sys.executable, "-m", "hsmwrap.cli", "keys", action, *arguments]
        done = subprocess.run(  # noqa: S603  # our own command
            [*command, "--key-prefix", prefix, "--json"],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SoftHsmError(done.stderr.strip())
        return done.stdout


def find_module() -> str:
    """Return the path of SoftHSM's PKCS#11 module.

    Raises:
        SoftHsmNotInstalledError: There is none.
    """
    for path in (path for pattern in _MODULES for path in sorted(glob.glob(pattern))):  # noqa: PTH207
        if os.access(path, os.R_OK):
            return path
    raise SoftHsmNotInstalledError("no libsofthsm2.so; Debian has it in the package softhsm2")


def _environment(directory: Path, label: str) -> dict[str, str]:
    home = directory.resolve()
    return {
        "HSMWRAP_TOKEN_DIR": str(home),
        "HSMWRAP_PKCS11_MODULE": find_module(),
        "HSMWRAP_TOKEN_LABEL": label,
        "HSMWRAP_PIN_FILE": str(home / "user.pin"),
        "HSMWRAP_SO_PIN_FILE": str(home / "so.pin"),
        "SOFTHSM2_CONF": str(home / "softhsm2.conf"),
    }


# --- in the process that makes the token ----------------------------------------------------------


def _make_token(environment: Mapping[str, str]) -> None:
    """Make what is missing of the token; one process at a time."""
    directory = Path(environment["HSMWRAP_TOKEN_DIR"])
    (directory / "tokens").mkdir(parents=True, exist_ok=True)
    lock = os.open(directory, os.O_RDONLY)  # closed by exec at the latest
    fcntl.flock(lock, fcntl.LOCK_EX)
    configuration = _CONFIGURATION.format(directory=directory)
    _write_whole(Path(environment["SOFTHSM2_CONF"]), configuration)
    pins = []
    for name in ("HSMWRAP_PIN_FILE", "HSMWRAP_SO_PIN_FILE"):
        file = Path(environment[name])
        if not file.exists() or not file.stat().st_size:
            _write_whole(file, secrets.token_hex(16))
        pins.append(file.read_bytes().strip())
    os.environ["SOFTHSM2_CONF"] = environment["SOFTHSM2_CONF"]
    _initialise(environment["HSMWRAP_PKCS11_MODULE"], environment["HSMWRAP_TOKEN_LABEL"], *pins)
    os.close(lock)


def _write_whole(path: Path, text: str) -> None:
    """Write all of the file or nothing."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.write_text(text, "utf-8")
    fresh.replace(path)


def _initialise(path: str, label: str, pin: bytes, so_pin: bytes) -> None:
    """Initialise a token of that label in its own slot or the free one, unless it is complete."""
    padded = label.encode().ljust(_LABEL_LENGTH)
    if len(padded) > _LABEL_LENGTH:
        raise SoftHsmError(f"a token's label has at most {_LABEL_LENGTH} bytes")
    module = _Module(path)
    free = []
    for slot, info in module.tokens():
        if info.label == padded and info.flags & _CKF_USER_PIN_INITIALIZED:
            return
        if info.label == padded or not info.flags & _CKF_TOKEN_INITIALIZED:
            free.append(slot)
    module.initialise(free[0], padded, pin, so_pin)


class _TokenInfo(ctypes.Structure):
    """CK_TOKEN_INFO."""

    _fields_ = (
        ("label", c_char * _LABEL_LENGTH),
        ("manufacturer_id", c_char * 32),
        ("model", c_char * 16),
        ("serial_number", c_char * 16),
        ("flags", c_ulong),
        ("limits", c_ulong * 10),
        ("versions", c_ubyte * 4),
        ("utc_time", c_char * 16),
    )


class _Module:
    """SoftHSM's PKCS#11 module, initialised until this process ends or calls exec."""

    def __init__(self, path: str) -> None:
        self._library = ctypes.CDLL(path)
        self._call("C_Initialize", None)

    def _call(self, function: str, *arguments: object) -> None:
        code = getattr(self._library, function)(*arguments)
        if code:
            raise SoftHsmError(f"{function} answered 0x{code:X}")

    def tokens(self) -> Iterator[tuple[c_ulong, _TokenInfo]]:
        """Yield each slot and its token's CK_TOKEN_INFO."""
        count = c_ulong()
        self._call("C_GetSlotList", c_ubyte(1), None, byref(count))
        slots = (c_ulong * count.value)()
        self._call("C_GetSlotList", c_ubyte(1), slots, byref(count))
        for slot in slots:
            info = _TokenInfo()
            self._call("C_GetTokenInfo", c_ulong(slot), byref(info))
            yield c_ulong(slot), info

    def initialise(self, slot: c_ulong, label: bytes, pin: bytes, so_pin: bytes) -> None:
        """Make an empty token in the slot; ``label`` is padded with blanks to 32 bytes."""
        self._call("C_InitToken", slot, so_pin, c_ulong(len(so_pin)), label)
        session = c_ulong()
        flags = c_ulong(_CKF_RW_SESSION | _CKF_SERIAL_SESSION)
        self._call("C_OpenSession", slot, flags, None, None, byref(session))
        self._call("C_Login", session, c_ulong(_CKU_SO), so_pin, c_ulong(len(so_pin)))
        self._call("C_InitPIN", session, pin, c_ulong(len(pin)))


def main(command: Sequence[str]) -> None:
    """Make the token that HSMWRAP_TOKEN_DIR and HSMWRAP_TOKEN_LABEL describe; exec the command."""
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)  # Python's own handling, which exec would pass on
    directory = os.environ.get("HSMWRAP_TOKEN_DIR")
    if not directory:
        sys.exit("init-token: HSMWRAP_TOKEN_DIR is the directory to make the token in")
    umask = os.umask(0o077)
    try:
        environment = _environment(
            Path(directory), os.environ.get("HSMWRAP_TOKEN_LABEL") or "hsmwrap"
        )
        _make_token(environment)
    except (SoftHsmError, OSError) as error:
        sys.exit(f"init-token: {error}")
    os.umask(umask)
    if command:
        try:
            os.execvpe(command[0], list(command), os.environ | environment)  # noqa: S606  # the caller's
        except OSError as error:
            sys.exit(f"init-token: {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
