"""No core dump of this process: what is in its memory is not written to a disk by a crash."""

from __future__ import annotations

import ctypes
import os
import resource

from hsmwrap.errors import ConfigurationError

_PR_SET_DUMPABLE = 4


def forbid_core_dumps() -> None:
    """Let no crash of this process or of its forks write a core dump; cannot be taken back.

    The limit of size alone would not do: Linux ignores it where core dumps go to a program
    (``core_pattern`` with a pipe; core(5)). A process that is not dumpable writes none in any case.
    A program that it starts is dumpable again, and keeps the limit.

    It also keeps other processes of the same user from reading this one's memory and from attaching
    a debugger: only root can.

    Raises:
        ConfigurationError: The kernel refuses it (a seccomp filter, or it is not Linux).
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    prctl = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None)
    if prctl is None or prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
        why = os.strerror(ctypes.get_errno()) if prctl else "prctl is missing"
        raise ConfigurationError(f"core dumps cannot be forbidden here: {why}")
