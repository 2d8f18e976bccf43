"""``hsmwrap serve``: serve the reference KMS with Alibaba's API (extra ``server``)."""

from __future__ import annotations

import argparse
import logging
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsmwrap.cli.arguments import Subparsers
from hsmwrap.cli.config import described
from hsmwrap.cli.extras import require_server
from hsmwrap.coredumps import forbid_core_dumps
from hsmwrap.errors import ConfigurationError, HsmwrapError

if TYPE_CHECKING:
    from hsmwrap.kms.config import ServerConfig
    from hsmwrap.kms.tls import Tls

_log = logging.getLogger("gunicorn.error")  # the log of the process that starts the workers


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "serve",
        help="serve the reference KMS over HTTP",
        description="Serve the reference KMS. Prints 'ready http://HOST:PORT' when it listens. "
        "SIGTERM ends it after the running calls, SIGINT at once.",
        add_help=False,
    )
    parser.add_argument("-h", "--help", action=_Help, nargs=0, help="show this and every setting")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the TOML configuration")
    parser.add_argument("--port", type=int, metavar="N", help="instead of the file's; 0: any free")
    parser.add_argument(
        "--workers", type=_workers, default=1, metavar="N", help="processes (default: %(default)s)"
    )
    parser.set_defaults(run=run)


def _workers(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError("takes a number of processes, 1 or more")
    return int(text)


class _Help(argparse.Action):
    """Shows the settings as well, which are read only then: they need the extra ``server``."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        parser.print_help()
        try:
            require_server()
        except ConfigurationError as error:
            parser.exit(message=f"\nsettings: {error}\n")
        from hsmwrap.kms.config import settings_table  # noqa: PLC0415 (the extra may be absent)

        print(f"\nsettings of the configuration:\n{described(settings_table())}")
        parser.exit()


def run(args: argparse.Namespace) -> int:
    """Serve until a signal.

    Raises:
        ConfigurationError: The configuration cannot be used, or the extra is not installed.
    """
    require_server()
    from hsmwrap.http.server import Server  # noqa: PLC0415 (the extra may be absent)

    served = _Served(args.config)
    config = served.config
    if not config.core_dumps:
        forbid_core_dumps()
    server = Server(
        lambda: _application(served.config, served.tls),
        served,
        served.refresh,
        host=config.host,
        port=config.port if args.port is None else args.port,
        workers=args.workers,
        threads=config.limits.max_threads,
        max_requests=config.limits.max_requests,
        shutdown_seconds=config.limits.shutdown_seconds,
        drain_seconds=config.limits.drain_seconds,
        metrics_address=config.metrics_address,
    )
    return server.run_to_exit()


class _Served:
    """The configuration that workers are started with: the last one of the file that was right.

    So a file that is wrong stops neither a worker that replaces a dead one, nor a reload. The same
    goes for the files of the TLS certificate and its key.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._read = self.config, self.tls = self._checked()

    def _checked(self) -> tuple[ServerConfig, Tls | None]:
        from hsmwrap.kms.checking import check  # noqa: PLC0415 (the extra may be absent)
        from hsmwrap.kms.config import load_config  # noqa: PLC0415 (the extra may be absent)
        from hsmwrap.kms.tls import open_tls  # noqa: PLC0415 (the extra may be absent)

        config = load_config(self._path)
        check(config)
        return config, open_tls(config)

    def check(self) -> bool:
        """Read the file again; what is wrong with it is logged, and nothing changes."""
        try:
            self._read = self._checked()
        except HsmwrapError as error:
            self.decide(str(error))
            return False
        return True

    def attempt(self) -> None:
        """Open what was read, as a worker would, until it is ready."""
        from hsmwrap.http import logs  # noqa: PLC0415 (the extra may be absent)
        from hsmwrap.kms.opening import try_kms  # noqa: PLC0415 (the extra may be absent)

        logs.configure()
        config, _ = self._read
        try_kms(config)

    def decide(self, why: str | None) -> None:
        """Take what was read, or log why that of before stays in use."""
        if why is None:
            self.config, self.tls = self._read
        else:
            event = "the configuration is refused: that of before stays in use"
            _log.error(event, extra={"why": why})

    def refresh(self) -> None:
        """Take changed TLS files, for workers that start later; the workers log what is wrong."""
        if self.tls is not None:
            with suppress(ConfigurationError):
                self.tls.refresh()


def _application(config: ServerConfig, tls: Tls | None) -> Any:
    # Imported in the worker: prometheus_client reads the environment at import.
    from hsmwrap.http.app import from_config  # noqa: PLC0415

    return from_config(config, tls)
