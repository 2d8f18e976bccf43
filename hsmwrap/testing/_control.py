"""The control file of the fault shim: ``faultshim/control.h``, mirrored.

A test compiles the header and compares every offset. Each 64-bit field is written by one aligned
store, which the shim reads atomically.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from pathlib import Path

SOURCES = Path(__file__).parent / "faultshim"
MAGIC = 0x6D696873
VERSION = 4
CODES_MAX = 16
PROCESSES_MAX = 128
PIN_MAX = 64

RULE_ONCE = 1
RULE_EVERY = 2
RULE_COUNT_MAX = (1 << 29) - 1
CHANCE_ALWAYS = 1 << 16
DEVICE_ABSENT = 1
DEVICE_STICKY = 2
DEVICE_REMOVAL = 4

FUNCTIONS: tuple[str, ...] = tuple(
    re.findall(r"X\((C_\w+), \d, [A-Z]+\)", (SOURCES / "functions.h").read_text("ascii"))
)
"""Names of the PKCS#11 v2.40 functions, in the order of CK_FUNCTION_LIST."""


class FunctionControl(ctypes.Structure):
    """``struct function_control``: what happens to one function, and what happened."""

    _fields_ = (
        ("calls", ctypes.c_uint64),
        ("injected", ctypes.c_uint64),
        ("rule", ctypes.c_uint64),
        ("rule_start", ctypes.c_uint64),
        ("chance", ctypes.c_uint64),
        ("chance_start", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("latency", ctypes.c_uint64),
        ("codes", ctypes.c_uint32 * CODES_MAX),
    )


class ProcessShare(ctypes.Structure):
    """``struct process_share``: what one process holds."""

    _fields_ = (
        ("pid", ctypes.c_uint64),
        ("sessions", ctypes.c_uint64),
        ("session_objects", ctypes.c_uint64),
    )


class Control(ctypes.Structure):
    """``struct control``: the whole file."""

    _fields_ = (
        ("magic", ctypes.c_uint32),
        ("version", ctypes.c_uint32),
        ("size", ctypes.c_uint64),
        ("device", ctypes.c_uint64),
        ("restrictions", ctypes.c_uint64),
        ("vendor", ctypes.c_uint64),
        ("pin", ctypes.c_char * PIN_MAX),
        ("kill_calls", ctypes.c_uint64),
        ("kill_changes", ctypes.c_uint64),
        ("session_high_water", ctypes.c_uint64),
        ("concurrent_high_water", ctypes.c_uint64),
        ("token_objects_created", ctypes.c_uint64),
        ("token_objects_destroyed", ctypes.c_uint64),
        ("initialized_with_locking", ctypes.c_uint64),
        ("initialized_without_locking", ctypes.c_uint64),
        ("session_conflicts", ctypes.c_uint64),
        ("finalize_conflicts", ctypes.c_uint64),
        ("uninitialized_calls", ctypes.c_uint64),
        ("processes_refused", ctypes.c_uint64),
        ("function", FunctionControl * len(FUNCTIONS)),
        ("process", ProcessShare * PROCESSES_MAX),
    )


def create(path: Path) -> None:
    """Make a new control file, readable by its owner only.

    Raises:
        FileExistsError: There is one already.
    """
    head = Control(magic=MAGIC, version=VERSION, size=ctypes.sizeof(Control))
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(bytes(head))


def open_shared(path: Path) -> Control:
    """Map a control file; what is written to the answer is seen by every process at once.

    Raises:
        ValueError: The file is not a control file of this version.
    """
    with path.open("r+b") as file:
        if os.fstat(file.fileno()).st_size != ctypes.sizeof(Control):
            raise ValueError(f"{path} is not a control file of version {VERSION}")
        control = Control.from_buffer(mmap.mmap(file.fileno(), 0))
    if (control.magic, control.version, control.size) != (MAGIC, VERSION, ctypes.sizeof(Control)):
        raise ValueError(f"{path} is not a control file of version {VERSION}")
    return control
