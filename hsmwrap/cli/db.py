"""``hsmwrap db``: the schema of a server's database: look at it, bring it up to date."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

from hsmwrap.cli import tables
from hsmwrap.cli.arguments import Subparsers, add_json_option
from hsmwrap.cli.extras import require_server

_DESCRIPTION = """\
`current` says which schema the database has and which one this program needs. `check` also compares
the tables, and the rights of the user in database_url; exit code 1 if a server could not work with
it. `upgrade` makes the tables, or brings them up to date: run it as their owner, by
HSMWRAP_SERVER_DATABASE_URL in the environment if that is another user than the server's.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "db",
        help="look at the schema of the server's database, or bring it up to date",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("upgrade", "current", "check"))
    parser.add_argument(
        "--config", type=Path, metavar="FILE", required=True, help="the server's TOML file"
    )
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do what ``args.action`` says, and print the schema afterwards.

    Raises:
        ConfigurationError: The schema is newer than this program, or this user may not change it.
        ServiceUnavailable: The database is unavailable.
    """
    require_server()
    from hsmwrap.kms.config import load_config  # noqa: PLC0415 (the extra may be absent)
    from hsmwrap.kms.opening import open_database  # noqa: PLC0415 (the extra may be absent)

    database = open_database(load_config(args.config))
    with closing(database):
        before = database.schema()
        if args.action == "upgrade":
            before.require_not_newer()
            database.migrate()
        schema = database.schema()
        faults = database.faults() if args.action == "check" else []
    if args.json:
        facts = {"revision": schema.revision, "newest": schema.newest, "before": before.revision}
        print(tables.to_json(facts | {"current": schema.is_current, "faults": faults}))
    elif not schema.is_current:
        print(schema)
    else:
        was = f", before it {before.revision or 'none'}" if before != schema else ""
        print("\n".join([f"schema {schema.revision}, as this hsmwrap needs it{was}", *faults]))
    return 1 if args.action == "check" and faults else 0
