"""``hsmwrap backends``: the registered backend plug-ins, and whether each one loads."""

from __future__ import annotations

import argparse
import sys

from hsmwrap import registry
from hsmwrap.cli import tables
from hsmwrap.cli.arguments import Subparsers, add_json_option


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "backends",
        help="list the backend plug-ins and whether they load",
        description="List the backend plug-ins. The exit code is 1 if one does not load. "
        "`hsmwrap doctor --backend NAME` tries what one can do on an HSM.",
    )
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print every plug-in; return 1 if one does not load."""
    _, failed = registry.load_all()
    rows = [
        {
            "name": entry.name,
            "distribution": entry.distribution,
            "class": entry.value,
            "loads": entry.name not in failed,
            "error": str(failed[entry.name]) if entry.name in failed else None,
        }
        for entry in registry.available()
    ]
    print(tables.to_json({"backends": rows}) if args.json else _table(rows))
    print("`hsmwrap doctor --backend NAME` tries what one can do on an HSM.", file=sys.stderr)
    return 1 if failed else 0


def _table(rows: list[dict[str, str | bool | None]]) -> str:
    table = tables.render(
        ("name", "status", "class", "distribution"),
        [
            (
                str(row["name"]),
                "loads" if row["loads"] else "FAILED",
                str(row["class"]),
                str(row["distribution"]),
            )
            for row in rows
        ],
    )
    errors = dict.fromkeys(str(row["error"]) for row in rows if row["error"])
    return "\n".join([table, *errors])
