"""Connecting to one HSM token: find it, log in, lend sessions; once in each generation."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from pkcs11.exceptions import PKCS11Error, SessionCount
from pkcs11.types import Session, Token

from hsmwrap.errors import ServiceUnavailable, TokenSelectionError
from hsmwrap.pkcs11.binding import traits
from hsmwrap.pkcs11.binding.host import ModuleHost
from hsmwrap.pkcs11.binding.module import Module
from hsmwrap.pkcs11.binding.returncodes import HsmLost, recovery_of, said
from hsmwrap.pkcs11.binding.templates import HsmAttributeMapper
from hsmwrap.pkcs11.sessions.pool import SessionPool
from hsmwrap.pkcs11.sessions.session import HandleEpoch, close_quietly, open_worker_session
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.pkcs11.token.login import UserLogin
from hsmwrap.pkcs11.token.selection import find_token

PAUSES = (0.05, 0.1, 0.2, 0.4, 0.6)
"""Seconds between the tries at connecting. SoftHSM writes the token's file at each login, and
another process that reads it at that moment sees no token, or one without a PIN, or gets
GENERAL_ERROR for its own login (field note 35). Each is varied, for processes that started
together."""


def sleep_with_jitter(seconds: float) -> None:
    """Sleep for 50 to 150 % of the time, so that processes in step fall out of it."""
    time.sleep(seconds * random.uniform(0.5, 1.5))  # noqa: S311 (no secret)


@dataclass(slots=True)
class Connected:
    """What a connection holds in one initialisation generation of the module.

    Attributes:
        generation: Number of the generation; the rest means nothing in another.
        token: The HSM token.
        login_session: Keeps the login; a login belongs to the application (field note 4). None
            where it works in the pool, as the HSM token has no other.
        pool: The worker sessions.
        logins: How often this generation has logged in.
    """

    generation: int
    token: Token
    login_session: Session | None
    pool: SessionPool
    logins: int = 1


class Connector:
    """Connects on demand; its callers are inside the module (:meth:`ModuleHost.inside`).

    Attributes:
        connected: What there is of the last generation connected to; None before the first.
        login: The rules of logging in.
        epoch: Of the object handles of all sessions.
    """

    def __init__(self, settings: Pkcs11Settings, host: ModuleHost) -> None:
        """Connect to nothing yet."""
        self.connected: Connected | None = None
        self.login = UserLogin(settings.pin, force=settings.force_login)
        self.epoch = HandleEpoch()
        self._settings = settings
        self._host = host
        self._mapper = HsmAttributeMapper()
        self._was_connected = settings.lazy
        self._lock = threading.Lock()

    def connect(self, module: Module, generation: int) -> Connected:
        """What holds in this generation; finds the HSM token and logs in if it is a new one.

        Raises:
            TokenSelectionError: Not exactly one HSM token matches, and none did before.
            PinError: The PIN is refused, or the next wrong one may lock the HSM token.
            NoLogin: The PIN may have been refused.
            PKCS11Error: The HSM does not answer.
        """
        present = self.connected
        if present is not None and present.generation == generation:
            return present
        with self._lock:
            present = self.connected
            if present is not None and present.generation == generation:
                return present
            if present is not None:
                self._leave(present)
            with _unavailable_if_refused():
                self.connected = self._connect(module, generation)
            self._was_connected = True
            return self.connected

    def log_in_again(self, module: Module, generation: int, seen: int) -> None:
        """Log in, unless another thread has since the login number ``seen`` of this generation.

        Raises:
            PinError, NoLogin, PKCS11Error: As for :meth:`connect`.
        """
        with self._lock:
            present = self.connected
            if present is None or present.generation != generation or present.logins != seen:
                return
            # By a new session: the one that kept the login may be the one that died.
            old, present.login_session = present.login_session, None
            try:
                present.login_session = self._open_logged_in(module, present.token)
            except SessionCount:
                if old is not None:
                    raise
                # The one session of the HSM token is a worker again, which logs in by itself.
            finally:
                _close(old)
            present.logins += 1

    def close(self) -> None:
        """Close all sessions, if their generation has not ended."""
        present, self.connected = self.connected, None
        if present is None or present.generation != self._host.generation:
            return
        # Inside: another backend of this process may be restarting the module.
        with (
            suppress(PKCS11Error, ServiceUnavailable),
            self._host.inside(self._settings.session_wait) as (_module, generation),
        ):
            if generation == present.generation:
                present.pool.close()
                _close(present.login_session)

    def reset(self) -> None:
        """Start over in a forked child: a free lock, no handle of the parent's."""
        self._lock = threading.Lock()
        self.connected = None

    def _leave(self, ended: Connected) -> None:
        """Forget the sessions of a generation that has ended; close them if they survived it."""
        if self._host.sessions_survived:
            ended.pool.close()
            _close(ended.login_session)
        else:
            ended.pool.abandon()

    def _connect(self, module: Module, generation: int) -> Connected:
        token = self._find_token(module)
        session = self._open_logged_in(module, token)
        pool = SessionPool(
            lambda: self._open_worker(module, token),
            module.is_logged_in,
            self._host.object_lock(),
            self.epoch,
            self._settings.sessions,
        )
        return Connected(generation, token, session, pool)

    def _open_worker(self, module: Module, token: Token) -> Session:
        """Open a session that a login covers; the one that keeps the login, if it is the only one.

        Some HSM tokens have one session. On some a login covers only the session that it was made
        in: there each logs in for itself.
        """
        try:
            session = open_worker_session(token, self._mapper)
        except SessionCount:
            with self._lock:
                present = self.connected
                if present is None or present.login_session is None:
                    raise
                session, present.login_session = present.login_session, None
        try:
            with _unavailable_if_refused():
                if traits.here().login_per_session or not module.is_logged_in(session):
                    self._cover(module, session)
        except BaseException:
            close_quietly(session)
            raise
        return session

    def _cover(self, module: Module, session: Session) -> None:
        """Log in through a worker session, unless all have lost the login: that is recovered from.

        Raises:
            PinError, NoLogin, PKCS11Error: As for :meth:`connect`.
        """
        with self._lock:
            if traits.here().login_per_session:
                self.login.log_in(module, session)
                return
            present = self.connected
            keeper = None if present is None else present.login_session
            alone = keeper is None or module.is_logged_in(keeper)
            if alone and not module.is_logged_in(session):  # another may have, for all
                self.login.log_in(module, session)

    def _open_logged_in(self, module: Module, token: Token) -> Session:
        session = open_worker_session(token, self._mapper)
        try:
            self.login.log_in(module, session)
        except BaseException:
            close_quietly(session)
            raise
        return session

    def _find_token(self, module: Module) -> Token:
        try:
            return find_token(module, self._settings.selector)
        except TokenSelectionError as error:
            # It was there before, or may come later: that is a lost HSM, not a wrong setting.
            if self._was_connected:
                raise HsmLost(str(error)) from None
            raise


def _close(session: Session | None) -> None:
    if session is not None:
        close_quietly(session)


@contextmanager
def _unavailable_if_refused() -> Iterator[None]:
    """An HSM that cannot be connected to is unavailable, whatever it answers."""
    try:
        yield
    except PKCS11Error as error:
        if recovery_of(error) is not None:
            raise
        raise HsmLost(said(error), error) from None
