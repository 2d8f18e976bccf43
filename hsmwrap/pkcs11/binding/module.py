"""Loading a PKCS#11 module so that threads are safe.

python-pkcs11 calls ``C_Initialize(NULL)`` and releases the GIL around every call. By the standard
(PKCS#11 v2.40, 5.4) NULL promises that only one thread will ever call, so a module may switch its
locks off; SoftHSM does, and eight threads crash it (field note 1). :class:`Module` is
python-pkcs11's own library class with ``C_Initialize`` done right: ``CKF_OS_LOCKING_OK``, and
library parameters in ``pReserved`` where a module (NSS) wants some.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
from typing import Any, Protocol, Self
from weakref import WeakSet

from pkcs11._pkcs11 import lib  # the class behind the pkcs11.lib() factory
from pkcs11.exceptions import PKCS11Error, UserAlreadyLoggedIn
from pkcs11.types import PROTECTED_AUTH, Token

from hsmwrap.ckr import CKR
from hsmwrap.errors import ConfigurationError
from hsmwrap.pkcs11.binding import filenumbers, traits
from hsmwrap.pkcs11.binding.mechanisms import note_mechanisms, noted
from hsmwrap.pkcs11.binding.returncodes import CryptokiError

_CKF_OS_LOCKING_OK = 0x2
_CKS_OTHERS = (0, 2, 4)  # public sessions, and the security officer's; a vendor has more for users


_OURS: dict[str, bool] = {}
"""Modules of this process that we initialised, also where finalising them failed since; and whether
they lock."""

_log = logging.getLogger(__name__)


class _Pin(Protocol):
    """What is needed here of :class:`hsmwrap.pkcs11.token.pin.Pin`, which is a layer above."""

    utf8: bytearray


class _InitializeArgs(ctypes.Structure):
    """CK_C_INITIALIZE_ARGS (PKCS#11 v2.40, 3.7)."""

    _fields_ = (
        ("create_mutex", ctypes.c_void_p),
        ("destroy_mutex", ctypes.c_void_p),
        ("lock_mutex", ctypes.c_void_p),
        ("unlock_mutex", ctypes.c_void_p),
        ("flags", ctypes.c_ulong),
        ("reserved", ctypes.c_char_p),
    )


class _SessionInfo(ctypes.Structure):
    """CK_SESSION_INFO (PKCS#11 v2.40, 3.3)."""

    _fields_ = (
        ("slot_id", ctypes.c_ulong),
        ("state", ctypes.c_ulong),
        ("flags", ctypes.c_ulong),
        ("device_error", ctypes.c_ulong),
    )


_CIPHER_INIT = ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong)
_CIPHER = ctypes.CFUNCTYPE(
    ctypes.c_ulong,
    ctypes.c_ulong,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_ulong),
)


class _FunctionListHead(ctypes.Structure):
    """The first entries of CK_FUNCTION_LIST; the rest is python-pkcs11's business."""

    _fields_ = (
        ("version", ctypes.c_ubyte * 2),
        ("c_initialize", ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.POINTER(_InitializeArgs))),
        ("c_finalize", ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_void_p)),
        ("_until_c_get_session_info", ctypes.c_void_p * 13),
        (
            "c_get_session_info",
            ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_ulong, ctypes.POINTER(_SessionInfo)),
        ),
        ("_until_c_login", ctypes.c_void_p * 2),
        (
            "c_login",
            ctypes.CFUNCTYPE(
                ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong
            ),
        ),
        ("c_logout", ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_ulong)),
        ("_until_c_destroy_object", ctypes.c_void_p * 2),
        ("c_destroy_object", ctypes.CFUNCTYPE(ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong)),
        ("_until_c_get_attribute_value", ctypes.c_void_p),
        (
            "c_get_attribute_value",
            ctypes.CFUNCTYPE(
                ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong
            ),
        ),
        ("_until_c_encrypt_init", ctypes.c_void_p * 4),
        ("c_encrypt_init", _CIPHER_INIT),
        ("c_encrypt", _CIPHER),
        ("_until_c_decrypt_init", ctypes.c_void_p * 2),
        ("c_decrypt_init", _CIPHER_INIT),
        ("c_decrypt", _CIPHER),
    )


def parameters_of(given: str | bytes | None) -> bytes | None:
    """What ``pReserved`` points to; ctypes puts a zero after it."""
    return (given.encode() if isinstance(given, str) else given) or None


class Module(lib):
    """A loaded and initialised PKCS#11 module.

    Attributes:
        owned: False if other code of this process had initialised the module before; then
            ``finalize`` leaves it alone.
        os_locking: Whether C_Initialize was told of threads. False where the module cannot lock
            (CANT_LOCK), where other code had initialised it, and where it hands out private
            function tables (p11-kit's client), so that only python-pkcs11 can initialise its own.
            Such a module is to be called by one thread at a time.
    """

    owned: bool
    os_locking: bool

    def __new__(cls, path: str, _library_parameters: str | bytes | None = None) -> Self:
        """Load the shared object at ``path``.

        Raises:
            ConfigurationError: It is not there, or is not a PKCS#11 module.
        """
        try:
            # A Cython class: the path goes to its __cinit__, which the type stub does not show.
            return super().__new__(cls, path)  # type: ignore[call-arg]
        except PKCS11Error as error:
            raise ConfigurationError(
                f"cannot load PKCS#11 module {path}: {error}; it has to be the HSM vendor's shared "
                "object with C_GetFunctionList"
            ) from None

    def __init__(self, path: str, library_parameters: str | bytes | None = None) -> None:
        """Initialise the module.

        Args:
            path: The shared object.
            library_parameters: For ``pReserved``: a string (NSS softokn needs its configdir
                there), or the bytes of a structure.
        """
        self._parameters = parameters_of(library_parameters)
        self._functions = shared_function_list(path)
        self.os_locking = self._functions is not None
        self.owned = False
        self._path = path
        note_mechanisms()
        super().__init__(path)
        _LOADED.add(self)

    def initialize(self) -> None:
        """Call ``C_Initialize`` with OS locking; in a forked child, start over.

        Raises:
            PKCS11Error: The module refuses.
        """
        if self._functions is None:
            super().initialize()
            self.owned = True
            return
        if not self.owned:
            self.owned = self._initialize(self._functions)
            if not self.owned:
                _log.warning(
                    "the module was initialised by other code", extra={"pkcs11_module": self._path}
                )

    def restart_after_fork(self) -> None:
        """Initialise again in a child; the parent's state here is a copy that must not be used.

        PKCS#11 v2.40, 5.4: the child calls ``C_Initialize``. SoftHSM inherits 'initialised' and
        refuses that, so there the inherited copy is finalised first.
        """
        if self._functions is None:
            # p11-kit has noticed the new process and says so; python-pkcs11 has to hear it.
            with contextlib.suppress(PKCS11Error):
                super().finalize()
            super().initialize()
            return
        _OURS.pop(self._path, None)
        if not self._initialize(self._functions):
            with filenumbers.kept():
                self._functions.c_finalize(None)
            self._initialize(self._functions)
        self.owned = self._path in _OURS

    def finalize(self) -> None:
        """Call ``C_Finalize`` if we initialised the module. No call may be in flight.

        Raises:
            PKCS11Error: The module refuses, twice; it is still initialised, and still ours.
        """
        if self._functions is None:
            super().finalize()
        elif self.owned:
            with filenumbers.kept():
                code = self._functions.c_finalize(None) and self._functions.c_finalize(None)
            if code not in (CKR.OK, CKR.CRYPTOKI_NOT_INITIALIZED):
                raise CryptokiError("C_Finalize", code)
            self.owned = False
            _OURS.pop(self._path, None)

    def log_in(self, session: Any, pin: _Pin | None) -> None:
        """Log the application in through a session that was opened without PIN.

        python-pkcs11 logs in only while it opens a session, loses that session's handle when
        the application is logged in already, and logs it out when it closes it (field note 4).
        Without a PIN it is typed at the HSM token (protected authentication path).

        Raises:
            PKCS11Error: The HSM token refuses; being logged in already is not a refusal.
        """
        if self._functions is None:
            self._log_in_by_opening(session, pin)
            return
        code = self._log_in_as(traits.here().user_type, self._functions, session.handle, pin)
        if code not in (CKR.OK, CKR.USER_ALREADY_LOGGED_IN):
            raise CryptokiError("C_Login", code)

    def open_officer_session(self, token: Token, pin: _Pin | None, mapper: Any) -> Any:
        """Open a read-write session with the security officer's login.

        Without a PIN it is typed at the HSM token. :meth:`close_officer_session` ends it.

        Raises:
            PKCS11Error: The HSM token refuses.
        """
        if self._functions is None:
            typed = PROTECTED_AUTH if pin is None else pin
            with noted("function", "C_Login"):
                return token.open(rw=True, so_pin=typed, attribute_mapper=mapper)
        session: Any = token.open(rw=True, attribute_mapper=mapper)
        code = self._log_in_as(traits.here().officer_type, self._functions, session.handle, pin)
        if code != CKR.OK:
            with contextlib.suppress(PKCS11Error):
                session.close()
            raise CryptokiError("C_Login", code)
        return session

    def close_officer_session(self, session: Any) -> None:
        """Log the security officer out; what was made is there, whatever the HSM says to this."""
        if self._functions is not None:  # python-pkcs11 logs out those that it has logged in
            self._functions.c_logout(session.handle)
        with contextlib.suppress(PKCS11Error):
            session.close()

    def is_logged_in(self, session: Any) -> bool:
        """Whether the application is logged in, as far as this session sees.

        Without a login, a search does not fail: it finds no private object. True where it
        cannot be told (private function tables).

        Raises:
            PKCS11Error: The session is dead.
        """
        if self._functions is None:
            return True
        info = _SessionInfo()
        code = self._functions.c_get_session_info(session.handle, ctypes.byref(info))
        if code != CKR.OK:
            raise CryptokiError("C_GetSessionInfo", code)
        return info.state not in _CKS_OTHERS

    @staticmethod
    def _log_in_as(user_type: int, functions: Any, handle: int, pin: _Pin | None) -> int:
        # A frame of its own, which has ended when the answer becomes an exception.
        if pin is None:
            return int(functions.c_login(handle, user_type, None, 0))
        in_place = (ctypes.c_char * len(pin.utf8)).from_buffer(pin.utf8)
        code: int = functions.c_login(handle, user_type, in_place, len(pin.utf8))
        return code

    def _log_in_by_opening(self, session: Any, pin: _Pin | None) -> None:
        # Only python-pkcs11 reaches this function table. The session that logs in stays open
        # and is forgotten: closing it would log out.
        typed = PROTECTED_AUTH if pin is None else pin
        with contextlib.suppress(UserAlreadyLoggedIn), noted("function", "C_Login"):
            session.token.open(rw=True, user_pin=typed)

    def _initialize(self, functions: _FunctionListHead) -> bool:
        """Initialise it unless it is; return whether it is ours to finalise."""
        arguments = _InitializeArgs(flags=_CKF_OS_LOCKING_OK, reserved=self._parameters)
        code = functions.c_initialize(ctypes.byref(arguments))
        locks = code != CKR.CANT_LOCK
        if not locks:
            arguments.flags = 0
            code = functions.c_initialize(ctypes.byref(arguments))
        if code not in (CKR.OK, CKR.CRYPTOKI_ALREADY_INITIALIZED):
            raise CryptokiError("C_Initialize", code)
        if code == CKR.OK:
            _OURS[self._path] = locks
        # Of one that other code initialised it is unknown whether it was told of threads.
        self.os_locking = _OURS.get(self._path, False)
        return self._path in _OURS


_LOADED: WeakSet[Module] = WeakSet()


@atexit.register
def _stay_loaded_at_exit() -> None:
    # python-pkcs11 unloads a module when its object is deallocated. At the end of the interpreter
    # that fails (the class is torn down before), and daemon threads may still be inside.
    for module in list(_LOADED):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(module))


def shared_function_list(path: str) -> Any:
    """The module's function list if every caller gets the same one, else None (field note 2)."""
    library = ctypes.CDLL(path)
    get = library.C_GetFunctionList
    get.argtypes = (ctypes.POINTER(ctypes.POINTER(_FunctionListHead)),)
    get.restype = ctypes.c_ulong
    first, second = (ctypes.POINTER(_FunctionListHead)() for _ in range(2))
    if get(ctypes.byref(first)) != CKR.OK or get(ctypes.byref(second)) != CKR.OK:
        return None
    same = ctypes.addressof(first.contents) == ctypes.addressof(second.contents)
    return first.contents if same else None
