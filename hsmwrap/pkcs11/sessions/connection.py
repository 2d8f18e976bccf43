"""A connection to one HSM token: login, sessions, and recovery by return code.

Everything that touches the HSM token goes through :meth:`Connection.run`, which lends a session
to a function, and mends what :mod:`hsmwrap.pkcs11.binding.returncodes` says can be mended: once,
without retrying what must not be retried.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from pkcs11.constants import Attribute
from pkcs11.exceptions import PKCS11Error, SessionHandleInvalid
from pkcs11.types import Object, Session, Token

from hsmwrap import forks
from hsmwrap.ckr import CKR
from hsmwrap.errors import (
    HsmUnavailable,
    HsmwrapError,
    InvalidCiphertext,
    InvalidImportToken,
    InvalidKeyMaterial,
    KeyNotFound,
    ServiceUnavailable,
    TokenSelectionError,
    strip_tracebacks,
)
from hsmwrap.forks import ForkAware
from hsmwrap.gate import Gate
from hsmwrap.pkcs11.binding.host import ModuleHost
from hsmwrap.pkcs11.binding.module import Module
from hsmwrap.pkcs11.binding.returncodes import (
    CryptokiError,
    Recovery,
    Remedy,
    code_name,
    recovery_of,
    return_code,
    typed_error,
)
from hsmwrap.pkcs11.binding.templates import HsmAttributeMapper
from hsmwrap.pkcs11.sessions.breaker import Breaker, Pass
from hsmwrap.pkcs11.sessions.pool import (
    PooledSession,
    SessionPool,
    StalePool,
    close_quietly,
    open_worker_session,
)
from hsmwrap.pkcs11.sessions.reconnector import Reconnector
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.pkcs11.token.login import UserLogin, VendorLogin
from hsmwrap.pkcs11.token.selection import find_token

RESTART_PAUSES = (0.05, 0.1, 0.2, 0.4, 0.6)
"""Seconds between the tries at connecting. SoftHSM writes the token's file at each login, and
another process that looks at that moment sees no token, or one without a PIN, or gets GENERAL_ERROR
for its own login (field note 35). Each pause is varied, for processes that started together."""

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(slots=True)
class _Live:
    """What a connection holds in one generation of the module."""

    generation: int
    token: Token
    login_session: Session
    pool: SessionPool
    logins: int = 1


@dataclass(slots=True)
class Leftover:
    """A token object that a failed operation may leave behind.

    Attributes:
        object_id: Its CKA_ID.
        possible: To be set by the operation right before it makes the object.
    """

    object_id: bytes
    possible: bool = False


@dataclass(slots=True)
class _Failure(Exception):
    """An attempt that ended with a return code, and the state that it had seen."""

    code: int | None
    name: str
    recovery: Recovery | None
    typed: HsmwrapError
    held: Pass
    generation: int = 0
    logins: int = 0


class Connection(ForkAware):
    """One HSM token, shared by all threads of a backend."""

    def __init__(
        self,
        settings: Pkcs11Settings,
        make_room: Callable[[PooledSession], None] = lambda _pooled: None,
        forget: Callable[[], None] = lambda: None,
    ) -> None:
        """Load the module and log in; with ``settings.lazy`` at the first call instead.

        Args:
            settings: Which module, token and PIN; how many sessions.
            make_room: Called when the HSM has no memory left.
            forget: Called when a handle means nothing any more, so that objects are found again.

        Raises:
            ConfigurationError: The module cannot be loaded.
            TokenSelectionError: Not exactly one HSM token matches.
            PinError: The PIN is refused, or the next wrong one may lock the HSM token.
            HsmUnavailable: The HSM is away.
        """
        self.recoveries: Counter[str] = Counter()
        self._settings = settings
        self._make_room = make_room
        self._forget = forget
        self._gate = Gate("PKCS#11 backend")
        self._breaker = Breaker(settings.initial_backoff, settings.max_backoff)
        self._reconnector = Reconnector(self._breaker, lambda: self.run(lambda _pooled: None))
        self._mapper = HsmAttributeMapper()
        self._live: _Live | None = None
        self._was_live = settings.lazy
        self._login = UserLogin(settings.pin, force=settings.force_login)
        self._orphans: set[bytes] = set()
        self._released = False
        self._lock = threading.Lock()
        self._host = ModuleHost.acquire(settings.module, settings.library_parameters)
        forks.register(self)
        if not settings.lazy:
            self._open_now()

    def __repr__(self) -> str:
        live = self._live
        return (
            f"<Connection {self._settings.module} generation={self._host.generation} "
            f"breaker={self._breaker.state} pool={live.pool if live else None}>"
        )

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._gate.closed

    def require_open(self) -> None:
        """Raise ``BackendClosed`` after :meth:`close`."""
        self._gate.require_open()

    @property
    def generation(self) -> int:
        """Number of the module's present life; handles of another one mean nothing."""
        return self._host.generation

    @strip_tracebacks
    def run(
        self,
        operation: Callable[[PooledSession], _T],
        *,
        retry: bool = True,
        leaves: Leftover | None = None,
    ) -> _T:
        """Lend a session to ``operation`` and recover from what can be recovered from.

        Args:
            operation: Gets a session for itself; may raise ``PKCS11Error`` or typed errors. Its
                session is closed, with all its session objects, if it raises anything.
            retry: Whether it may run again after a recovery. False for key generation.
            leaves: What a failed ``operation`` may have left behind; it is destroyed before a
                retry and before the error is raised.

        Raises:
            BackendClosed, PoolTimeout, HsmUnavailable, HsmResourceExhausted, PinError, HsmError
        """
        with self._gate.enter():
            return self._run_and_clear_up(operation, retry=retry, leaves=leaves)

    def _run_and_clear_up(
        self, operation: Callable[[PooledSession], _T], *, retry: bool, leaves: Leftover | None
    ) -> _T:
        self._login.require_not_stopped()
        if leaves is not None and leaves.object_id in self._orphans:
            # Left by a call before, under the same id; the reaper would take the new one along.
            leaves.possible = True
            if not self._cleared(leaves):
                raise HsmUnavailable("what an earlier call left cannot be destroyed yet")
            leaves.possible = False
        try:
            return self._run(operation, retry=retry, leaves=leaves)
        except BaseException:
            self._cleared(leaves)
            raise

    def health(self) -> tuple[bool, str, dict[str, Any]]:
        """Whether calls can succeed, why not, and numbers; never waits for the HSM."""
        live = self._live
        facts: dict[str, Any] = {
            "generation": self._host.generation,
            "breaker": self._breaker.state,
            "recoveries": dict(self.recoveries),
            "orphans": len(self._orphans),
            "one_at_a_time": self._host.one_at_a_time,
        }
        if live is not None:
            facts |= live.pool.facts()
        if self._gate.closed:
            return False, "closed", facts
        if self._login.stopped is not None:
            return False, self._login.stopped, facts
        if self._breaker.state != "closed":
            return False, "the HSM is away", facts
        return live is not None, "ready" if live else "not connected yet", facts

    def close(self) -> None:
        """Wait for running calls, then close all sessions and give up the module."""
        self._gate.close()
        self._reconnector.stop()
        with self._lock:
            if self._released:
                return
            self._released = True
        try:
            if self._live is not None:
                self._clear_up_orphans()
            live, self._live = self._live, None
            if live is not None and live.generation == self._host.generation:
                self._close_sessions(live)
        finally:
            self._host.release()

    def _close_sessions(self, live: _Live) -> None:
        # Inside: another backend of this process may be restarting the module.
        with (
            suppress(PKCS11Error, ServiceUnavailable),
            self._host.inside(self._settings.session_wait) as (_module, generation),
        ):
            if generation == live.generation:
                live.pool.close()
                close_quietly(live.login_session)

    def destroy_orphans(self) -> None:
        """Try again to destroy objects that failed operations left while the HSM was away.

        Raises:
            BackendClosed: After :meth:`close`, which has tried it once more.
        """
        with self._gate.enter():
            self._clear_up_orphans()

    def _clear_up_orphans(self) -> None:
        for object_id in tuple(self._orphans):
            self._clear_up(object_id)

    # --- attempts and recovery ---------------------------------------------------------------

    def _run(
        self, operation: Callable[[PooledSession], _T], *, retry: bool, leaves: Leftover | None
    ) -> _T:
        try:
            return self._attempt(operation)
        except _CLIENT_S_FAULT:
            # Nobody is blamed for what does not happen twice: where python-pkcs11 reads an
            # attribute, it turns every return code into FUNCTION_FAILED (field note 33). Always,
            # as a second try for some failures only would tell them apart by their time.
            if not (retry and self._cleared(leaves)):
                raise
        except _Failure as failure:
            collided = leaves is not None and failure.code in _COLLISION
            again = (self._recover(failure) and retry) or collided
            if not (again and self._cleared(leaves)):
                raise failure.typed from None
        try:
            return self._attempt(operation)
        except _Failure as failure:
            self._recover(failure)
            raise failure.typed from None

    def _attempt(self, operation: Callable[[PooledSession], _T]) -> _T:
        deadline = time.monotonic() + self._settings.session_wait
        held = self._breaker.check()
        try:
            while True:
                try:
                    result = self._attempt_once(operation, deadline, held)
                    break
                except StalePool:
                    continue  # the module was restarted while we waited
        except _Failure:
            raise  # what it tells of the HSM is for _recover to say
        except BaseException:
            self._breaker.undecided(held)
            raise
        self._breaker.succeeded(held)
        return result

    def _attempt_once(
        self, operation: Callable[[PooledSession], _T], deadline: float, held: Pass
    ) -> _T:
        wait = max(0.0, deadline - time.monotonic())
        generation, logins = self._host.generation, 0
        try:
            with self._host.inside(wait) as (module, generation):
                live = self._connect(module, generation)
                logins = live.logins
                return self._lend(live.pool, operation, deadline)
        except VendorLogin as error:
            self._open_breaker(held, str(error))
            raise HsmUnavailable(str(error)) from None
        except PKCS11Error as error:
            failure = _Failure(
                return_code(error),
                code_name(error),
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
        except _CLIENT_S_FAULT:
            session.tainted = True
            # Before the client is blamed: SoftHSM answers GENERAL_ERROR to a key operation that
            # lost its login, as it does to a bad ciphertext.
            session.require_login()
            raise
        except AttributeError as error:
            session.tainted = True
            if isinstance(error.obj, Object):
                # python-pkcs11 made an object whose attributes it could not read: no methods.
                raise SessionHandleInvalid from None
            raise
        except BaseException:
            session.tainted = True
            raise
        finally:
            pool.release(session)

    def _recover(self, failure: _Failure) -> bool:
        """Mend the connection; True if a retry makes sense."""
        recovery = failure.recovery
        if recovery is None:
            self._breaker.undecided(failure.held)
            return False
        self.recoveries[failure.name] += 1
        _log.warning("recovering", extra={"ckr": failure.name, "remedy": recovery.remedy.name})
        try:
            if recovery.remedy is Remedy.LOG_IN:
                self._log_in_again(failure)
            elif recovery.remedy is Remedy.FIND_AGAIN:
                self._forget()
            elif recovery.remedy is Remedy.RESTART:
                self._restart(failure)
            elif recovery.remedy is Remedy.REAP:
                with suppress(_Failure, HsmwrapError):
                    self._attempt(self._make_room)
            elif recovery.remedy is Remedy.STOP:
                self._login.stop(failure.name)
        finally:
            self._breaker.undecided(failure.held)
        return recovery.retry

    def _log_in_again(self, failure: _Failure) -> None:
        try:
            with self._host.inside(self._settings.session_wait) as (module, generation):
                old = self._renew_login(module, generation, failure.logins)
                if old is not None:
                    # Inside: after a restart its handle may be another session's.
                    close_quietly(old)
        except PKCS11Error as error:
            raise typed_error(error) from None

    def _renew_login(self, module: Module, generation: int, seen: int) -> Session | None:
        """Log in, unless somebody else has since; returns the session that kept the login."""
        with self._lock:
            live = self._live
            if live is None or live.generation != generation or live.logins != seen:
                return None
            # A new one: the session that kept the login may be the one that died.
            old, live.login_session = live.login_session, self._open_logged_in(module, live.token)
            live.logins += 1
            return old

    def _restart(self, failure: _Failure) -> None:
        """Restart the module and see whether the HSM token is there again."""
        seen, name, wait = failure.generation, failure.name, self._settings.session_wait
        for pause in (*RESTART_PAUSES, None):
            if not self._breaker.is_current(failure.held):
                raise HsmUnavailable(f"the HSM is away ({name})")  # somebody else found out
            try:
                self._host.restart(seen, wait)
                with self._host.inside(wait) as (module, generation):
                    seen = generation
                    self._connect(module, generation)
                break
            except PKCS11Error as error:
                if pause is None:
                    self._open_breaker(failure.held, code_name(error))
                    raise typed_error(error) from None
            except ServiceUnavailable as error:
                self._open_breaker(failure.held, name)
                raise HsmUnavailable(f"the HSM is away ({name}): {error}") from None
            sleep_about(pause or 0.0)
        self._breaker.succeeded(failure.held)
        _log.warning("HSM module restarted", extra={"generation": self._host.generation})

    def _open_breaker(self, held: Pass, reason: str) -> None:
        self._breaker.failed(held, reason)
        self._reconnector.start()

    # --- connecting --------------------------------------------------------------------------

    def _open_now(self) -> None:
        try:
            self._first_call()
        except BaseException:
            self.close()
            raise

    def _first_call(self) -> None:
        for pause in RESTART_PAUSES:
            try:
                return self.run(lambda _session: None)
            except TokenSelectionError:
                sleep_about(pause)
                self._host.restart(self._host.generation, self._settings.session_wait)
        return self.run(lambda _session: None)

    def _connect(self, module: Module, generation: int) -> _Live:
        live = self._live
        if live is not None and live.generation == generation:
            return live
        with self._lock:
            live = self._live
            if live is not None and live.generation == generation:
                return live
            if live is not None:
                self._leave_behind(live)
            with _connecting():
                self._live = self._log_in_anew(module, generation)
            self._was_live = True
            return self._live

    def _leave_behind(self, live: _Live) -> None:
        """Forget the sessions of a life that is over; close them if they outlived it."""
        if self._host.sessions_survived:
            live.pool.close()
            close_quietly(live.login_session)
        else:
            live.pool.abandon()

    def _log_in_anew(self, module: Module, generation: int) -> _Live:
        token = self._find_token(module)
        session = self._open_logged_in(module, token)
        pool = SessionPool(
            lambda: self._open_worker(token),
            module.is_logged_in,
            self._host.object_lock(),
            self._settings.sessions,
        )
        return _Live(generation, token, session, pool)

    def _open_worker(self, token: Token) -> Session:
        with _connecting():
            return open_worker_session(token, self._mapper)

    def _open_logged_in(self, module: Module, token: Token) -> Session:
        session = open_worker_session(token, self._mapper)
        try:
            self._login.log_in(module, session)
        except BaseException:
            close_quietly(session)
            raise
        return session

    def _find_token(self, module: Module) -> Token:
        try:
            return find_token(module, self._settings.selector)
        except TokenSelectionError as error:
            # It was there before, or may come later: that is a lost HSM, not a wrong setting.
            if self._was_live:
                raise CryptokiError(str(error), CKR.TOKEN_NOT_PRESENT) from None
            raise

    # --- leftovers ---------------------------------------------------------------------------

    def _cleared(self, leaves: Leftover | None) -> bool:
        """Destroy what an attempt left; False if that is for later, so that none may follow it.

        It would be destroyed by its id, and what a second attempt made under the id with it.
        """
        if leaves is None or not leaves.possible:
            return True
        return self._clear_up(leaves.object_id)

    def _clear_up(self, object_id: bytes) -> bool:
        """Destroy whatever has this id; if that fails now, remember it and return False.

        Not remembered before it fails: another thread would destroy what a second try made.
        """
        try:
            self._attempt(lambda pooled: destroy_by_id(pooled, object_id))
        except (_Failure, HsmwrapError):
            self._orphans.add(object_id)
            _log.warning("left for the reaper", extra={"object_id": object_id.hex()})
            return False
        self._orphans.discard(object_id)
        return True

    def after_fork_in_child(self) -> None:
        """Start over in a child: locks that nobody holds, no handle of the parent's."""
        self._lock = threading.Lock()
        self._breaker.reset()
        self._reconnector.reset()
        self._live = None
        self._orphans = set()


def sleep_about(seconds: float) -> None:
    """Sleep for so long, give or take a half, so that processes in step fall out of it."""
    time.sleep(seconds * random.uniform(0.5, 1.5))  # noqa: S311 (no secret)


_CLIENT_S_FAULT = (InvalidCiphertext, InvalidImportToken, InvalidKeyMaterial, KeyNotFound)
# What SoftHSM answers to the creation of a token object when another process does the same. Not
# tried again blindly: what the first try left is found by its id and destroyed before.
_COLLISION = frozenset({CKR.GENERAL_ERROR, CKR.FUNCTION_FAILED})


@contextmanager
def _connecting() -> Iterator[None]:
    """An HSM that cannot be connected to is away, whatever it answers."""
    try:
        yield
    except PKCS11Error as error:
        if recovery_of(error) is not None:
            raise
        raise CryptokiError(code_name(error), CKR.TOKEN_NOT_PRESENT) from None


def destroy_by_id(pooled: PooledSession, object_id: bytes) -> None:
    """Destroy every object with this CKA_ID."""
    pooled.destroy({Attribute.ID: object_id})
