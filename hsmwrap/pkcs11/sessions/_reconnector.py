"""A thread that makes a trial call to a lost HSM after each backoff.

Without it only traffic would bring an HSM back, and a load balancer that believes the health
report sends none.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from contextlib import suppress
from weakref import WeakSet

from hsmwrap.errors import BackendClosed, HsmwrapError, PinError
from hsmwrap.pkcs11.sessions._breaker import Breaker

SHORTEST_PAUSE = 0.1
"""Seconds between two trial calls, however short the backoff."""
_LONGEST_END = 5.0


class Reconnector:
    """Runs from :meth:`start` until the breaker is closed; not in a child until started there."""

    def __init__(self, breaker: Breaker, trial_call: Callable[[], object]) -> None:
        """Take what says when to try, and a call that goes through the breaker."""
        self._breaker = breaker
        self._trial_call = trial_call
        self._thread: threading.Thread | None = None
        self.reset()
        _RECONNECTORS.add(self)

    def start(self) -> None:
        """Start the thread unless it runs; without one a caller's call is the trial call."""
        with self._lock:
            if self._thread is not None or self._stopped.is_set():
                return
            thread = threading.Thread(target=self._work, name="hsmwrap-reconnect", daemon=True)
            with suppress(RuntimeError):  # no thread to be had, or the interpreter shuts down
                thread.start()
                self._thread = thread

    def stop(self) -> None:
        """End the thread, and start none any more."""
        self._stopped.set()
        with self._lock:
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(_LONGEST_END)

    def reset(self) -> None:
        """Start over, as in a forked child: no thread, and a lock that is free."""
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = None

    def _work(self) -> None:
        while self._is_wanted():
            if not self._stopped.wait(max(SHORTEST_PAUSE, self._breaker.wait)):
                self._try()

    def _is_wanted(self) -> bool:
        # Under the lock: if the breaker opens after this, another thread is started.
        with self._lock:
            wanted = self._breaker.state != "closed" and not self._stopped.is_set()
            if not wanted:
                self._thread = None
            return wanted

    def _try(self) -> None:
        try:
            self._trial_call()
        except (BackendClosed, PinError):
            self._stopped.set()
        except HsmwrapError:
            pass  # not yet


_RECONNECTORS: WeakSet[Reconnector] = WeakSet()


def _stop_at_exit() -> None:
    # A daemon thread inside a PKCS#11 module while the process takes it down would crash it.
    for reconnector in list(_RECONNECTORS):
        reconnector.stop()


atexit.register(_stop_at_exit)
