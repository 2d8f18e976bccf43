"""The ``hsmwrap`` command.

Each subcommand is a module with ``add_parser(subparsers)`` and ``run(args) -> int``, listed in
:data:`_COMMANDS`.
"""

from __future__ import annotations

import argparse
import os
import sys

from hsmwrap import __version__
from hsmwrap.cli import (
    audit,
    backends,
    compat,
    config,
    db,
    demo,
    doctor,
    keys,
    profiles,
    serve,
    wrap,
)
from hsmwrap.errors import ConfigurationError, HsmwrapError

_COMMANDS = (compat, backends, profiles, doctor, demo, wrap, keys, config, db, serve, audit)


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand.

    Args:
        argv: Arguments without the program's name; None: the process's arguments.

    Returns:
        The exit code: 0 success, 1 failure, 2 wrong usage or configuration.

    Raises:
        SystemExit: From argparse, for ``--help``, ``--version`` and wrong usage.
    """
    args = _parser().parse_args(argv)
    try:
        status = int(args.run(args))
        sys.stdout.flush()
    except HsmwrapError as error:
        print(f"hsmwrap: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigurationError) else 1
    except BrokenPipeError:
        # The reader (head, less) has closed the pipe: do not flush to it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hsmwrap", description="Bring-your-own-key backend for a KMS."
    )
    parser.add_argument("--version", action="version", version=f"hsmwrap {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(subparsers)
    return parser
