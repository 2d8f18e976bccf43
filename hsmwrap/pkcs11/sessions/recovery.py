"""One attempt at an operation, and what mends the connection after it failed.

What is mended, and how, is data: :data:`hsmwrap.pkcs11.binding.returncodes.RECOVERY`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pkcs11.exceptions import PKCS11Error, SessionHandleInvalid
from pkcs11.types import Object

from hsmwrap.errors import (
    HsmUnavailable,
    HsmwrapError,
    InvalidCiphertext,
    InvalidImportToken,
    InvalidKeyMaterial,
    KeyNotFound,
    ServiceUnavailable,
)
from hsmwrap.pkcs11.binding.client_errors import may_leave_an_object
from hsmwrap.pkcs11.binding.host import ModuleHost
from hsmwrap.pkcs11.binding.returncodes import (
    Recovery,
    Remedy,
    code_name,
    recovery_of,
    return_code,
    said,
    typed_error,
)
from hsmwrap.pkcs11.sessions._breaker import Breaker, Pass
from hsmwrap.pkcs11.sessions._reconnector import Reconnector
from hsmwrap.pkcs11.sessions.connecting import PAUSES, Connector, sleep_with_jitter
from hsmwrap.pkcs11.sessions.pool import SessionPool, StalePool
from hsmwrap.pkcs11.sessions.session import PooledSession
from hsmwrap.pkcs11.token.login import VendorLogin

CLIENT_ERRORS = (InvalidCiphertext, InvalidImportToken, InvalidKeyMaterial, KeyNotFound)
"""What an operation raises when the client's input is at fault, not the HSM."""

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(slots=True)
class Failure(Exception):
    """An attempt that ended with a return code, and the state that it had seen.

    Attributes:
        code: The return code; None where python-pkcs11 names none.
        name: Its name, for metrics.
        said: What the HSM said, for people.
        recovery: What mends the connection; None where the code speaks of the operation alone.
        error: What the caller gets.
        held: What the breaker let the attempt through with.
        generation: The module's generation.
        logins: How often that generation had logged in.
    """

    code: int | None
    name: str
    said: str
    recovery: Recovery | None
    error: HsmwrapError
    held: Pass
    generation: int
    logins: int


class Attempts:
    """Runs operations in sessions, each once, and mends the connection after a failure.

    Attributes:
        recoveries: How often each return code was recovered from.
    """

    def __init__(
        self,
        host: ModuleHost,
        connector: Connector,
        breaker: Breaker,
        reconnector: Reconnector,
        session_wait: float,
    ) -> None:
        """Take the parts of a connection, and how many seconds a call waits for a session."""
        self.recoveries: Counter[str] = Counter()
        self._host = host
        self._connector = connector
        self._breaker = breaker
        self._reconnector = reconnector
        self._wait = session_wait

    def attempt(self, operation: Callable[[PooledSession], _T]) -> _T:
        """Run the operation once, in a session of its own.

        Raises:
            Failure: It ended with a return code; :meth:`recover` mends what can be mended. The
                caller passes it to that, or to :meth:`leave`: until then no other call may be the
                one that finds out whether a lost HSM is back.
            HsmwrapError: What the operation raised, or what kept it from being run.
        """
        deadline = time.monotonic() + self._wait
        held = self._breaker.check()
        try:
            while True:
                try:
                    result = self._attempt(operation, deadline, held)
                    break
                except StalePool:
                    continue  # the module was restarted while we waited
        except Failure:
            raise  # what it tells of the HSM is for recover to say
        except BaseException:
            self._breaker.undecided(held)
            raise
        self._breaker.succeeded(held)
        return result

    def _attempt(self, operation: Callable[[PooledSession], _T], deadline: float, held: Pass) -> _T:
        wait = max(0.0, deadline - time.monotonic())
        generation, logins = self._host.generation, 0
        try:
            with self._host.inside(wait) as (module, generation):
                connected = self._connector.connect(module, generation)
                logins = connected.logins
                return self._lend(connected.pool, operation, deadline)
        except VendorLogin as error:
            self._open_breaker(held, str(error))
            raise HsmUnavailable(str(error)) from None
        except PKCS11Error as error:
            failure = Failure(
                return_code(error),
                code_name(error),
                said(error),
                recovery_of(error),
                typed_error(error),
                held,
                generation,
                logins,
            )
        raise failure

    @staticmethod
    def _lend(pool: SessionPool, operation: Callable[[PooledSession], _T], deadline: float) -> _T:
        session = pool.acquire(deadline)
        try:
            with session.lock.read():
                return operation(session)
        except CLIENT_ERRORS as error:
            was_tainted, session.tainted = session.tainted, True
            # Before the client is told so: SoftHSM answers GENERAL_ERROR to a key operation that
            # lost its login, as it does to a bad ciphertext (field note 32).
            session.require_login()
            # Nothing is wrong with the session: to close it for each bad ciphertext would let a
            # client make the HSM open sessions and search keys.
            session.tainted = was_tainted or may_leave_an_object(error)
            raise
        except AttributeError as error:
            session.tainted = True
            if isinstance(error.obj, Object):
                # python-pkcs11 made an object whose attributes it could not read: no methods.
                raise SessionHandleInvalid("the attributes of an object cannot be read") from None
            raise
        except BaseException:
            session.tainted = True
            raise
        finally:
            pool.release(session)

    def recover(self, failure: Failure) -> bool:
        """Mend the connection; True if a retry makes sense.

        Raises:
            HsmwrapError: It cannot be mended now.
        """
        recovery = failure.recovery
        if recovery is None:
            self._breaker.undecided(failure.held)
            return False
        self.recoveries[failure.name] += 1
        _log.warning("recovering", extra={"said": failure.said, "remedy": recovery.remedy.name})
        try:
            if recovery.remedy is Remedy.LOG_IN:
                self._log_in_again(failure)
            elif recovery.remedy is Remedy.FIND_AGAIN:
                self._connector.epoch.end()
            elif recovery.remedy is Remedy.RESTART:
                self._restart(failure)
            elif recovery.remedy is Remedy.STOP:
                self._connector.login.stop(failure.said)
            # A new session, or fewer, come by themselves; the reaper is the caller's.
        finally:
            self._breaker.undecided(failure.held)
        return recovery.retry

    def leave(self, failure: Failure) -> None:
        """Mend nothing; another call may find out whether the HSM is back."""
        self._breaker.undecided(failure.held)

    def _log_in_again(self, failure: Failure) -> None:
        try:
            with self._host.inside(self._wait) as (module, generation):
                self._connector.log_in_again(module, generation, failure.logins)
        except PKCS11Error as error:
            raise typed_error(error) from None

    def _restart(self, failure: Failure) -> None:
        """Restart the module and see whether the HSM token is there again."""
        seen = failure.generation
        for pause in (*PAUSES, None):
            if not self._breaker.is_current(failure.held):
                # another call found out
                raise HsmUnavailable(f"the HSM is unavailable ({failure.said})")
            try:
                self._host.restart(seen, self._wait)
                with self._host.inside(self._wait) as (module, generation):
                    seen = generation
                    self._connector.connect(module, generation)
                break
            except PKCS11Error as error:
                if pause is None:
                    self._open_breaker(failure.held, said(error))
                    raise typed_error(error) from None
            except ServiceUnavailable as error:
                self._open_breaker(failure.held, failure.said)
                raise HsmUnavailable(f"the HSM is unavailable ({failure.said}): {error}") from None
            sleep_with_jitter(pause or 0.0)
        self._breaker.succeeded(failure.held)
        _log.warning("HSM module restarted", extra={"generation": self._host.generation})

    def _open_breaker(self, held: Pass, reason: str) -> None:
        self._breaker.failed(held, reason)
        self._reconnector.start()
