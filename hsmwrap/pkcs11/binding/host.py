"""One host per PKCS#11 module and process: calls in flight, restarts, and forks.

``C_Initialize`` and ``C_Finalize`` belong to the process, not to a backend, so backends on the
same shared object share a :class:`ModuleHost`. It knows the calls in flight, because
``C_Finalize`` under a running call crashes even with OS locking (field note 12), and counts the
initialisations: handles of one *initialisation generation* mean nothing in the next.

Fork: the parent waits until no other thread's call is in flight before it forks, so that the child
never inherits a lock inside the module that another thread held; the child initialises again at its
first call (PKCS#11 v2.40, 5.4), as a new generation.

Threads: a module that was not told of threads when it was initialised, because it cannot lock or
cannot be told, is called by one at a time, in the order in which they came.
"""

from __future__ import annotations

import atexit
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

from pkcs11.exceptions import PKCS11Error

from hsmwrap import forks
from hsmwrap.errors import ConfigurationError, HsmUnavailable, PoolTimeout
from hsmwrap.forks import ForkAware, ForkTurn
from hsmwrap.locks import ReadWriteLock
from hsmwrap.pkcs11.binding import traits
from hsmwrap.pkcs11.binding.module import Module
from hsmwrap.pkcs11.binding.objectlock import NO_LOCK, ObjectLock, softhsm_object_lock
from hsmwrap.pkcs11.binding.returncodes import HsmLost, said
from hsmwrap.pkcs11.binding.traits import Traits

EXIT_WAIT = 10.0
"""Seconds that the end of the interpreter waits for calls in flight before it goes on regardless:
key generation takes some."""

FORK_WAIT = 5.0
"""Seconds that ``fork()`` waits for calls in flight before it goes ahead regardless."""


_log = logging.getLogger(__name__)


class ModuleHost(ForkAware):
    """A loaded module, shared by the backends of this process that use it.

    Attributes:
        generation: How often the module was initialised.
        sessions_survived: Whether the last restart could not finalise the module, so that the
            sessions of the generation before are still open in it.
    """

    _hosts: ClassVar[dict[str, ModuleHost]] = {}
    _hosts_lock: ClassVar[ReadWriteLock] = ReadWriteLock(fork_turn=ForkTurn.PKCS11_MODULES)

    def __init__(self, path: str, library_parameters: str | bytes | None) -> None:
        """Use :meth:`acquire`; there must be one host per module."""
        self.path = path
        self._traits: Traits | None = None
        self.generation = 0
        self.sessions_survived = False
        self._parameters = library_parameters
        self._module: Module | None = None
        self._users = 0
        self._forked = False
        self._ready = False
        self._calls = ReadWriteLock(fork_turn=ForkTurn.PKCS11_MODULES, fork_wait=FORK_WAIT)
        self._object_lock = softhsm_object_lock()
        forks.register(self)

    @classmethod
    def acquire(
        cls,
        path: str,
        library_parameters: str | bytes | None = None,
        module_traits: Traits | None = None,
    ) -> ModuleHost:
        """Return the host of the shared object at ``path``; pair with :meth:`release`.

        Args:
            path: The shared object.
            library_parameters: For C_Initialize, if it is not loaded yet.
            module_traits: From its profile; None takes what others say of it.

        Raises:
            ConfigurationError: It is in use by another profile.
        """
        real = os.path.realpath(path)
        with cls._hosts_lock.write():
            host = cls._hosts.get(real) or cls._hosts.setdefault(
                real, cls(real, library_parameters)
            )
            if module_traits is not None:
                if host._users and host._traits not in (None, module_traits):
                    raise ConfigurationError(
                        f"profile: another backend of this process uses {path} by another profile; "
                        "give both the same one, or each a process of its own"
                    )
                host._traits = module_traits
            host._users += 1
            return host

    def release(self, timeout: float = 30.0) -> None:
        """Give up one use; the last one finalises the module, once no call is in flight."""
        with self._hosts_lock.write():
            self._users -= 1
            if self._users:
                return
        if self._calls.acquire_write(timeout):
            try:
                # Still in the table: a backend that opens meanwhile waits at this very host.
                self._finalise()
            finally:
                self._calls.release_write()
        with self._hosts_lock.write():
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
            HsmLost: It cannot be initialised.
        """
        leave = self._enter(time.monotonic() + timeout)
        try:
            assert self._module is not None  # noqa: S101  # it is loaded
            with traits.inside(self._traits or traits.STANDARD):
                yield self._module, self.generation
        finally:
            leave()

    def restart(self, seen: int, timeout: float) -> None:
        """Finalise and initialise the module, unless a generation after ``seen`` is there already.

        The caller must not be inside.

        Raises:
            HsmUnavailable: Calls are still in flight after ``timeout`` seconds.
            HsmLost: The module does not come back.
        """
        if not self._calls.acquire_write(timeout):
            raise HsmUnavailable("calls into the PKCS#11 module do not return; cannot restart it")
        try:
            if self.generation == seen:
                self.sessions_survived = not self._finalise()
                self._load()
        finally:
            self._calls.release_write()

    def _enter(self, deadline: float) -> Callable[[], None]:
        """Enter with the module loaded; returns what leaves again."""
        calls = self._calls
        while True:
            alone = self.one_at_a_time or not self._ready
            acquire = calls.acquire_write if alone else calls.acquire_read
            release = calls.release_write if alone else calls.release_read
            if not acquire(max(0.0, deadline - time.monotonic())):
                if self.one_at_a_time:
                    raise PoolTimeout(
                        "the PKCS#11 module takes one call at a time, and others were first"
                    )
                raise HsmUnavailable("the PKCS#11 module is being restarted")
            try:
                if alone and not self._ready:
                    self._load()
            except BaseException:
                release()
                raise
            if self._ready and alone == self.one_at_a_time:
                return release
            release()  # loaded, and others may enter as well; or a restart failed meanwhile

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
            # Whatever it answers: the HSM is unavailable if its module does not start.
            raise HsmLost(
                f"the PKCS#11 module {self.path} does not start: {said(error)}; is there what it "
                "needs (library_parameters, its configuration and environment, its daemon)?",
                error,
            ) from None
        self._forked = False
        self._ready = True
        self.generation += 1

    def _finalise(self) -> bool:
        """Finalise the module if it is ours; True if no session can be left of this generation."""
        self._ready = False
        if self._module is None or self._forked:
            return True  # a child has initialised nothing yet, and the state is the parent's
        # Whatever C_Finalize says of a lost HSM: what counts is whether it comes back.
        ours = self._module.owned
        try:
            self._module.finalize()
        except PKCS11Error:
            return False
        return ours

    def after_fork_in_child(self) -> None:
        """The module has to be initialised again, at the first call."""
        self._forked = self._module is not None
        self._ready = False

    def let_no_call_in(self, timeout: float) -> bool:
        """Wait for the calls inside, and let none in from now on; False if some do not return."""
        return self._calls.acquire_write(timeout)


@atexit.register
def _leave_at_exit() -> None:
    # A daemon thread inside a module while exit() runs the module's destructors, and those of the
    # libcrypto below it, crashes the process (field note 86).
    deadline = time.monotonic() + EXIT_WAIT
    for host in list(ModuleHost._hosts.values()):
        if not host.let_no_call_in(max(0.0, deadline - time.monotonic())):
            _log.error("calls into the PKCS#11 module do not return", extra={"path": host.path})
