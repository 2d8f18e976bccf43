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
from pkcs11.mechanisms import Mechanism

from hsmwrap import errors
from hsmwrap.ckr import CKR, answered
from hsmwrap.pkcs11.binding import traits


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


BY_REMEDY: Mapping[Remedy, Recovery] = MappingProxyType(
    {row.remedy: row for row in (_SESSION, _LOGIN, _HANDLE, _COUNT, _DEVICE, _MEMORY, _PIN)}
)
"""For return codes of a vendor's own: its profile names the remedy."""


class CryptokiError(ck.PKCS11Error):
    """A return code of a call that was not made through python-pkcs11."""

    def __init__(self, function: str, code: int, mechanism: int | None = None) -> None:
        """Name the function (``C_Login``), its return code, and the mechanism if it has one."""
        self.code, self.function, self.mechanism = _named(code), function, mechanism
        super().__init__(str(Answer(self.code, function, mechanism)))


class HsmLost(ck.PKCS11Error):
    """What keeps the HSM token from being connected to, in words; it may be no return code.

    It recovers as a lost HSM does, whatever the module answered.

    Attributes:
        name: Of the return code of ``cause``, for metrics.
    """

    def __init__(self, reason: str, cause: ck.PKCS11Error | None = None) -> None:
        """Say why, with what the module answered, if it is an answer."""
        self.name = type(self).__name__ if cause is None else code_name(cause)
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a PKCS#11 function answered; ``str()`` is :func:`hsmwrap.ckr.answered`.

    Attributes:
        code: The return code.
        function: Name of the function; None where it cannot be told.
        mechanism: Number of the mechanism, where the function takes one.
    """

    code: int
    function: str | None = None
    mechanism: int | None = None

    def __str__(self) -> str:
        mechanism = None if self.mechanism is None else mechanism_name(self.mechanism)
        return answered(self.code, self.function, mechanism)


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
    if isinstance(error, HsmLost):
        return None
    if type(error) is not ck.PKCS11Error:
        kind = type(error)
        return _OTHER_SPELLINGS.get(kind) or _BY_CLASS_NAME.get(kind.__name__.lower())
    text = str(error)
    if unmapped := _UNMAPPED.fullmatch(text):
        return _named(int(unmapped[1], 16))
    return next((code for part, code in _BY_TEXT.items() if part in text), None)


def code_name(error: ck.PKCS11Error) -> str:
    """Name of the return code behind a python-pkcs11 exception, without ``CKR_``: for metrics."""
    if isinstance(error, HsmLost):
        return error.name
    code = return_code(error)
    if code is None:
        return type(error).__name__
    return code.name if isinstance(code, CKR) else f"{code:#x}"


def answer_of(error: ck.PKCS11Error) -> Answer | None:
    """What the HSM answered; None where the exception is not the answer of an HSM.

    Ask while the exception has its traceback: python-pkcs11 says only there which function it was.
    """
    code = return_code(error)
    if code is None:
        return None
    if isinstance(error, CryptokiError):
        return Answer(code, error.function, error.mechanism)
    if error.args and type(error) is not ck.PKCS11Error:
        return None  # raised by hsmwrap, or by python-pkcs11 for a wrong argument
    function = _function(error)
    if code == CKR.FUNCTION_FAILED and function == "C_GetAttributeValue":
        return None  # python-pkcs11 makes this code of every other (field note 33)
    return Answer(code, function, getattr(error, "mechanism", None))


def said(error: ck.PKCS11Error) -> str:
    """The same in words, for errors, logs and reports: an :class:`Answer`, or what is known."""
    answer = answer_of(error)
    if answer is not None:
        return str(answer)
    if str(error):
        return str(error)
    if return_code(error) == CKR.FUNCTION_FAILED:
        return "C_GetAttributeValue failed, with a code that python-pkcs11 does not tell"
    return f"python-pkcs11 raised {type(error).__name__}"


def mechanism_name(mechanism: int) -> str:
    """``CKM_RSA_PKCS_OAEP``; the number of a mechanism that v2.40 does not name."""
    try:
        return f"CKM_{Mechanism(mechanism).name}"
    except ValueError:
        return f"0x{mechanism:X}"


_FUNCTIONS: Mapping[str, str] = MappingProxyType(
    {
        "lib.__init__": "C_GetInfo",
        "lib.initialize": "C_Initialize",
        "lib.finalize": "C_Finalize",
        "lib.get_slots": "C_GetSlotList",
        "Slot.get_token": "C_GetTokenInfo",
        "Slot.get_mechanisms": "C_GetMechanismList",
        "Slot.get_mechanism_info": "C_GetMechanismInfo",
        "Token.open": "C_OpenSession",
        "Session.close": "C_CloseSession",
        "Session.create_object": "C_CreateObject",
        "Session.generate_key_from_attrs": "C_GenerateKey",
        "Session.generate_keypair_from_attrs": "C_GenerateKeyPair",
        "SearchIter._initiate": "C_FindObjectsInit",
        "SearchIter.__next__": "C_FindObjects",
        "SearchIter._finalize": "C_FindObjectsFinal",
        "ObjectHandleWrapper.get_attribute_list": "C_GetAttributeValue",
        "ObjectHandleWrapper.__setitem__": "C_SetAttributeValue",
        "ObjectHandleWrapper.destroy": "C_DestroyObject",
        "ObjectHandleWrapper.copy": "C_CopyObject",
        "EncryptMixin._encrypt": "C_Encrypt",
        "DecryptMixin._decrypt": "C_Decrypt",
        "SignMixin._sign": "C_Sign",
        "WrapMixin.wrap_key": "C_WrapKey",
        "UnwrapMixin.unwrap_key": "C_UnwrapKey",
        "DeriveMixin.derive_key": "C_DeriveKey",
    }
)
"""The function that a method of python-pkcs11 calls, by the method's name in tracebacks."""
_INITIATES = "KeyOperation._initiate"  # of C_EncryptInit, C_DecryptInit and C_SignInit


# python-pkcs11 logs in while it opens a session: the codes that only the opening answers.
_OF_OPENING = frozenset(
    {
        CKR.SESSION_COUNT,
        CKR.SESSION_PARALLEL_NOT_SUPPORTED,
        CKR.SESSION_READ_WRITE_SO_EXISTS,
        CKR.SLOT_ID_INVALID,
        CKR.TOKEN_NOT_PRESENT,
        CKR.TOKEN_WRITE_PROTECTED,
    }
)


def _function(error: ck.PKCS11Error) -> str | None:
    found, initiates, trace = None, "", error.__traceback__
    while trace is not None:
        method = trace.tb_frame.f_code.co_name.removeprefix("pkcs11._pkcs11.")
        found = _FUNCTIONS.get(method, found)
        initiates = "Init" if method == _INITIATES else initiates
        trace = trace.tb_next
    if return_code(error) not in _OF_OPENING:
        found = getattr(error, "function", found)
    return found and found + initiates


def is_vendor_defined(error: ck.PKCS11Error) -> bool:
    """Whether the return code is a vendor's own (CKR_VENDOR_DEFINED and above)."""
    code = return_code(error)
    return code is not None and code >= CKR.VENDOR_DEFINED


def recovery_of(error: ck.PKCS11Error) -> Recovery | None:
    """The row for this error; None when the code speaks of the operation, not the connection."""
    if isinstance(error, HsmLost):
        return _DEVICE
    code = return_code(error)
    if isinstance(code, CKR) or code is None:
        return None if code is None else RECOVERY.get(code)
    return traits.behind(error).return_codes.get(code)


def typed_error(error: ck.PKCS11Error) -> errors.HsmwrapError:
    """The error that the caller gets for this answer of the HSM."""
    recovery = recovery_of(error)
    kind = errors.HsmError if recovery is None else recovery.error
    return kind(said(error))


def _named(code: int) -> int:
    """The :class:`CKR`; the same number for a code that v2.40 does not name."""
    try:
        return CKR(code)
    except ValueError:
        return code
