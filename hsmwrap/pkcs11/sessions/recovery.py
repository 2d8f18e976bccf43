"""One attempt at an operation, and what mends the connection after it failed.

What is mended, and how, is data: :data:`hsmwrap.pkcs11.binding.returncodes.RECOVERY`.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from pkcs11.exceptions import PKCS11Error, SessionHandleInvalid
from pkcs11.types import Object

from hsmwrap.ckr import CKR
from hsmwrap.errors import (
    ConfigurationError,
    HsmUnavailable,
    HsmwrapError,
    InvalidCiphertext,
    InvalidImportToken,
    InvalidKeyMaterial,
    KeyNotFound,
    PoolTimeout,
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
from hsmwrap.pkcs11.sessions._repeats import RepeatedFailures
from hsmwrap.pkcs11.sessions.connecting import PAUSES, Connected, Connector, sleep_with_jitter
from hsmwrap.pkcs11.sessions.pool import SessionPool, StalePool
from hsmwrap.pkcs11.sessions.session import PooledSession
from hsmwrap.pkcs11.token.login import NoLogin

CLIENT_ERRORS = (InvalidCiphertext, InvalidImportToken, InvalidKeyMaterial, KeyNotFound)
"""What an operation raises when the client's input is at fault, not the HSM."""

LOGIN_PAUSE = 0.4
"""Seconds before C_Login is tried again that may have refused the PIN: there are few tries, and
SoftHSM answers GENERAL_ERROR while another process logs in (field note 35)."""

_GENTLE = frozenset({Remedy.NEW_SESSION, Remedy.LOG_IN, Remedy.FIND_AGAIN})
_DEAD_SESSION = frozenset({CKR.SESSION_HANDLE_INVALID, CKR.SESSION_CLOSED})

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
        operation: What was attempted.
        held: What the breaker let the attempt through with.
        generation: The module's generation.
        logins: How often that generation had logged in.
    """

    code: int | None
    name: str
    said: str
    recovery: Recovery | None
    error: HsmwrapError
    operation: object
    held: Pass
    generation: int
    logins: int


class Attempts:
    """Runs operations in sessions, each once, and mends the connection after a failure.

    Attributes:
        recoveries: How often each return code was recovered from.
        proved: When a call succeeded last, by ``time.monotonic``.
    """

    def __init__(
        self,
        host: ModuleHost,
        connector: Connector,
        breaker: Breaker,
        reconnector: Reconnector,
        *,
        trial: Callable[[PooledSession], object],
        session_wait: float,
    ) -> None:
        """Take the parts of a connection.

        Args:
            host: The module.
            connector: Finds the HSM token and logs in.
            breaker: Fails fast while the HSM is lost.
            reconnector: Is started then.
            trial: An operation that succeeds if calls do.
            session_wait: How many seconds a call waits for a session.
        """
        self.recoveries: Counter[str] = Counter()
        self.proved = float("-inf")
        self._repeats = RepeatedFailures()
        self._trial = trial
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
        self._repeats.succeeded(_kind(operation))
        self.proved = time.monotonic()
        return result

    def _attempt(self, operation: Callable[[PooledSession], _T], deadline: float, held: Pass) -> _T:
        wait = max(0.0, deadline - time.monotonic())
        generation, logins = self._host.generation, 0
        try:
            with self._host.inside(wait) as (module, generation):
                connected = self._connector.connect(module, generation)
                logins = connected.logins
                return self._lend(connected.pool, operation, deadline)
        except NoLogin as error:
            self._open_breaker(held, str(error))
            raise HsmUnavailable(str(error)) from None
        except PKCS11Error as error:
            failure = Failure(
                return_code(error),
                code_name(error),
                said(error),
                recovery_of(error),
                typed_error(error),
                _kind(operation),
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
        remedy = None if failure.recovery is None else failure.recovery.remedy
        if (remedy is None or remedy in _GENTLE) and (
            failure.held.trial
            or self._repeats.failed(failure.operation)
            or (remedy is None and not self._still_works())
        ):
            remedy = Remedy.RESTART
            failure.error = HsmUnavailable(failure.said)
        if remedy is None:
            self._breaker.undecided(failure.held)
            return False
        self.recoveries[failure.name] += 1
        _log.warning("recovering", extra={"said": failure.said, "remedy": remedy.name})
        try:
            if remedy is Remedy.NEW_SESSION:
                self._close_dead_sessions(failure)
            elif remedy is Remedy.LOG_IN:
                self._log_in_again(failure)
            elif remedy is Remedy.FIND_AGAIN:
                self._connector.epoch.end()
            elif remedy is Remedy.RESTART:
                self._restart(failure)
            elif remedy is Remedy.STOP:
                self._connector.login.stop(failure.said)
            # Fewer sessions come by themselves; the reaper is the caller's.
        finally:
            self._breaker.undecided(failure.held)
        return failure.recovery is None or failure.recovery.retry

    def leave(self, failure: Failure) -> None:
        """Mend nothing; another call may find out whether the HSM is back."""
        self._breaker.undecided(failure.held)

    def _close_dead_sessions(self, failure: Failure) -> None:
        """Let the next attempt have a session that is opened for it."""
        if failure.code not in _DEAD_SESSION:
            return
        with (
            suppress(PKCS11Error, ServiceUnavailable),  # the next attempt says so
            self._host.inside(self._wait) as (_module, generation),
        ):
            connected = self._connector.connected
            if connected is not None and connected.generation == generation:
                connected.pool.close_idle()

    def _log_in_again(self, failure: Failure) -> None:
        try:
            with self._host.inside(self._wait) as (module, generation):
                self._connector.log_in_again(module, generation, failure.logins)
        except NoLogin as error:
            self._open_breaker(failure.held, str(error))
            raise
        except PKCS11Error as error:
            raise typed_error(error) from None

    def _restart(self, failure: Failure) -> None:
        """Restart the module and see whether the HSM token is there again."""
        seen = failure.generation
        for pause in (*PAUSES, None):
            if not self._breaker.is_current(failure.held):
                # another call found out
                raise HsmUnavailable(f"the HSM is unavailable ({failure.said})")
            if self._connector.login.in_doubt:
                sleep_with_jitter(LOGIN_PAUSE)
            try:
                self._host.restart(seen, self._wait)
                with self._host.inside(self._wait) as (module, generation):
                    seen = generation
                    self._prove(self._connector.connect(module, generation))
                break
            except StalePool:
                continue  # another thread has restarted the module
            except PKCS11Error as error:
                if pause is None:
                    self._open_breaker(failure.held, said(error))
                    raise HsmUnavailable(said(error)) from None
            except ServiceUnavailable as error:
                self._open_breaker(failure.held, f"{failure.said}: {error}")
                raise HsmUnavailable(f"the HSM is unavailable ({failure.said}): {error}") from None
            sleep_with_jitter(pause or 0.0)
        self._breaker.succeeded(failure.held)
        _log.warning("HSM module restarted", extra={"generation": self._host.generation})

    def _still_works(self) -> bool:
        """Whether a code of no known meaning speaks of the operation, not of the HSM."""
        try:
            with self._host.inside(self._wait) as (module, generation):
                self._prove(self._connector.connect(module, generation))
        except PKCS11Error:
            return False
        except (StalePool, HsmwrapError):
            pass  # another thread mends it, or the next call finds out
        return True

    def _prove(self, connected: Connected) -> None:
        """Try whether calls succeed again: a login alone does not say so.

        Raises:
            PKCS11Error: They do not.
        """
        # No keys yet is not the HSM's fault, and a session that others hold is one that works.
        with suppress(ConfigurationError, PoolTimeout):
            self._lend(connected.pool, self._trial, time.monotonic() + self._wait)
            self.proved = time.monotonic()

    def _open_breaker(self, held: Pass, reason: str) -> None:
        self._breaker.failed(held, reason)
        self._reconnector.start()


def _kind(operation: Callable[[PooledSession], object]) -> object:
    """The same for each call of one operation, whatever its arguments are."""
    return getattr(operation, "__code__", None)
