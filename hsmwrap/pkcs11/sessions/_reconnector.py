"""A thread that makes trial calls to an HSM that is not known to work.

Without it only traffic would bring an HSM back, and a load balancer that believes the health
report sends none; and an HSM that is lost between two calls would be reported as ready.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from weakref import WeakSet

from hsmwrap.errors import HsmwrapError

SHORTEST_PAUSE = 0.1
"""Seconds between two trial calls, however short the backoff."""
_LONGEST_END = 5.0

_log = logging.getLogger(__name__)


class Reconnector:
    """Runs from :meth:`start` for as long as it is wanted; in a child only if started there."""

    def __init__(
        self,
        trial_call: Callable[[], object],
        wanted: Callable[[], bool],
        wait: Callable[[], float],
        pauses: tuple[float, float],
    ) -> None:
        """Take what is called.

        Args:
            trial_call: A call that finds out whether calls succeed.
            wanted: Whether another trial call is wanted.
            wait: How many seconds none may be made.
            pauses: The first and the longest of those between two trial calls, in seconds.
        """
        self._trial_call = trial_call
        self._wanted = wanted
        self._wait = wait
        self._first, self._longest = pauses
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
        pause = 0.0
        while self._is_wanted():
            if not self._stopped.wait(max(SHORTEST_PAUSE, self._wait(), pause)):
                self._try()
            pause = min(max(self._first, 2 * pause), self._longest)

    def _is_wanted(self) -> bool:
        # Under the lock: if it becomes wanted after this, another thread is started.
        with self._lock:
            wanted = not self._stopped.is_set() and self._wanted()
            if not wanted:
                self._thread = None
            return wanted

    def _try(self) -> None:
        try:
            self._trial_call()
        except HsmwrapError:
            pass  # not yet
        except Exception:  # noqa: BLE001  # without this thread no outage would end
            _log.exception("trial call failed")


_RECONNECTORS: WeakSet[Reconnector] = WeakSet()


def _stop_at_exit() -> None:
    # A daemon thread inside a PKCS#11 module while the process takes it down would crash it.
    for reconnector in list(_RECONNECTORS):
        reconnector.stop()


atexit.register(_stop_at_exit)
