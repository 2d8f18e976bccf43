"""What happens when the process forks: the one registry of fork hooks, in a stated order.

A child of a process with threads inherits every lock as it was, also those that other threads held
at that moment, and no thread is left to release them. So some objects have to be brought to rest
before a fork, and the others start afresh in the child. Each says by :class:`ForkTurn` when it is
its turn, whatever the order in which modules were imported.
"""

from __future__ import annotations

import os
import threading
from contextlib import ExitStack
from enum import IntEnum
from weakref import WeakKeyDictionary


class ForkTurn(IntEnum):
    """The order of hooks: before a fork and in the child from the first, in the parent reversed."""

    PKCS11_MODULES = 1
    """First: a call inside a PKCS#11 module may have to enter libcrypto before it can return."""
    LIBCRYPTO = 2
    METRICS = 3
    STATE = 4
    """Locks, pools and connections: a fork does not wait for them, the child starts afresh."""
    THREADS = 5
    """Last: threads that run in the child as well start when everything else is as it should be."""


class ForkAware:
    """An object that :func:`register` makes known; it overrides what it needs."""

    fork_turn: ForkTurn = ForkTurn.STATE

    def fork_announced(self) -> None:
        """A thread is about to fork, and may have to wait for the fork of another thread first."""

    def before_fork(self) -> None:
        """Come to rest, in the thread that forks."""

    def after_fork_in_parent(self) -> None:
        """Go on; also called where :meth:`before_fork` raised."""

    def after_fork_in_child(self) -> None:
        """Start afresh: only the thread that forked exists here."""


_registered: WeakKeyDictionary[ForkAware, None] = WeakKeyDictionary()
_one_at_a_time = threading.RLock()  # a signal handler may fork in the middle of a fork
_under_way: list[list[ForkAware]] = []
_forking: set[int] = set()


def register(each: ForkAware) -> None:
    """Call the hooks of ``each`` at every fork, for as long as it exists: this keeps none alive."""
    _registered[each] = None


def forking_threads() -> set[int]:
    """Threads inside ``fork()``: they run Python code, so they hold no lock of a library."""
    return _forking


def _in_turn() -> list[ForkAware]:
    # Of the same turn, in the order in which they were registered. Iterating over the dictionary
    # itself would fail if another thread registered something meanwhile.
    alive = (reference() for reference in _registered.keyrefs())
    return sorted((each for each in alive if each is not None), key=lambda each: each.fork_turn)


def _before() -> None:
    everyone = _in_turn()
    _forking.add(threading.get_ident())
    for each in everyone:
        each.fork_announced()
    _one_at_a_time.acquire()
    _under_way.append(everyone)
    # An ExitStack calls all, last in first out, whatever one of them raises.
    with ExitStack() as hooks:
        for each in reversed(everyone):
            hooks.callback(each.before_fork)


def _after_in_parent() -> None:
    if not _under_way:
        return  # the child of a signal handler that forked in the middle of this fork
    with ExitStack() as hooks:
        hooks.callback(_one_at_a_time.release)
        for each in _under_way.pop():
            hooks.callback(each.after_fork_in_parent)
        if not _under_way:
            _forking.discard(threading.get_ident())


def _after_in_child() -> None:
    global _one_at_a_time  # noqa: PLW0603  # another thread may have held it
    _one_at_a_time = threading.RLock()
    _under_way.clear()
    _forking.clear()
    with ExitStack() as hooks:
        for each in reversed(_in_turn()):
            hooks.callback(each.after_fork_in_child)


os.register_at_fork(
    before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child
)
