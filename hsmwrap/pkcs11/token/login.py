"""Logging in with the user PIN: not against the HSM token's warning, not again after a refusal.

HSM tokens lock after a few wrong PINs, some for good. So after a refusal the backend stops all
logins for as long as it is open, and before each login the token is asked whether the next try may
be the last. After an answer of no known meaning it is asked whether that was about the PIN; where
that stays unknown, three such answers in a row are a refusal.

USER_PIN_COUNT_LOW says that the last PIN that was tried on the token was wrong, by whichever
program. A PIN that this process has logged in with is tried all the same; another one once.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

from pkcs11.constants import TokenFlag
from pkcs11.exceptions import PKCS11Error
from pkcs11.types import Session

from hsmwrap.errors import ConfigurationError, HsmUnavailable, HsmwrapError, PinError
from hsmwrap.pkcs11.binding import traits
from hsmwrap.pkcs11.binding.module import Module
from hsmwrap.pkcs11.binding.returncodes import (
    HsmLost,
    Remedy,
    is_vendor_defined,
    recovery_of,
    said,
)
from hsmwrap.pkcs11.token.pin import Pin, PinSource

UNKNOWN_LOGINS = 3
"""Answers to C_Login in a row that may be about the PIN, until no more is tried."""

_LAST_TRY = TokenFlag.USER_PIN_FINAL_TRY | TokenFlag.USER_PIN_LOCKED
_WARNINGS = TokenFlag.USER_PIN_COUNT_LOW | _LAST_TRY

_refused: set[bytes] = set()
"""Serial numbers of HSM tokens that refused a PIN of this process after the last right one."""

_log = logging.getLogger(__name__)


class NoLogin(HsmUnavailable):
    """Not logged in: C_Login may have refused the PIN, or the PIN cannot be read again."""


class UnknownLogin(HsmLost):
    """C_Login answered with a code that says nothing of the PIN, or may be a refusal."""


class UserLogin:
    """Logs in, one thread at a time, until the PIN is refused.

    Attributes:
        stopped: Why logins have stopped; None while they are allowed.
        in_doubt: Whether the last answer to C_Login may have been a refusal.
    """

    def __init__(self, pin: PinSource | None, *, force: bool) -> None:
        """Take where the PIN is, and whether to ignore warnings.

        Without a PIN no login is needed, or it is typed at the HSM token, as that says.
        """
        self.stopped: str | None = None
        self.in_doubt = False
        self._pin = pin
        self._force = force
        self._worked = False
        self._unknown_answers = 0

    def require_not_stopped(self) -> None:
        """Return if there may be another login.

        Raises:
            PinError: The PIN was refused before. A new exception each time: one would
                gather the frames of every thread that raises it.
        """
        if self.stopped is not None:
            raise PinError(self.stopped)

    def log_in(self, module: Module, session: Session) -> None:
        """Log in through a session that was opened without PIN; the caller holds a lock.

        Raises:
            ConfigurationError: The HSM token requires a PIN, and no setting says where it is.
            PinError: Refused, now or before, or the next wrong PIN may lock the HSM token.
            NoLogin: Perhaps refused, or a PIN that was read before cannot be read now.
            PKCS11Error: The HSM token does not answer.
        """
        flags = flags_of(session)
        if self._pin is None and not flags & TokenFlag.PROTECTED_AUTHENTICATION_PATH:
            if flags & TokenFlag.LOGIN_REQUIRED:
                raise ConfigurationError(
                    "no PIN setting, but the HSM token requires a login, and has no PIN pad: set "
                    "pin_file"
                )
            return
        self.require_not_stopped()
        serial = bytes(session.token.serial)
        self._heed_warnings(flags, serial)
        try:
            with self._read_pin() as pin:
                module.log_in(session, pin)
        except PKCS11Error as error:
            # Here and not where it is recovered from: no other thread may log in in between.
            recovery = recovery_of(error)
            if recovery is None or recovery.remedy is Remedy.STOP:
                _refused.add(serial)
                self._refuse(error, session, warned=bool(flags & _WARNINGS))
            raise
        self._worked = True
        self.in_doubt = False
        self._unknown_answers = 0
        _refused.discard(serial)

    def _read_pin(self) -> AbstractContextManager[Pin | None]:
        if self._pin is None:
            return nullcontext()
        try:
            return self._pin.read()
        except HsmwrapError as error:
            if not self._worked:
                raise
            raise NoLogin(f"cannot log in again: {error}") from None

    def stop(self, answer: str) -> NoReturn:
        """Allow no more logins, because of this answer (:func:`said`).

        Raises:
            PinError: Always.
        """
        self.stopped = (
            f"{answer}; not trying again, as that may lock the HSM token. Correct the PIN and open "
            "the backend again"
        )
        raise PinError(self.stopped)

    def _heed_warnings(self, flags: TokenFlag, serial: bytes) -> None:
        """Return if a login may be tried.

        Raises:
            PinError: A wrong PIN may lock the HSM token.
        """
        flags &= _WARNINGS
        if not flags or self._force:
            return
        said_so = _names(flags)
        if flags & _LAST_TRY or (serial in _refused and not self._worked):
            raise PinError(
                f"not logging in: the HSM token says {said_so}, so a wrong PIN may lock it. Check "
                "the PIN, then set force_login once"
            )
        _log.warning("the last PIN given to the HSM token was wrong", extra={"flags": said_so})

    def _refuse(self, error: PKCS11Error, session: Session, *, warned: bool) -> NoReturn:
        """Stop after an answer about the PIN; an answer about the HSM is one of a lost HSM.

        Which it is, a code that speaks of a PIN tells, or the token's warning, which is there after
        a wrong PIN. Without it, another code of the standard is not about a PIN that has worked
        before. What is left may be a refusal, and is one the third time in a row: a vendor's code,
        and any to a PIN that has never worked, unless the profile says that the token warns.
        A vendor's is tried again after the breaker's backoff; others may be a collision with
        another process (field note 35): they are tried again at once.
        """
        answer = said(error)
        self.in_doubt = True
        if recovery_of(error) is not None or (warned and not self._worked):
            self.stop(answer)
        flags = _warnings_of(session)
        if flags and not warned:
            self.stop(f"{answer}, and the HSM token says {_names(flags)}")
        of_the_hsm = self._worked and not is_vendor_defined(error)
        if flags or flags is None or not (of_the_hsm or traits.here().tells_wrong_pins):
            self._unknown_answers += 1
        if self._unknown_answers >= UNKNOWN_LOGINS:
            self.stop(answer)
        if is_vendor_defined(error):
            raise NoLogin(answer)
        raise UnknownLogin(answer, error)


def _warnings_of(session: Session) -> TokenFlag | None:
    """The HSM token's warnings now; None where it does not answer."""
    try:
        return flags_of(session) & _WARNINGS
    except PKCS11Error:
        return None


def _names(flags: TokenFlag) -> str:
    return ", ".join(str(flag.name) for flag in TokenFlag if flag & flags)


def flags_of(session: Session) -> TokenFlag:
    """The HSM token's flags now."""
    return session.token.slot.get_token().flags
