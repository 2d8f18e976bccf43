"""The sweeper: processes due work in the background.

It deletes expired material and keys past their deletion date, destroys objects scheduled for
destruction and expired wrapping keys, and deletes expired marks of nonces and tokens. Each kind of
work runs even if the others fail: an unavailable HSM must not keep material in the database.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.sql.elements import ColumnElement

from hsmwrap import forks
from hsmwrap.backend import ReapsWrappingKeys
from hsmwrap.errors import HsmwrapError, ServiceUnavailable
from hsmwrap.forks import ForkAware, ForkTurn
from hsmwrap.kms.core import Core
from hsmwrap.kms.keysets import Resealer
from hsmwrap.kms.lifecycle import KeyLifecycle
from hsmwrap.kms.schema import Key, KeySetSeen
from hsmwrap.kms.states import KeyState

_log = logging.getLogger(__name__)


class Sweep:
    """One sweep; any number of processes may sweep at the same time.

    Attributes:
        ended: When the last sweep ended, in seconds since 1970.
        failures: How many parts have failed.
        counted: CMKs by state, and key sets by backend, id and use, as of the last sweep.
    """

    def __init__(
        self,
        core: Core,
        purges: Iterable[Callable[[datetime], None]],
        anchor: Callable[[], None],
        reseal_at_once: int = 0,
    ) -> None:
        """Take the parts of the KMS, what deletes expired marks, and what anchors the audit log.

        ``reseal_at_once`` is how many keys one sweep moves to the current key set; 0: none.
        """
        self._core = core
        self._lifecycle = KeyLifecycle(core)
        self._purges = tuple(purges)
        self._anchor = anchor
        self._reseal = Resealer(core.database, core.audit, reseal_at_once)
        self.ended = 0.0
        self.failures = 0
        self.counted: dict[str, dict[tuple[str, ...], float]] = {}

    def __call__(self, now: datetime) -> None:
        """Process what is due at ``now``; failures are logged and retried by the next sweep."""
        backends = self._core.named.values()
        reapers = [ReapsWrappingKeys.of(backend) for backend in backends]
        work: tuple[Callable[[], object], ...] = (
            lambda: self._each(Key.material_expires_at <= now, self._core.expire, now),
            lambda: self._each(Key.deletion_at <= now, self._delete, now),
            lambda: self._core.objects.destroy_due(now),
            *(lambda purge=purge: purge(now) for purge in self._purges),
            lambda: self._core.database.schema().require_not_newer(),
            self._core.unusable.look,
            *(lambda reaper=reaper: reaper.reap(now) for reaper in reapers if reaper),
            *(lambda backend=backend: self._reseal(backend, now) for backend in backends),
            self._anchor,
            self._count,
        )
        for part in work:
            try:
                part()
            except HsmwrapError as error:
                self.failures += 1
                facts = {"code": error.code, "why": str(error)}
                _log.warning("a part of the sweep failed", extra=facts)
            except Exception:  # noqa: BLE001 (the other parts run all the same)
                self.failures += 1
                _log.exception("a part of the sweep failed")
        self.ended = now.timestamp()

    def _count(self) -> None:
        with self._core.database.read() as transaction:
            states = select(Key.state, func.count()).group_by(Key.state)
            found = {row[0]: row[1] for row in transaction.execute(states)}
            sets = transaction.scalars(select(KeySetSeen)).all()
        self.counted = {
            "keys": {(state.value,): found.get(state, 0) for state in KeyState},
            "key_set": {
                (each.backend, each.key_set, "opens only" if each.superseded_at else "current"): 1
                for each in sets
                if each.backend in self._core.named
                and self._core.unusable.has_key_set(each.backend, each.key_set)
            },
        }

    def _delete(self, key_id: str, now: datetime) -> None:
        if self._lifecycle.delete_due(key_id, now):
            self._core.audit("DeleteKey", key_id)

    def _each(
        self, due: ColumnElement[bool], work: Callable[[str, datetime], object], now: datetime
    ) -> None:
        """Do the work for each due key; raises the last failure after all keys were tried.

        Stops at once if the database is unavailable, since the other keys would fail too.
        """
        with self._core.database.read() as transaction:
            key_ids = transaction.scalars(select(Key.key_id).where(due)).all()
        failed: Exception | None = None
        for key_id in key_ids:
            try:
                work(key_id, now)
            except ServiceUnavailable:
                raise
            except Exception as error:  # noqa: BLE001 (raised below)
                facts = {"key_id": key_id, "error": type(error).__name__}
                _log.error("due work on a key failed", extra=facts)
                failed = error
        if failed is not None:
            raise failed


class Sweeper(ForkAware):
    """A thread that sweeps at intervals; a child after ``fork()`` gets its own."""

    fork_turn = ForkTurn.THREADS

    def __init__(self, sweep: Callable[[], None], seconds: float) -> None:
        """Start the thread."""
        self._sweep = sweep
        self._seconds = seconds
        self._start()
        forks.register(self)

    def _start(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hsmwrap-sweeper", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            try:
                self._sweep()
            except Exception:  # noqa: BLE001 (the thread has to survive every failure)
                _log.exception("sweep failed")

    def after_fork_in_child(self) -> None:
        """Start the thread in a forked child, unless the sweeper was stopped."""
        if not self._stop.is_set():
            self._start()

    def stop(self) -> None:
        """Stop after the running sweep has finished. Safe to call again."""
        self._stop.set()
        self._thread.join()
