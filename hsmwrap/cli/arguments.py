"""Helpers for argparse that the subcommands share."""

from __future__ import annotations

import argparse
from typing import TypeAlias

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001 (no public name)
"""The type of ``add_subparsers()``; argparse has no public name for it."""


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``: the same facts for machines."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
