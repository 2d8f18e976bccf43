"""One host per PKCS#11 module and process: who is inside, restarts, and forks.

``C_Initialize`` and ``C_Finalize`` belong to the process, not to a backend, so backends on the
same shared object share a :class:`ModuleHost`. It counts the calls in flight, because
``C_Finalize`` under a running call crashes even with OS locking (field note 12), and numbers the
module's lives: handles of one *generation* mean nothing in the next.

Fork: the parent waits until no call is in flight before it forks, so that the child never
inherits a lock inside the module that some other thread held; the child initialises again at its
first call (PKCS#11 v2.40, 5.4) as a new generation.

Threads: a module that was not told of threads when it was initialised, because it cannot lock or
cannot be told, is called by one at a time, in the order in which they came.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from pkcs11.exceptions import PKCS11Error

import hsmwrap.forkgate  # noqa: F401  # its hooks come first, see the end
from hsmwrap.ckr import CKR
from hsmwrap.errors import HsmUnavailable, PoolTimeout
from hsmwrap.pkcs11.binding.module import Module
from hsmwrap.pkcs11.binding.objectlock import NO_LOCK, ObjectLock
from hsmwrap.pkcs11.binding.returncodes import CryptokiError, code_name

FORK_WAIT = 5.0
"""Seconds that ``fork()`` waits for calls in flight before it goes ahead regardless."""

OBJECT_WAIT = 30.0
"""Seconds that a thread waits for others to be done with token objects, where they must be."""


class ModuleHost:
    """A loaded module, shared by the backends of this process that use it.

    Attributes:
        generation: Number of the module's present life.
        sessions_live_on: Whether the last restart could not finalise the module, so that the
            sessions of the life before are still open in it.
    """

    _hosts: ClassVar[dict[str, ModuleHost]] = {}
    _hosts_lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, path: str, library_parameters: str | None) -> None:
        """Use :meth:`acquire`; there must be one host per module."""
        self.path = path
        self.generation = 0
        self._parameters = library_parameters
        self._module: Module | None = None
        self._users = 0
        self._forked = False
        self._ready = False
        self.sessions_live_on = False
        self._reset_lock()

    @classmethod
    def acquire(cls, path: str, library_parameters: str | None = None) -> ModuleHost:
        """Return the host of the shared object at ``path``; pair with :meth:`release`."""
        real = os.path.realpath(path)
        with cls._hosts_lock:
            host = cls._hosts.get(real) or cls._hosts.setdefault(
                real, cls(real, library_parameters)
            )
            host._users += 1
            return host

    def release(self, timeout: float = 30.0) -> None:
        """Give up one use; the last one finalises the module, once no call is in flight."""
        with self._hosts_lock:
            self._users -= 1
            if self._users:
                return
        if self._quiesce(timeout):
            try:
                # Still in the table: a backend that opens meanwhile waits at this very host.
                self._finalise()
            finally:
                self._let_in()
        with self._hosts_lock:
            if not self._users and not self._ready and not self._forked:
                self._hosts.pop(self.path, None)

    def object_lock(self) -> ObjectLock:
        """Keeps this process's threads apart, where the module does not; once it is loaded."""
        module = self._module
        softhsm = module is not None and module.manufacturer_id.startswith("SoftHSM")
        return self._object_lock if softhsm else NO_LOCK

    @property
    def one_at_a_time(self) -> bool:
        """Whether the module must not be called by two threads at once; False until it is loaded.

        PKCS#11 v2.40, 5.4: without CKF_OS_LOCKING_OK or mutexes of the caller's, a module may
        take it that only one thread ever calls.
        """
        return self._module is not None and not self._module.os_locking

    @contextmanager
    def inside(self, timeout: float) -> Iterator[tuple[Module, int]]:
        """Be in flight for the length of a ``with`` block; yields the module and generation.

        Raises:
            HsmUnavailable: The module was being restarted for longer than ``timeout`` seconds.
            PoolTimeout: It takes one thread at a time, and others were before us for so long.
            CryptokiError: It cannot be initialised.
        """
        module, generation, entered = self._enter(timeout)
        try:
            yield module, generation
        finally:
            # A call that forked leaves in the child too, where nobody counts it.
            with entered:
                if entered is self._changed:
                    self._in_flight -= 1
                    self._changed.notify_all()

    def restart(self, seen: int, timeout: float) -> None:
        """Finalise and initialise the module, unless a generation after ``seen`` is there already.

        The caller must not be inside.

        Raises:
            HsmUnavailable: Calls are still in flight after ``timeout`` seconds.
            CryptokiError: The module does not come back.
        """
        if not self._quiesce(timeout):
            raise HsmUnavailable("calls into the PKCS#11 module do not return; cannot restart it")
        try:
            if self.generation == seen:
                self.sessions_live_on = not self._finalise()
                self._load()
        finally:
            self._let_in()

    def _enter(self, timeout: float) -> tuple[Module, int, threading.Condition]:
        place = object()
        with self._changed:
            self._queue.append(place)
            try:
                if not self._changed.wait_for(lambda: self._may_enter(place), timeout):
                    raise self._busy()
                if not self._ready:
                    self._load()
                assert self._module is not None  # noqa: S101  # _load made it
                self._in_flight += 1
                return self._module, self.generation, self._changed
            finally:
                self._queue.remove(place)
                if self._queue:
                    self._changed.notify_all()

    def _may_enter(self, place: object) -> bool:
        if self._exclusive:
            return False
        return not self.one_at_a_time or (not self._in_flight and self._queue[0] is place)

    def _busy(self) -> HsmUnavailable | PoolTimeout:
        if self._exclusive:
            return HsmUnavailable("the PKCS#11 module is being restarted")
        return PoolTimeout("the PKCS#11 module takes one call at a time, and others were first")

    def _load(self) -> None:
        """Initialise the module, for the first time, again, or in a child."""
        try:
            if self._module is None:
                self._module = Module(self.path, self._parameters)
            elif self._forked:
                self._module.restart_after_fork()
            else:
                self._module.initialize()
        except PKCS11Error as error:
            # Whatever it answers, an HSM whose module does not start is away.
            reason = f"C_Initialize of {self.path} ({code_name(error)})"
            raise CryptokiError(reason, CKR.CRYPTOKI_NOT_INITIALIZED) from None
        self._forked = False
        self._ready = True
        self.generation += 1

    def _finalise(self) -> bool:
        """Finalise the module if it is ours; True if no session can be left of this life."""
        self._ready = False
        if self._module is None or self._forked:
            return True  # a child has initialised nothing yet, and leaves the parent's state alone
        # Whatever C_Finalize says of a lost HSM: what counts is whether it comes back.
        ours = self._module.owned
        try:
            self._module.finalize()
        except PKCS11Error:
            return False
        return ours

    def _quiesce(self, timeout: float) -> bool:
        """Let nobody in and wait for those inside; True when exclusive."""
        deadline = time.monotonic() + timeout
        with self._changed:
            if not self._changed.wait_for(lambda: not self._exclusive, timeout):
                return False
            self._exclusive = True
            left = max(0.0, deadline - time.monotonic())
            if self._changed.wait_for(lambda: not self._in_flight, left):
                return True
            self._exclusive = False
            self._changed.notify_all()
            return False

    def _let_in(self) -> None:
        with self._changed:
            self._exclusive = False
            self._changed.notify_all()

    def _reset_lock(self) -> None:
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()
        self._in_flight = 0
        self._exclusive = False
        self._object_lock = ObjectLock(OBJECT_WAIT)

    @classmethod
    def _before_fork(cls) -> None:
        cls._hosts_lock.acquire()
        cls._quiesced = [host for host in cls._hosts.values() if host._quiesce(FORK_WAIT)]

    @classmethod
    def _after_fork_in_parent(cls) -> None:
        while cls._quiesced:
            cls._quiesced.pop()._let_in()
        cls._hosts_lock.release()

    @classmethod
    def _after_fork_in_child(cls) -> None:
        cls._hosts_lock = threading.Lock()
        cls._quiesced.clear()
        for host in cls._hosts.values():
            host._reset_lock()
            host._forked = host._module is not None
            host._ready = False

    _quiesced: ClassVar[list[ModuleHost]] = []


# After hsmwrap.forkgate's hooks, which importing it sees to: hooks before a fork run in reverse
# order, and a call that is inside a module may have to pass that gate before it can leave.
os.register_at_fork(
    before=ModuleHost._before_fork,
    after_in_parent=ModuleHost._after_fork_in_parent,
    after_in_child=ModuleHost._after_fork_in_child,
)
