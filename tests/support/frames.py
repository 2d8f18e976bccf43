"""Finds secrets in everything an exception keeps alive: texts, other errors, variables of frames.

Frames of the tests themselves are left out: who tests with a secret has it.
"""

import base64
import ctypes
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import FunctionType

_TESTS = str(Path(__file__).resolve().parents[1])


def assert_no_secret(error, secrets):
    """Fail where ``error`` keeps any of ``secrets`` (bytes by name), and say which and where."""
    assert all(secrets.values()), "an empty secret is everywhere"
    found = [
        f"{name} in {place}"
        for place, value in _kept(error)
        for name, secret in secrets.items()
        if _holds(value, secret)
    ]
    assert not found, "; ".join(dict.fromkeys(found))


def frames_of(error):
    """The frames that ``error`` and the errors before it keep, those of tests left out."""
    for each in _chain(error):
        traceback = each.__traceback__
        while traceback is not None:
            if not traceback.tb_frame.f_code.co_filename.startswith(_TESTS):
                yield traceback.tb_frame
            traceback = traceback.tb_next


def _chain(error):
    """The error and all that it came from, shown or not."""
    seen, waiting = [], [error]
    while waiting:
        each = waiting.pop()
        if each is not None and not any(each is other for other in seen):
            seen.append(each)
            waiting += [each.__cause__, each.__context__, *getattr(each, "exceptions", ())]
    return seen


def _kept(error):
    for each in _chain(error):
        name = type(each).__name__
        yield f"{name}", [str(each), repr(each), each.args, vars(each)]
        # C attributes of decoding and parsing errors: the input that they failed on.
        for attribute in ("object", "doc", "obj", "filename"):
            yield f"{name}.{attribute}", getattr(each, attribute, None)
    for frame in frames_of(error):
        for variable, value in frame.f_locals.items():
            yield (
                f"{frame.f_code.co_qualname}: {variable}"
                if hasattr(frame.f_code, "co_qualname")
                else f"{frame.f_code.co_name}: {variable}",
                value,
            )


def _holds(value, secret, depth=6):
    if isinstance(value, bytes | bytearray | memoryview | ctypes.Array):
        return secret in bytes(value)
    if isinstance(value, str):
        return any(spelling in value for spelling in _spellings(secret))
    if isinstance(value, int):
        return value in (int.from_bytes(secret), int.from_bytes(secret, "little"))
    return depth > 0 and any(_holds(part, secret, depth - 1) for part in _parts(value))


def _parts(value):
    """The contents of a value, and what a report of variables would print of it."""
    with suppress(Exception):  # of an object that is only half made
        yield repr(value)
    if isinstance(value, Mapping):
        yield from [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    elif is_dataclass(value) and not isinstance(value, type):
        yield from (getattr(value, field.name) for field in fields(value))
    elif isinstance(value, partial):
        yield from [*value.args, *value.keywords.values()]
    elif isinstance(value, FunctionType):
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # a cell that is empty by now
                yield cell.cell_contents
    elif hasattr(value, "private_numbers"):
        numbers = value.private_numbers()
        yield from (
            getattr(numbers, n)
            for n in ("p", "q", "d", "private_value", "x")
            if hasattr(numbers, n)
        )


def _spellings(secret):
    encoded = base64.b64encode(secret).decode().rstrip("=")
    spellings = {repr(secret)[2:-1], secret.hex(), secret.hex().upper(), encoded}
    with suppress(UnicodeDecodeError):
        spellings.add(secret.decode())
    return spellings
