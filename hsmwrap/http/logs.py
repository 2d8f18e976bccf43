"""Structured logs: one JSON object per line, with the fields given as ``extra``.

An exception is logged by type and place, never by its text, because texts of other libraries quote
parameters (SQLAlchemy's do).
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import traceback
from datetime import UTC, datetime
from typing import Any

_PLACE = re.compile(r"at [^\s:]+\.py:\d+, in \w+", re.ASCII)
_log = logging.getLogger(__name__)
_encode = json.JSONEncoder(default=str).encode
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Time (UTC), level, logger, message, then the fields of ``extra``."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {n: v for n, v in vars(record).items() if n not in _STANDARD}
        if record.exc_info and record.exc_info[1]:
            line |= describe(record.exc_info[1])
        return _encode(line)


def configure(level: int = logging.INFO) -> None:
    """Send the log of hsmwrap to stderr as JSON; and what the interpreter prints there.

    That is exceptions that nothing catches: of destructors (as python-pkcs11's), of threads, of the
    process. A second call changes nothing.
    """
    logger = logging.getLogger("hsmwrap")
    if any(isinstance(h.formatter, JsonFormatter) for h in logger.handlers):
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
    sys.excepthook = _log_uncaught
    sys.unraisablehook = _log_unraisable
    threading.excepthook = _log_end_of_thread


def _log_uncaught(kind: type[BaseException], error: BaseException, _trace: object) -> None:
    # Also what Cython prints of an exception in a destructor.
    if not issubclass(kind, KeyboardInterrupt):
        _log.error("uncaught exception", exc_info=error)


def _log_unraisable(what: sys.UnraisableHookArgs) -> None:
    source = getattr(what.object, "__qualname__", None) or type(what.object).__qualname__
    if what.exc_value is not None:
        _log.error("exception ignored", extra={"source": source}, exc_info=what.exc_value)


def _log_end_of_thread(what: threading.ExceptHookArgs) -> None:
    thread = None if what.thread is None else what.thread.name
    if what.exc_value is not None and not isinstance(what.exc_value, SystemExit):
        _log.error("thread ended", extra={"thread_name": thread}, exc_info=what.exc_value)


def describe(error: BaseException) -> dict[str, str]:
    """Types and places of an exception and its causes, without their texts."""
    chain = [error]
    while (cause := _cause(chain[-1])) and cause not in chain:
        chain.append(cause)
    return {
        "exception": " <- ".join(f"{type(e).__module__}.{type(e).__qualname__}" for e in chain),
        "traceback": "".join(line for e in chain for line in _places(e)),
    }


def _places(error: BaseException) -> list[str]:
    """Where it came through; of one by ``hsmwrap.errors.strip_tracebacks`` the note."""
    notes = [note for note in getattr(error, "__notes__", ()) if _PLACE.fullmatch(note)]
    return [*traceback.format_tb(error.__traceback__), *(f"  {note}\n" for note in notes)]


def _cause(error: BaseException) -> BaseException | None:
    return error.__cause__ or (None if error.__suppress_context__ else error.__context__)
