"""The one lock for many that read, or one that writes; the lock of libcrypto; locks of files."""

from __future__ import annotations

import errno
import fcntl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from hsmwrap import forks
from hsmwrap.errors import PoolTimeout
from hsmwrap.forks import ForkAware, ForkTurn


class ReadWriteLock(ForkAware):
    """Many threads that read, or one that writes; first come, first served.

    Both may be nested. A thread that reads may write for a while, and may yield its read while it
    makes a long call that needs no lock: a waiting writer goes first then.

    In a forked child the lock is free. What the forking thread held, it does not hold there, and
    releasing it does nothing. With a ``fork_turn`` before ``STATE`` a fork waits until no thread
    holds the lock but those that fork themselves: Python runs a signal handler, which may fork,
    between two calls into a library, when its thread holds none of the library's own locks.
    """

    _mutex: threading.RLock
    """That of the condition: entered directly, it takes a third of the time."""
    _changed: threading.Condition
    _queue: deque[object]
    _readers: dict[int, int]
    _writer: int | None

    def __init__(
        self,
        *,
        busy: str = "other threads are busy",
        timeout: float | None = None,
        fork_turn: ForkTurn = ForkTurn.STATE,
        fork_wait: float | None = None,
    ) -> None:
        """Start free.

        Args:
            busy: What :class:`PoolTimeout` says.
            timeout: Seconds that a ``with`` block waits; None: for as long as it takes.
            fork_turn: When a fork waits for this lock.
            fork_wait: Seconds that it waits before it goes ahead regardless.
        """
        self.fork_turn = fork_turn
        self._busy = busy
        self._timeout = timeout
        self._fork_wait = fork_wait
        self.after_fork_in_child()
        forks.register(self)

    @property
    def reads(self) -> int:
        """How many reads are held, nested ones included."""
        with self._changed:
            return sum(self._readers.values())

    @property
    def readers(self) -> frozenset[int]:
        """Identities of the threads that read."""
        with self._changed:
            return frozenset(self._readers)

    @property
    def writer(self) -> int | None:
        """Identity of the thread that writes."""
        return self._writer

    @property
    def waiting(self) -> int:
        """How many threads wait."""
        return len(self._queue)

    def read(self) -> _Reading:
        """Read for the length of a ``with`` block.

        Raises:
            PoolTimeout: Others wrote for too long; where ``with`` begins.
        """
        return _Reading(self, self._timeout, self._busy)

    @contextmanager
    def write(self) -> Iterator[None]:
        """Write for the length of a ``with`` block.

        Raises:
            PoolTimeout: Others read or wrote for too long.
        """
        if not self.acquire_write(self._timeout):
            raise PoolTimeout(self._busy)
        try:
            yield
        finally:
            self.release_write()

    @contextmanager
    def yielded(self) -> Iterator[None]:
        """Let others write for the length of a ``with`` block in a ``with`` block that reads.

        Raises:
            PoolTimeout: Others wrote for too long; not where ``with`` begins, but where it ends.
        """
        reads = self._yield()
        try:
            yield
        finally:
            if reads and not self.acquire_read(self._timeout, reads):
                raise PoolTimeout(self._busy)

    def acquire_read(self, timeout: float | None = None, reads: int = 1) -> bool:
        """Begin to read; False if others wrote for ``timeout`` seconds."""
        me = threading.get_ident()
        with self._mutex:
            if me not in self._readers and self._writer != me:
                free = self._writer is None and not self._queue and not self._closed_for_fork
                if not free and not self._await(lambda: self._writer is None, timeout):
                    return False
            self._readers[me] = self._readers.get(me, 0) + reads
            return True

    def release_read(self) -> None:
        """End the read that began last; in a child, one that began in the parent ended there."""
        me = threading.get_ident()
        with self._mutex:
            left = self._readers.pop(me, 0) - 1
            if left > 0:
                self._readers[me] = left
            elif self._queue or self._closed_for_fork:
                self._changed.notify_all()

    def acquire_write(self, timeout: float | None = None) -> bool:
        """Begin to write; False if others read or wrote for ``timeout`` seconds.

        The thread's own reads end, and begin again after it has written. After False they do not.
        """
        me = threading.get_ident()
        with self._changed:
            if self._writer != me:
                reads = self._yield()
                free = self._writer is None and not (
                    self._readers or self._queue or self._closed_for_fork
                )
                if not free and not self._await(
                    lambda: self._writer is None and not self._readers, timeout
                ):
                    return False
                self._writer, self._writes, self._reads_of_writer = me, 0, reads
            self._writes += 1
            return True

    def release_write(self) -> None:
        """End the write that began last."""
        me = threading.get_ident()
        with self._changed:
            if self._writer != me:
                return  # it ended in the parent
            self._writes -= 1
            if not self._writes:
                self._writer = None
                if self._reads_of_writer:
                    self._readers[me] = self._reads_of_writer
                self._changed.notify_all()

    def _yield(self) -> int:
        with self._changed:
            reads = self._readers.pop(threading.get_ident(), 0)
            if reads:
                self._changed.notify_all()
            return reads

    def _await(self, free: Callable[[], bool], timeout: float | None) -> bool:
        place = object()
        self._queue.append(place)
        try:
            return self._changed.wait_for(
                lambda: self._is_first(place) and free() and not self._closed_for_fork, timeout
            )
        finally:
            with suppress(ValueError):
                self._queue.remove(place)
            self._changed.notify_all()

    def _is_first(self, place: object) -> bool:
        # An empty queue is a child's: a signal handler forked while this thread waited.
        return not self._queue or self._queue[0] is place

    # --- forks -------------------------------------------------------------------------------

    def fork_announced(self) -> None:
        """Another fork need not wait for this thread any more."""
        if self.fork_turn < ForkTurn.STATE:
            with self._changed:
                self._changed.notify_all()

    def before_fork(self) -> None:
        """Let no thread in and wait for those that hold the lock."""
        if self.fork_turn < ForkTurn.STATE:
            with self._changed:
                self._closed_for_fork = True
                self._changed.wait_for(self._held_by_forking_threads_only, self._fork_wait)

    def _held_by_forking_threads_only(self) -> bool:
        holders = self._readers.keys() | ({self._writer} - {None})
        return holders <= forks.forking_threads()

    def after_fork_in_parent(self) -> None:
        """Let threads in again."""
        if self.fork_turn < ForkTurn.STATE:
            with self._changed:
                self._closed_for_fork = False
                self._changed.notify_all()

    def after_fork_in_child(self) -> None:
        """Be free."""
        # Reentrant: a signal handler may find its own thread holding it.
        self._mutex = threading.RLock()
        self._changed = threading.Condition(self._mutex)
        self._queue = deque()
        self._readers = {}
        self._writer = None
        self._writes = 0
        self._reads_of_writer = 0
        self._closed_for_fork = False


class _Reading:
    """What :meth:`ReadWriteLock.read` returns: many calls pass several of them."""

    __slots__ = ("_busy", "_lock", "_timeout")

    def __init__(self, lock: ReadWriteLock, timeout: float | None, busy: str) -> None:
        self._lock, self._timeout, self._busy = lock, timeout, busy

    def __enter__(self) -> None:
        if not self._lock.acquire_read(self._timeout):
            raise PoolTimeout(self._busy)

    def __exit__(self, *_exc: object) -> None:
        self._lock.release_read()


LIBCRYPTO = ReadWriteLock(fork_turn=ForkTurn.LIBCRYPTO)
"""Read while calling libcrypto, the distribution's and pyca's own; a fork waits for the call.

A child inherits libcrypto's locks as they were, also those that other threads held: then it may
hang in its first key generation (field note 37). This covers the calls that hold it, not those of
other users of the same library.
"""


FILE_LOCK_SECONDS = 10.0
"""How long a call waits for the lock of a file."""
# flock has no deadline (field note 77). What is done under these locks takes under a millisecond.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.0002, 0.01


def lock_file(descriptor: int, seconds: float = FILE_LOCK_SECONDS) -> None:
    """Take the lock (flock) of an open file; it excludes processes, and other openings of it.

    Raises:
        TimeoutError: Others held it for so many seconds.
    """
    deadline, pause = time.monotonic() + seconds, _FIRST_PAUSE
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            left = deadline - time.monotonic()
        else:
            return
        if left <= 0:
            held = f"its lock was held by others for {seconds:g} seconds; fuser names who has it"
            raise TimeoutError(errno.ETIMEDOUT, held)
        time.sleep(min(pause, left))
        pause = min(2 * pause, _LONGEST_PAUSE)
