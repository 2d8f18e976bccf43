"""``hsmwrap config check``: print the effective configuration of a server and its sources."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from hsmwrap.cli import tables
from hsmwrap.cli.arguments import Subparsers, add_json_option
from hsmwrap.cli.extras import require_server


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("config", help="check a server's configuration")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    check = actions.add_parser(
        "check",
        help="print every effective value and where it comes from",
        description="Read the configuration as the server would and print every effective value "
        "and where it comes from: the file, an environment variable, or the default. Secrets are "
        "not shown. Exit code 2 if the server would refuse it.",
    )
    check.add_argument("--config", type=Path, metavar="FILE", help="the TOML file")
    add_json_option(check)
    check.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the configuration; raise ConfigurationError if it is wrong."""
    require_server()
    from hsmwrap.kms.config import load_config, require_own_names  # noqa: PLC0415 (the extra may be absent)
    from hsmwrap.kms.explain import explain  # noqa: PLC0415 (the extra may be absent)

    config = load_config(args.config)
    require_own_names(config)
    settings = explain(config, args.config)
    if args.json:
        print(tables.to_json({"settings": [asdict(setting) for setting in settings]}))
    else:
        rows = [(setting.name, setting.value, setting.source) for setting in settings]
        print(tables.render(("setting", "value", "source"), rows))
    return 0
