"""Structured logs: one JSON object per line, with the fields given as ``extra``.

An exception is logged by type and place, never by its text, because texts of other libraries quote
parameters (SQLAlchemy's do).
"""

from __future__ import annotations

import json
import logging
import re
import sys
import traceback
from datetime import UTC, datetime
from typing import Any

_PLACE = re.compile(r"at [^\s:]+\.py:\d+, in \w+", re.ASCII)
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
    """Send the log of hsmwrap to stderr as JSON. A second call changes nothing."""
    logger = logging.getLogger("hsmwrap")
    if any(isinstance(h.formatter, JsonFormatter) for h in logger.handlers):
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False


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
