"""Logging in with the user PIN: not against the HSM token's warning, not again after a refusal.

HSM tokens lock after a few wrong PINs, some for good. So after a refusal the backend stops all
logins for as long as it is open, and before each login the token is asked whether the next try may
be the last.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

from pkcs11.constants import TokenFlag
from pkcs11.exceptions import PKCS11Error
from pkcs11.types import Session

from hsmwrap.errors import HsmUnavailable, PinError
from hsmwrap.pkcs11.binding.module import Module
from hsmwrap.pkcs11.binding.returncodes import Remedy, is_vendor_defined, recovery_of, said
from hsmwrap.pkcs11.token.pin import PinSource

VENDOR_LOGINS = 3
"""Answers to C_Login in a row with a vendor's own code, until no more is tried."""

_DOUBTFUL_PIN = (
    TokenFlag.USER_PIN_COUNT_LOW,
    TokenFlag.USER_PIN_FINAL_TRY,
    TokenFlag.USER_PIN_LOCKED,
)


class VendorLogin(HsmUnavailable):
    """C_Login answered with a vendor's own code, which may be its word for a refused PIN."""


class UserLogin:
    """Logs in, one thread at a time, until the PIN is refused.

    Attributes:
        stopped: Why logins have stopped; None while they are allowed.
    """

    def __init__(self, pin: PinSource | None, *, force: bool) -> None:
        """Take where the PIN is, and whether to ignore warnings.

        Without a PIN no login is needed, or it is typed at the HSM token, as that says.
        """
        self.stopped: str | None = None
        self._pin = pin
        self._force = force
        self._vendor_logins = 0

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
            PinError: Refused, now or before, or the next wrong PIN may lock the HSM token.
            VendorLogin: Perhaps refused.
            PKCS11Error: The HSM token does not answer.
        """
        if self._pin is None and not flags_of(session) & TokenFlag.PROTECTED_AUTHENTICATION_PATH:
            return
        self.require_not_stopped()
        self._heed_warnings(session)
        try:
            typed: AbstractContextManager[None] = nullcontext()
            with typed if self._pin is None else self._pin.read() as pin:
                module.log_in(session, pin)
        except PKCS11Error as error:
            answer, recovery = said(error), recovery_of(error)
            # Here and not where it is recovered from: no other thread may log in in between.
            if recovery is not None and recovery.remedy is Remedy.STOP:
                self.stop(answer)
            if is_vendor_defined(error):
                self._doubt(answer)
            raise
        self._vendor_logins = 0

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

    def _heed_warnings(self, session: Session) -> None:
        flags = flags_of(session)
        doubtful = [str(flag.name) for flag in _DOUBTFUL_PIN if flags & flag]
        if doubtful and not self._force:
            raise PinError(
                f"not logging in: the HSM token says {', '.join(doubtful)}, so a wrong PIN may "
                "lock it. Check the PIN, then set force_login once"
            )

    def _doubt(self, answer: str) -> NoReturn:
        """A few tries, each after the breaker's backoff."""
        self._vendor_logins += 1
        if self._vendor_logins >= VENDOR_LOGINS:
            self.stop(answer)
        raise VendorLogin(answer)


def flags_of(session: Session) -> TokenFlag:
    """The HSM token's flags now."""
    return session.token.slot.get_token().flags
