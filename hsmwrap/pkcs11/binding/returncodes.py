"""What to do about each PKCS#11 return code: the recovery table, as data, in one place.

A dead session costs one session, a lost login one login, a lost HSM a restart of the module; a
wrong PIN stops everything, because retries lock tokens. Codes that are not listed say something
about the one operation that got them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType

from pkcs11 import exceptions as ck

from hsmwrap import errors
from hsmwrap.ckr import CKR


class Remedy(Enum):
    """What mends the connection after a return code."""

    NEW_SESSION = auto()
    """Drop the session that got it."""
    LOG_IN = auto()
    """Log in again, under one lock."""
    FIND_AGAIN = auto()
    """Forget cached object handles."""
    FEWER_SESSIONS = auto()
    """Lower the pool's cap and wait for a session."""
    RESTART = auto()
    """Open the breaker, wait until no call is in flight, initialise the module again."""
    REAP = auto()
    """Nothing here frees the HSM's memory but destroying objects: run the reaper."""
    STOP = auto()
    """Never try again: every further attempt may lock the HSM token."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """One row of the table.

    Attributes:
        remedy: What mends the connection.
        retry: Whether an operation that changes nothing may be tried once more afterwards.
        error: What the caller gets when it is not, or failed again.
    """

    remedy: Remedy
    retry: bool
    error: type[errors.HsmwrapError]


_SESSION = Recovery(Remedy.NEW_SESSION, retry=True, error=errors.HsmUnavailable)
_LOGIN = Recovery(Remedy.LOG_IN, retry=True, error=errors.HsmUnavailable)
_HANDLE = Recovery(Remedy.FIND_AGAIN, retry=True, error=errors.HsmUnavailable)
_COUNT = Recovery(Remedy.FEWER_SESSIONS, retry=True, error=errors.HsmResourceExhausted)
_DEVICE = Recovery(Remedy.RESTART, retry=True, error=errors.HsmUnavailable)
_MEMORY = Recovery(Remedy.REAP, retry=False, error=errors.HsmResourceExhausted)
_PIN = Recovery(Remedy.STOP, retry=False, error=errors.PinError)

RECOVERY: Mapping[CKR, Recovery] = MappingProxyType(
    {
        CKR.SESSION_HANDLE_INVALID: _SESSION,
        CKR.SESSION_CLOSED: _SESSION,
        CKR.OPERATION_ACTIVE: _SESSION,
        CKR.OPERATION_NOT_INITIALIZED: _SESSION,
        CKR.USER_NOT_LOGGED_IN: _LOGIN,
        CKR.OBJECT_HANDLE_INVALID: _HANDLE,
        CKR.KEY_HANDLE_INVALID: _HANDLE,
        CKR.UNWRAPPING_KEY_HANDLE_INVALID: _HANDLE,
        CKR.WRAPPING_KEY_HANDLE_INVALID: _HANDLE,
        CKR.SESSION_COUNT: _COUNT,
        CKR.DEVICE_ERROR: _DEVICE,
        CKR.DEVICE_REMOVED: _DEVICE,
        CKR.TOKEN_NOT_PRESENT: _DEVICE,
        CKR.TOKEN_NOT_RECOGNIZED: _DEVICE,
        CKR.SLOT_ID_INVALID: _DEVICE,
        CKR.CRYPTOKI_NOT_INITIALIZED: _DEVICE,
        CKR.DEVICE_MEMORY: _MEMORY,
        CKR.HOST_MEMORY: _MEMORY,
        CKR.PIN_INCORRECT: _PIN,
        CKR.PIN_INVALID: _PIN,
        CKR.PIN_LEN_RANGE: _PIN,
        CKR.PIN_LOCKED: _PIN,
        CKR.PIN_EXPIRED: _PIN,
        # No PIN was tried. SoftHSM says so of a token that another process is logging in to.
        CKR.USER_PIN_NOT_INITIALIZED: _DEVICE,
    }
)


class CryptokiError(ck.PKCS11Error):
    """A return code of a call that was not made through python-pkcs11."""

    def __init__(self, function: str, code: int) -> None:
        """Name the function and its return code."""
        self.code = _named(code)
        super().__init__(f"{function}: {_text(self.code)}")


# python-pkcs11 has a class for most codes, named like the code (SessionHandleInvalid), but for
_OTHER_SPELLINGS: Mapping[type[ck.PKCS11Error], CKR] = MappingProxyType(
    {
        ck.AnotherUserAlreadyLoggedIn: CKR.USER_ANOTHER_ALREADY_LOGGED_IN,
        ck.FunctionCancelled: CKR.FUNCTION_CANCELED,
        ck.TokenNotRecognised: CKR.TOKEN_NOT_RECOGNIZED,
    }
)
_BY_CLASS_NAME = {code.name.replace("_", "").lower(): code for code in CKR}
# For the others it raises its base class with a text ("Should never see this").
_BY_TEXT: Mapping[str, CKR] = MappingProxyType(
    {
        "Buffer was too small": CKR.BUFFER_TOO_SMALL,
        "already initialized": CKR.CRYPTOKI_ALREADY_INITIALIZED,
        "not initialized": CKR.CRYPTOKI_NOT_INITIALIZED,
        "Parallel not supported": CKR.SESSION_PARALLEL_NOT_SUPPORTED,
        "User type invalid": CKR.USER_TYPE_INVALID,
    }
)
_UNMAPPED = re.compile(r"Unmapped error code (0x[0-9a-f]+)")


def return_code(error: ck.PKCS11Error) -> int | None:
    """The return code behind a python-pkcs11 exception.

    A :class:`CKR`, or the number of a code that v2.40 does not name; None where the exception
    stands for no return code (python-pkcs11's own, such as NoSuchKey).
    """
    if isinstance(error, CryptokiError):
        return error.code
    if type(error) is not ck.PKCS11Error:
        kind = type(error)
        return _OTHER_SPELLINGS.get(kind) or _BY_CLASS_NAME.get(kind.__name__.lower())
    text = str(error)
    if unmapped := _UNMAPPED.fullmatch(text):
        return _named(int(unmapped[1], 16))
    return next((code for part, code in _BY_TEXT.items() if part in text), None)


def code_name(error: ck.PKCS11Error) -> str:
    """Name of the return code behind a python-pkcs11 exception, without ``CKR_``."""
    code = return_code(error)
    return type(error).__name__ if code is None else _text(code)


def is_vendor_defined(error: ck.PKCS11Error) -> bool:
    """Whether the return code is a vendor's own (CKR_VENDOR_DEFINED and above)."""
    code = return_code(error)
    return code is not None and code >= CKR.VENDOR_DEFINED


def recovery_of(error: ck.PKCS11Error) -> Recovery | None:
    """The row for this error; None when the code speaks of the operation, not the connection."""
    code = return_code(error)
    return RECOVERY.get(code) if isinstance(code, CKR) else None


def typed_error(error: ck.PKCS11Error) -> errors.HsmwrapError:
    """The error that the caller gets for this answer of the HSM."""
    recovery = recovery_of(error)
    kind = errors.HsmError if recovery is None else recovery.error
    return kind(f"the HSM answered {code_name(error)}")


def _named(code: int) -> int:
    """The :class:`CKR`; the same number for a code that v2.40 does not name."""
    try:
        return CKR(code)
    except ValueError:
        return code


def _text(code: int) -> str:
    return code.name if isinstance(code, CKR) else f"{code:#x}"
