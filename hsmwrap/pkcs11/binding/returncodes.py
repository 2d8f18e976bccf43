"""What to do about each PKCS#11 return code: the recovery table, as data, in one place.

The order of the day is the operator's: a dead session costs one session, a lost login one login,
a lost HSM a restart of the module; a wrong PIN stops everything, because retries lock tokens.
Codes that are not listed say something about the one operation that got them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType

from pkcs11 import exceptions as ck

from hsmwrap import errors


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

RECOVERY: Mapping[str, Recovery] = MappingProxyType(
    {
        "SESSION_HANDLE_INVALID": _SESSION,
        "SESSION_CLOSED": _SESSION,
        "OPERATION_ACTIVE": _SESSION,
        "OPERATION_NOT_INITIALIZED": _SESSION,
        "USER_NOT_LOGGED_IN": _LOGIN,
        "OBJECT_HANDLE_INVALID": _HANDLE,
        "KEY_HANDLE_INVALID": _HANDLE,
        "UNWRAPPING_KEY_HANDLE_INVALID": _HANDLE,
        "WRAPPING_KEY_HANDLE_INVALID": _HANDLE,
        "SESSION_COUNT": _COUNT,
        "DEVICE_ERROR": _DEVICE,
        "DEVICE_REMOVED": _DEVICE,
        "TOKEN_NOT_PRESENT": _DEVICE,
        "TOKEN_NOT_RECOGNIZED": _DEVICE,
        "SLOT_ID_INVALID": _DEVICE,
        "CRYPTOKI_NOT_INITIALIZED": _DEVICE,
        "DEVICE_MEMORY": _MEMORY,
        "HOST_MEMORY": _MEMORY,
        "PIN_INCORRECT": _PIN,
        "PIN_INVALID": _PIN,
        "PIN_LEN_RANGE": _PIN,
        "PIN_LOCKED": _PIN,
        "PIN_EXPIRED": _PIN,
        # No PIN was tried. SoftHSM says so of a token that another process is logging in to.
        "USER_PIN_NOT_INITIALIZED": _DEVICE,
    }
)

CKR: Mapping[str, int] = MappingProxyType(
    {
        "HOST_MEMORY": 0x02,
        "SLOT_ID_INVALID": 0x03,
        "CANT_LOCK": 0x0A,
        "DEVICE_ERROR": 0x30,
        "DEVICE_MEMORY": 0x31,
        "DEVICE_REMOVED": 0x32,
        "KEY_HANDLE_INVALID": 0x60,
        "OBJECT_HANDLE_INVALID": 0x82,
        "OPERATION_ACTIVE": 0x90,
        "OPERATION_NOT_INITIALIZED": 0x91,
        "PIN_INCORRECT": 0xA0,
        "PIN_INVALID": 0xA1,
        "PIN_LEN_RANGE": 0xA2,
        "PIN_EXPIRED": 0xA3,
        "PIN_LOCKED": 0xA4,
        "SESSION_CLOSED": 0xB0,
        "SESSION_COUNT": 0xB1,
        "SESSION_HANDLE_INVALID": 0xB3,
        "TOKEN_NOT_PRESENT": 0xE0,
        "TOKEN_NOT_RECOGNIZED": 0xE1,
        "UNWRAPPING_KEY_HANDLE_INVALID": 0xF0,
        "USER_ALREADY_LOGGED_IN": 0x100,
        "USER_NOT_LOGGED_IN": 0x101,
        "USER_PIN_NOT_INITIALIZED": 0x102,
        "WRAPPING_KEY_HANDLE_INVALID": 0x113,
        "CRYPTOKI_NOT_INITIALIZED": 0x190,
        "CRYPTOKI_ALREADY_INITIALIZED": 0x191,
    }
)
"""Return codes by name (PKCS#11 v2.40, header file); those that something here acts on."""

_VENDOR_DEFINED = 0x80000000

_CODE_NAMES = {code: name for name, code in CKR.items()}


class CryptokiError(ck.PKCS11Error):
    """A return code of a call that was not made through python-pkcs11."""

    def __init__(self, function: str, code: int) -> None:
        """Name the function and its return code."""
        self.code = code
        self.name = _CODE_NAMES.get(code, f"{code:#x}")
        super().__init__(f"{function}: {self.name}")


# python-pkcs11 has a class for most codes; these are the ones that the table and messages need.
_NAMES: Mapping[type[Exception], str] = MappingProxyType(
    {
        ck.SessionHandleInvalid: "SESSION_HANDLE_INVALID",
        ck.SessionClosed: "SESSION_CLOSED",
        ck.OperationActive: "OPERATION_ACTIVE",
        ck.OperationNotInitialized: "OPERATION_NOT_INITIALIZED",
        ck.UserNotLoggedIn: "USER_NOT_LOGGED_IN",
        ck.ObjectHandleInvalid: "OBJECT_HANDLE_INVALID",
        ck.KeyHandleInvalid: "KEY_HANDLE_INVALID",
        ck.UnwrappingKeyHandleInvalid: "UNWRAPPING_KEY_HANDLE_INVALID",
        ck.WrappingKeyHandleInvalid: "WRAPPING_KEY_HANDLE_INVALID",
        ck.SessionCount: "SESSION_COUNT",
        ck.DeviceError: "DEVICE_ERROR",
        ck.DeviceRemoved: "DEVICE_REMOVED",
        ck.TokenNotPresent: "TOKEN_NOT_PRESENT",
        ck.TokenNotRecognised: "TOKEN_NOT_RECOGNIZED",
        ck.SlotIDInvalid: "SLOT_ID_INVALID",
        ck.DeviceMemory: "DEVICE_MEMORY",
        ck.HostMemory: "HOST_MEMORY",
        ck.PinIncorrect: "PIN_INCORRECT",
        ck.PinInvalid: "PIN_INVALID",
        ck.PinLenRange: "PIN_LEN_RANGE",
        ck.PinLocked: "PIN_LOCKED",
        ck.PinExpired: "PIN_EXPIRED",
        ck.UserPinNotInitialized: "USER_PIN_NOT_INITIALIZED",
    }
)


def code_name(error: ck.PKCS11Error) -> str:
    """Name of the return code behind a python-pkcs11 exception, without ``CKR_``."""
    if isinstance(error, CryptokiError):
        return error.name
    name = _NAMES.get(type(error))
    if name is not None:
        return name
    # python-pkcs11 has no class for this one, only a text ("should never see this").
    if "not initialized" in str(error):
        return "CRYPTOKI_NOT_INITIALIZED"
    return str(error) if type(error) is ck.PKCS11Error else type(error).__name__


def is_vendor_defined(error: ck.PKCS11Error) -> bool:
    """Whether the return code is a vendor's own (CKR_VENDOR_DEFINED and above)."""
    if isinstance(error, CryptokiError):
        return error.code >= _VENDOR_DEFINED
    # python-pkcs11 has no class for these either, and its text does not tell them from others.
    return type(error) is ck.PKCS11Error


def recovery_of(error: ck.PKCS11Error) -> Recovery | None:
    """The row for this error; None when the code speaks of the operation, not the connection."""
    return RECOVERY.get(code_name(error))
