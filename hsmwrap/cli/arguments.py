"""Helpers for argparse that the subcommands share."""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path
from typing import Any, TypeAlias

from hsmwrap.errors import ConfigurationError, strip_tracebacks

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001 (no public name)
"""The type of ``add_subparsers()``; argparse has no public name for it."""


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``: the same facts for machines."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def add_settings_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--settings``: the settings of any plug-in."""
    parser.add_argument(
        "--settings",
        type=Path,
        metavar="FILE",
        help="TOML file with the backend's settings, as in the table settings of the server's "
        "configuration",
    )


@strip_tracebacks
def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a TOML file.

    Raises:
        ConfigurationError: It cannot be read or does not parse.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        # Of TOML's own errors not the text, which quotes the file: it may hold a secret.
        why = error.strerror if isinstance(error, OSError) else "is not TOML in UTF-8"
        raise ConfigurationError(f"--settings {path}: {why}") from None
