"""``hsmwrap serve`` as a careless operator runs it: all is logged, with each frame's variables.

Arguments: those of ``hsmwrap serve``. While the file ``break`` is beside the configuration, calls
of the backends fail with an error that no code expects, after they were made. A canary of its own
is planted in the log and in memory, so that a search that finds nothing is a blind one.
"""

import logging
import sys
import traceback
from pathlib import Path

from hsmwrap.cli import main
from hsmwrap.http import app, logs, server
from hsmwrap.pkcs11.sessions.connection import Connection
from hsmwrap.software import SoftwareBackend

_log = logging.getLogger("careless")
_kept = []


class Careless(logging.Formatter):
    def format(self, record):
        return f"{super().format(record)} {vars(record)!r}"

    def formatException(self, exc_info):  # noqa: N802 (logging's name)
        report = traceback.TracebackException(*exc_info, capture_locals=True)
        return "".join(report.format())


def configure(**_level):
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Careless())
    logging.basicConfig(level=logging.DEBUG, handlers=[handler], force=True)
    for name in ("sqlalchemy", "alembic", "hsmwrap"):
        logging.getLogger(name).setLevel(logging.DEBUG)
    planted = (_directory / "planted").read_text()
    _kept.append(planted)
    _log.debug("planted %s", planted)


def logging_failed(error, exchange, failed=app._failed):
    _log.error("failed: %r", error, exc_info=error)
    return failed(error, exchange)


def break_after(owner, name):
    method = getattr(owner, name)

    def breaking(*arguments, **named):
        answer = method(*arguments, **named)
        if (_directory / "break").exists():
            raise ZeroDivisionError
        return answer

    setattr(owner, name, breaking)


if __name__ == "__main__":
    _directory = Path(sys.argv[sys.argv.index("--config") + 1]).parent
    logs.configure = configure
    app._failed = logging_failed
    break_after(Connection, "run")
    break_after(SoftwareBackend, "encrypt")
    break_after(SoftwareBackend, "decrypt")
    server._LOGGING["loggers"]["gunicorn.error"]["level"] = "DEBUG"
    sys.exit(main(["serve", *sys.argv[1:]]))
