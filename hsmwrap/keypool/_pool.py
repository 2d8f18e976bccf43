"""The pool: background threads fill the stocks, callers take pairs from them.

All stocks change under one lock, by the methods of :class:`hsmwrap.keypool._stock.Stock`; backends
are called outside the lock.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Self
from weakref import WeakSet

from hsmwrap import forks
from hsmwrap.backend import Backend, HasKeySets, PrivateKeyRef, WrappingKey
from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import (
    BackendClosed,
    HsmwrapError,
    PinError,
    ServiceUnavailable,
    UnsupportedOperation,
)
from hsmwrap.forks import ForkAware
from hsmwrap.imports import generate_inline
from hsmwrap.keypool._settings import Pair, PoolSettings
from hsmwrap.keypool._stock import LONGEST_PAUSE, PairFacts, ReadyPair, Stock

KEY_SET_LIFETIME = 1.0
"""Seconds for which the current key set of a backend is cached. Making a pair refreshes it, so only
an idle pool has to ask before it gives out a sealed pair."""

NICENESS = 10
"""What the pool's threads add to the niceness of the process, so that callers go first."""

_log = logging.getLogger(__name__)


class KeyPool(ForkAware):
    """Gives out wrapping key pairs that were made ahead; safe to share between threads.

    In each process, also in a forked child, its threads start with the first call or with
    :meth:`prepare`. Close the pool before its backends: a closed backend cannot discard pairs.
    """

    def __init__(
        self,
        settings: PoolSettings | None = None,
        *,
        clock: Callable[[], datetime] | None = None,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create an empty pool.

        Args:
            settings: How much is made ahead.
            clock: Returns the current aware time; for expiry and age.
            timer: Returns monotonic seconds, from any origin; for the backoff.
        """
        self._settings = settings or PoolSettings()
        self._clock = clock or _utc_now
        self._timer = timer
        self._closed = False
        self._stocks: dict[tuple[int, WrappingKeySpec, WrappingAlgorithm], Stock] = {}
        self._stopped_backends: set[int] = set()
        self.after_fork_in_child()
        forks.register(self)
        _POOLS.add(self)

    def __call__(
        self,
        backend: Backend,
        spec: WrappingKeySpec,
        algorithm: WrappingAlgorithm,
        expires_at: datetime,
    ) -> WrappingKey:
        """Return a pair that no other caller gets.

        Raises:
            HsmwrapError: No pair was ready, and generating one failed: as
                :meth:`Backend.generate_wrapping_key`.
        """
        key = None
        if self._pools(spec, algorithm):
            key = self._take(backend, spec, algorithm, expires_at)
        return key or self._make_inline(backend, spec, algorithm, expires_at)

    def __repr__(self) -> str:
        levels = ", ".join(f"{f.backend}/{f.algorithm}={f.level}" for f in self.facts())
        return f"<KeyPool {'closed' if self._closed else 'open'} {levels or 'empty'}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def prepare(self, backend: Backend, pairs: Iterable[Pair]) -> None:
        """Start to make these kinds ahead, as far as the settings pool them; makes no HSM call."""
        with self._changed:
            for spec, algorithm in pairs:
                if self._pools(spec, algorithm):
                    self._stock(backend, spec, algorithm)
            self._start_threads()
            self._changed.notify_all()

    def facts(self) -> list[PairFacts]:
        """The numbers of each stock, for metrics."""
        with self._changed:
            return [stock.facts() for stock in self._stocks.values()]

    def close(self) -> None:
        """Stop the threads and discard the pairs; later calls generate inline.

        Waits until running key generations finish. Resident pairs that cannot be destroyed because
        the HSM is unavailable are left to the reaper; this is logged, not raised. Safe to call
        again.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            threads = tuple(self._threads)
        for thread in threads:
            thread.join()
        with self._changed:
            stocks = tuple(self._stocks.values())
            for stock in stocks:
                stock.drop_all()
        for stock in stocks:
            self._discard_rest(stock)

    # --- called by users of the pool ---------------------------------------------------------

    def _pools(self, spec: WrappingKeySpec, algorithm: WrappingAlgorithm) -> bool:
        pairs = self._settings.pairs
        wanted = pairs is None or (spec, algorithm) in pairs
        return wanted and self._settings.high_water > 0 and not self._closed

    def _take(
        self,
        backend: Backend,
        spec: WrappingKeySpec,
        algorithm: WrappingAlgorithm,
        expires_at: datetime,
    ) -> WrappingKey | None:
        now = self._clock()
        # If the HSM is unavailable the import will fail, and the pair would be wasted.
        usable = backend.health().ready
        with self._changed:
            stock = self._stock(backend, spec, algorithm)
            depends = usable and stock.needs_key_set
        key_set = self._known_key_set(backend) if depends else None
        with self._changed:
            usable = usable and (key_set is not None or not stock.needs_key_set)
            key = stock.take(expires_at if usable else _NEVER, now, key_set)
            self._start_threads()
            if stock.wants_refill or stock.has_discards:
                self._changed.notify_all()
            return key

    def _make_inline(
        self,
        backend: Backend,
        spec: WrappingKeySpec,
        algorithm: WrappingAlgorithm,
        expires_at: datetime,
    ) -> WrappingKey:
        key = generate_inline(backend, spec, algorithm, expires_at)
        stock = self._stocks.get((id(backend), spec, algorithm))
        if stock is not None and stock.failures:
            with self._changed:
                stock.succeeded()
                self._changed.notify_all()
        return key

    def _known_key_set(self, backend: Backend) -> str | None:
        """The backend's current key set, cached for :data:`KEY_SET_LIFETIME`; None if asking fails.

        Another process may have retired the set that sealed a pair. On failure the caller
        generates inline and gets the backend's error from that.
        """
        now = self._timer()
        key_set, until = self._key_sets.get(id(backend), ("", now))
        if now < until:
            return key_set
        key_sets = HasKeySets.of(backend)
        try:
            current = None if key_sets is None else key_sets.current_key_set()
        except HsmwrapError:
            return None
        self._learn_key_set(backend, current, now)
        return current

    def _learn_key_set(self, backend: Backend, key_set: str | None, tick: float) -> None:
        if key_set is not None:
            self._key_sets[id(backend)] = key_set, tick + KEY_SET_LIFETIME

    def _stock(
        self, backend: Backend, spec: WrappingKeySpec, algorithm: WrappingAlgorithm
    ) -> Stock:
        key = (id(backend), spec, algorithm)
        if key not in self._stocks:
            stopped = id(backend) in self._stopped_backends
            self._stocks[key] = Stock(backend, spec, algorithm, self._settings, stopped=stopped)
        return self._stocks[key]

    # --- in the background -------------------------------------------------------------------

    def _start_threads(self) -> None:
        """Start the threads if this process has none; without threads pairs are made inline."""
        if self._closed or not self._stocks or self._threads:
            return
        with suppress(RuntimeError):  # no more threads, or the interpreter is shutting down
            for _ in range(self._settings.threads):
                thread = threading.Thread(target=self._work, name="hsmwrap-keypool", daemon=True)
                thread.start()
                self._threads.append(thread)

    def _work(self) -> None:
        _step_back()
        while (job := self._next_job()) is not None:
            job()

    def _next_job(self) -> Callable[[], object] | None:
        """Wait for a job; None once the pool is closed."""
        while True:
            now, tick = self._clock(), self._timer()
            with self._changed:
                if self._closed:
                    return None
                if job := self._pick(now, tick):
                    return job
                pauses = [stock.pause(now, tick) for stock in self._stocks.values()]
                self._changed.wait(min(pauses, default=LONGEST_PAUSE))

    def _pick(self, now: datetime, tick: float) -> Callable[[], object] | None:
        """The next job: discards first, then a pair of the stock with the fewest."""
        if self._closed:
            return None
        for stock in self._stocks.values():
            stock.drop_aged(now)
        due = [stock for stock in self._stocks.values() if stock.resume_at <= tick]
        for stock in due:
            if stock.has_discards:
                return partial(self._discard, stock, stock.discards.popleft())
        lowest = min((s for s in due if s.wants_refill), key=lambda s: s.level, default=None)
        if lowest is None:
            return None
        lowest.making += 1
        return partial(self._make, lowest)

    def _make(self, stock: Stock) -> None:
        made_at = self._clock()
        lifetime = self._settings.max_age + self._settings.token_lifetime
        # The label of a resident key holds whole seconds.
        expires_at = (made_at + lifetime).replace(microsecond=0)
        try:
            tick = self._timer()
            key = stock.backend.generate_wrapping_key(
                stock.spec, stock.algorithm, expires_at=expires_at
            )
        except Exception as error:  # noqa: BLE001  # a plug-in may raise anything; the thread has to survive
            self._failed(stock, error, making=1)
            return
        self._learn_key_set(stock.backend, key.key_set, tick)
        with self._changed:
            stock.put(ReadyPair(key, made_at, expires_at))
            self._changed.notify_all()

    def _discard(self, stock: Stock, private_key: PrivateKeyRef) -> bool:
        """Destroy a resident key; False if the backend is unavailable or refuses the PIN."""
        try:
            stock.backend.discard_wrapping_key(private_key)
        except Exception as error:  # noqa: BLE001  # as in _make
            unavailable = isinstance(error, (ServiceUnavailable, PinError))
            self._failed(stock, error, again=private_key if unavailable else None)
            return not unavailable
        return True

    def _discard_rest(self, stock: Stock) -> None:
        while stock.has_discards and self._discard(stock, stock.discards.popleft()):
            pass
        if stock.discards:
            left = {"left_for_the_reaper": len(stock.discards)}
            _log.warning("key-pair pool: not discarded", extra=stock.described() | left)

    def _failed(
        self,
        stock: Stock,
        error: Exception,
        *,
        making: int = 0,
        again: PrivateKeyRef | None = None,
    ) -> None:
        """Back off, or stop for good; ``making`` pairs failed, ``again`` is discarded later."""
        tick = self._timer()
        with self._changed:
            stock.making -= making
            if again is not None:
                stock.discards.append(again)
            pause = stock.failed(tick)
            for each in self._stopped_by(error, stock):
                each.stopped = True
            self._changed.notify_all()
        # Only the type: the text of a plug-in's error may hold anything.
        what = {"error": type(error).__name__, "stopped": stock.stopped, "backoff_seconds": pause}
        _log.warning("key-pair pool: the backend failed", extra=stock.described() | what)

    def _stopped_by(self, error: Exception, stock: Stock) -> list[Stock]:
        """The stocks that stop for good: after a PIN error a second try may lock the HSM token."""
        if isinstance(error, (BackendClosed, PinError)):
            self._stopped_backends.add(id(stock.backend))
            return [each for each in self._stocks.values() if each.backend is stock.backend]
        return [stock] if isinstance(error, UnsupportedOperation) else []

    # --- forks -------------------------------------------------------------------------------

    def after_fork_in_child(self) -> None:
        """Start empty, as in a forked child: a new lock, no threads, empty stocks.

        The keys belong to the parent: they are not discarded.
        """
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._key_sets: dict[int, tuple[str, float]] = {}
        self._stocks = {key: stock.emptied() for key, stock in self._stocks.items()}


_NEVER = datetime.max.replace(tzinfo=UTC)
_POOLS: WeakSet[KeyPool] = WeakSet()


def _utc_now() -> datetime:
    return datetime.now(UTC)


def _step_back() -> None:
    """Raise the niceness of this thread. Only Linux has one for each thread."""
    if sys.platform == "linux":
        with suppress(
            OSError
        ):  # not allowed by a sandbox: the pool works, but takes its full share
            thread = threading.get_native_id()
            niceness = os.getpriority(os.PRIO_PROCESS, thread)
            os.setpriority(os.PRIO_PROCESS, thread, niceness + NICENESS)


def _close_at_exit() -> None:
    # A daemon thread inside a PKCS#11 module would crash the process when the module is unloaded.
    for pool in list(_POOLS):
        pool.close()


atexit.register(_close_at_exit)
