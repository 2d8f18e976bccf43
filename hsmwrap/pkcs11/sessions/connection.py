"""A connection to one HSM token.

Everything that uses the HSM token goes through :meth:`Connection.run`, which lends a session to a
function, mends what can be mended, and runs the function once more where that is safe.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from pkcs11.constants import Attribute

from hsmwrap import forks
from hsmwrap.ckr import CKR
from hsmwrap.errors import (
    ConfigurationError,
    HsmError,
    PinError,
    TokenSelectionError,
    strip_tracebacks,
)
from hsmwrap.forks import ForkAware
from hsmwrap.gate import Gate
from hsmwrap.pkcs11.binding.host import ModuleHost
from hsmwrap.pkcs11.sessions._breaker import Breaker
from hsmwrap.pkcs11.sessions._reconnector import Reconnector
from hsmwrap.pkcs11.sessions.connecting import PAUSES, Connector, sleep_with_jitter
from hsmwrap.pkcs11.sessions.pending import PendingObjects
from hsmwrap.pkcs11.sessions.recovery import CLIENT_ERRORS, Attempts, Failure
from hsmwrap.pkcs11.sessions.session import PendingObject, PooledSession
from hsmwrap.pkcs11.settings import Pkcs11Settings

_COLLISION = frozenset({CKR.GENERAL_ERROR, CKR.FUNCTION_FAILED})
"""What SoftHSM answers to the creation of a token object when another process does the same. Not
tried again blindly: what the first try left is found by its id and destroyed before."""

_TROUBLES = (ConfigurationError, PinError)
"""Errors that all calls end with until the operator has done something."""

PROOF_LIFETIME = 10.0
"""Seconds after the last call that succeeded until :meth:`Connection.health` has one tried."""

_T = TypeVar("_T")


class Connection(ForkAware):
    """One HSM token, shared by all threads of a backend."""

    def __init__(
        self,
        settings: Pkcs11Settings,
        trial: Callable[[PooledSession], object] = lambda _pooled: None,
    ) -> None:
        """Load the module and log in; with ``settings.lazy`` at the first call instead.

        Args:
            settings: Which module, token and PIN; how many sessions.
            trial: An operation that succeeds if calls do; by it is tried whether the HSM works.

        Raises:
            ConfigurationError: The module cannot be loaded.
            TokenSelectionError: Not exactly one HSM token matches.
            PinError: The PIN is refused, or the next wrong one may lock the HSM token.
            HsmUnavailable: The HSM does not answer.
        """
        self._settings = settings
        self._gate = Gate("PKCS#11 backend")
        self._host = ModuleHost.acquire(settings.module, settings.reserved, settings.traits)
        self._connector = Connector(settings, self._host)
        self._breaker = Breaker(settings.initial_backoff, settings.max_backoff)
        self._reconnector = Reconnector(
            self._trial_call,
            self._needs_trial,
            lambda: self._breaker.wait,
            (settings.initial_backoff, settings.max_backoff),
        )
        self._trial = trial
        self._trouble: str | None = None
        self._attempts = Attempts(
            self._host,
            self._connector,
            self._breaker,
            self._reconnector,
            trial=trial,
            session_wait=settings.session_wait,
        )
        self._pending = PendingObjects(self._attempts)
        self._released = False
        self._lock = threading.Lock()
        forks.register(self)
        if not settings.lazy:
            try:
                self._first_call()
            except BaseException:
                self.close()
                raise

    def __repr__(self) -> str:
        connected = self._connector.connected
        return (
            f"<Connection {self._settings.module} generation={self._host.generation} "
            f"breaker={self._breaker.state} pool={connected.pool if connected else None}>"
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
        """How often the module was initialised; handles of another generation mean nothing."""
        return self._host.generation

    @strip_tracebacks
    def run(
        self,
        operation: Callable[[PooledSession], _T],
        *,
        retry: bool = True,
        pending: PendingObject | None = None,
    ) -> _T:
        """Lend a session to ``operation`` and recover from what can be recovered from.

        Args:
            operation: Gets a session for itself; may raise ``PKCS11Error`` or typed errors. Its
                session is closed, with all its session objects, if it raises anything but
                :data:`CLIENT_ERRORS`, after which it has to leave no session object by itself.
            retry: Whether it may run again after a recovery. False for key generation.
            pending: The token object that it creates, if any (:meth:`PooledSession.creating`): what
                a failed ``operation`` left of it is destroyed before a retry and before the error
                is raised.

        Raises:
            BackendClosed, PoolTimeout, HsmUnavailable, HsmResourceExhausted, PinError, HsmError
        """
        with self._gate.enter():
            self._connector.login.require_not_stopped()
            if pending is not None:
                self._pending.require_free(pending.object_id)
            try:
                return self._run(operation, retry=retry, pending=pending)
            except BaseException as error:
                if isinstance(error, _TROUBLES):
                    self._trouble = str(error)
                self._pending.destroy(pending)
                raise

    def _run(
        self,
        operation: Callable[[PooledSession], _T],
        *,
        retry: bool,
        pending: PendingObject | None,
    ) -> _T:
        try:
            return self._attempts.attempt(operation)
        except CLIENT_ERRORS:
            # The client is told so only if it happens twice: where python-pkcs11 reads an
            # attribute, it turns every return code into FUNCTION_FAILED (field note 33). Always, as
            # a second try for some failures only would tell them apart by the time they take.
            if not (retry and self._pending.destroy(pending)):
                raise
        except Failure as failure:
            collided = pending is not None and failure.code in _COLLISION
            again = (self._attempts.recover(failure) and retry) or collided
            if not (again and self._pending.destroy(pending)):
                raise failure.error from None
        try:
            return self._attempts.attempt(operation)
        except Failure as failure:
            self._attempts.recover(failure)
            raise failure.error from None

    def destroy(
        self,
        object_id: bytes,
        known: Callable[[PooledSession], bool] = lambda _pooled: False,
    ) -> None:
        """Destroy every token object with this CKA_ID; after an error, as soon as that is possible.

        ``known`` is tried first: it destroys the only one without a search, or returns False.

        Raises:
            As :meth:`run`.
        """
        pending = PendingObject(object_id, may_exist=True)
        self.run(
            lambda pooled: known(pooled) or pooled.destroy({Attribute.ID: object_id}),
            pending=pending,
        )

    def destroy_pending(self) -> None:
        """Try again to destroy objects that failed operations left.

        Raises:
            BackendClosed: After :meth:`close`, which has tried it once more.
        """
        with self._gate.enter():
            self._pending.destroy_all()

    def close_opened_keys(self, *, expired: bool = False) -> None:
        """Close the idle sessions that keep keys open, or only those whose keys have ``expired``.

        Sessions in use close their expired keys by themselves.

        Raises:
            HsmUnavailable, PoolTimeout, BackendClosed: As :meth:`run`.
        """
        with (
            self._gate.enter(),
            self._host.inside(self._settings.session_wait) as (_module, generation),
        ):
            connected = self._connector.connected
            if connected is not None and connected.generation == generation:
                connected.pool.close_idle(
                    lambda each: each.opened.expired if expired else len(each.opened) > 0
                )

    def health(self) -> tuple[bool, str, dict[str, Any]]:
        """Whether calls can succeed, why not, and numbers; never waits for the HSM.

        Where that is not known, or was found out long ago, a thread tries it meanwhile.
        """
        connected = self._connector.connected
        if self._needs_trial():
            self._reconnector.start()
        facts: dict[str, Any] = {
            "generation": self._host.generation,
            "breaker": self._breaker.state,
            "recoveries": dict(self._attempts.recoveries),
            "pending_objects": len(self._pending),
            "one_at_a_time": self._host.one_at_a_time,
        }
        if connected is not None:
            facts |= connected.pool.facts()
        if self._gate.closed:
            return False, "closed", facts
        stopped = self._connector.login.stopped
        if stopped is not None:
            return False, stopped, facts
        if self._breaker.state != "closed":
            return False, f"the HSM is unavailable ({self._breaker.reason})", facts
        trouble = self._trouble
        if trouble is not None:
            return False, trouble, facts
        return connected is not None, "ready" if connected else "not connected yet", facts

    def close(self) -> None:
        """Wait for running calls, then close all sessions and give up the module."""
        self._gate.close()
        self._reconnector.stop()
        with self._lock:
            if self._released:
                return
            self._released = True
        try:
            if self._connector.connected is not None:
                self._pending.destroy_all()
            self._connector.close()
        finally:
            self._host.release()

    def after_fork_in_child(self) -> None:
        """Start over: free locks, and no handle or pending object of the parent's."""
        self._lock = threading.Lock()
        self._breaker.reset()
        self._reconnector.reset()
        self._connector.reset()
        self._pending.reset()

    def _needs_trial(self) -> bool:
        """Whether it is not known that calls succeed, and may be found out."""
        if self._gate.closed or self._connector.login.stopped is not None:
            return False
        connected = self._connector.connected
        return (
            connected is None
            or connected.generation != self._host.generation
            or self._trouble is not None
            or self._breaker.state != "closed"
            or time.monotonic() - self._attempts.proved > PROOF_LIFETIME
        )

    def _trial_call(self) -> None:
        try:
            self.run(self._trial)
        except HsmError as error:
            self._trouble = str(error)
            raise
        self._trouble = None

    def _first_call(self) -> None:
        for pause in PAUSES:
            try:
                self.run(_connect_only)
                break
            except TokenSelectionError:
                sleep_with_jitter(pause)
                self._host.restart(self._host.generation, self._settings.session_wait)
        else:
            self.run(_connect_only)
        self._trouble = None
        with suppress(HsmError, *_TROUBLES):
            # It opens without keys, too, so that they can be made; it is not ready then.
            self._trial_call()


def _connect_only(_pooled: PooledSession) -> None:
    """Use no key: there may be none yet."""
