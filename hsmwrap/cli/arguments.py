"""What the subcommands share of argparse."""

from __future__ import annotations

import argparse
from typing import TypeAlias

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001 (no public name)
"""What ``add_subparsers`` returns; argparse has no public name for it."""


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``: machines read the same facts."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
