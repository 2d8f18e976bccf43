"""``hsmwrap config check``: print the effective configuration of a server and its sources."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hsmwrap.cli import tables
from hsmwrap.cli.arguments import Subparsers, add_json_option
from hsmwrap.cli.extras import require_server
from hsmwrap.keypool import PoolSettings
from hsmwrap.pkcs11.binding.profiles import PARTS, Profile
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.settings import REQUIRED, Setting, as_toml
from hsmwrap.software.settings import SoftwareSettings

_SETTINGS_HEAD = """\
# Settings

<!-- Printed by `hsmwrap config settings`, and compared with it by a test: do not edit. -->

Every setting of both backends, the key-pair pool and the server. The tables are those that the
code reads. An unknown setting is an error that names the nearest known one; no error repeats a
value. A private file belongs to this process's user or to root, and is closed to others (mode
0400); its group may read it only where root owns it."""
_PKCS11 = """\
`open_backend("pkcs11", {…})`, and `settings` of a server's backend with `plugin = "pkcs11"`. Give
at most one of the `pin_` settings, and none where the URI has a `pin-source`."""
_PROFILE = """\
A TOML file for one family of PKCS#11 modules, named by `profile_file`; `hsmwrap profiles show`
prints those that hsmwrap brings along, to copy, and `hsmwrap profiles check` checks one of yours.
[vendors.md](vendors.md#a-vendor-profile) says when you need one. `table.key` is a key of a table
`[table]`."""
_SOFTWARE = """\
`open_backend("software", {…})`, and `settings` of a server's backend with `plugin = "software"`."""
_POOL = """\
`hsmwrap.keypool.PoolSettings`, for embedders. The server's `key_pool` sets `high_water`, and
`low_water` to half of it."""
_SERVER = """\
The TOML file of `hsmwrap serve --config FILE`. A dot stands for a level (`[limits]`); LEVEL is
`HSM` or `SOFTWARE`, NAME the name of a backend that only uses the keys and import tokens that it
has. Environment variables outrank the file: `HSMWRAP_SERVER_` and the name in capitals, with `__`
for each dot (`HSMWRAP_SERVER_LIMITS__MAX_THREADS`). Relative paths, that of an SQLite database
too, are relative to the directory in which the command is started, not to that of the file."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("config", help="check a server's configuration")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    check = actions.add_parser(
        "check",
        help="print every effective value and where it comes from",
        description="Read the configuration as the server would, check it and all files that it "
        "names, and print every effective value and where it comes from: the file, an environment "
        "variable, or the default. Secrets are not shown. Run it as the server's user. Exit code "
        "2: the server would refuse it. Exit code 1: with --open something could not be opened.",
    )
    check.add_argument(
        "--open",
        action="store_true",
        help="try HSM, database and keys as well: logs in to the HSM, changes nothing",
    )
    check.add_argument("--config", type=Path, metavar="FILE", help="the TOML file")
    add_json_option(check)
    check.set_defaults(run=run)
    listing = actions.add_parser(
        "settings",
        help="print every setting of the backends, the key-pair pool and the server",
        description="Print docs/settings.md: every setting with what it takes, its default and "
        "what it is for.",
    )
    listing.set_defaults(run=run_settings)


def run_settings(_args: argparse.Namespace) -> int:
    """Print the tables that the code itself reads, in Markdown."""
    require_server()
    from hsmwrap.kms.config import settings_table  # noqa: PLC0415 (the extra may be absent)

    print(_SETTINGS_HEAD)
    for title, text, table in (
        ("PKCS#11 backend", _PKCS11, Pkcs11Settings.table()),
        ("Vendor profile", _PROFILE, _profile_table()),
        ("Software backend", _SOFTWARE, SoftwareSettings.table()),
        ("Key-pair pool", _POOL, PoolSettings.table()),
        ("Server", _SERVER, settings_table()),
    ):
        print(
            f"\n## {title}\n\n{text}\n\n| setting | takes | default | meaning |\n|---|---|---|---|"
        )
        for row in table:
            default = _default(row).removeprefix("default ")
            print(f"| `{row.name}` | {row.takes} | {default} | {row.help} |")
    return 0


def _profile_table() -> tuple[Setting, ...]:
    """A profile's top level, then its tables, each key as ``table.key``."""
    rows = list(Profile.table())
    for name, part in PARTS.items():
        rows = [row for row in rows if row.name != name]
        rows += [replace(row, name=f"{name}.{row.name}") for row in part.table()]
    return tuple(rows)


def described(table: Iterable[Setting]) -> str:
    """A table of settings in plain text, for ``--help``."""
    return "\n".join(
        textwrap.fill(
            f"{row.name}: {row.help} Takes {row.takes} ({_default(row)}).".replace("`", ""),
            initial_indent="  ",
            subsequent_indent="      ",
        )
        for row in table
    )


def _default(row: Setting) -> str:
    """``required``, ``optional``, or the default as TOML has it."""
    value = row.default
    if value is REQUIRED or value is None:
        return "optional" if value is None else "required"
    return f"default `{as_toml(value)}`"


def run(args: argparse.Namespace) -> int:
    """Print the configuration, also one that is refused; raise ConfigurationError if it is."""
    require_server()
    from hsmwrap.kms.checking import find_problems, require_none, try_to_open  # noqa: PLC0415 (the extra may be absent)
    from hsmwrap.kms.config import load_config  # noqa: PLC0415 (the extra may be absent)
    from hsmwrap.kms.explain import explain  # noqa: PLC0415 (the extra may be absent)

    config = load_config(args.config)
    settings = explain(config, args.config)
    problems = find_problems(config)
    tried = list(try_to_open(config)) if args.open and not problems else []
    if args.json:
        shown: dict[str, Any] = {"settings": [asdict(setting) for setting in settings]}
        shown |= {"problems": problems, "tried": [asdict(each) for each in tried]}
        print(tables.to_json(shown))
    else:
        rows = [(setting.name, setting.value, setting.source) for setting in settings]
        print(tables.render(("setting", "value", "source"), rows))
    require_none(problems)
    if tried and not args.json:
        lines = [(each.part, "works" if each.ok else "FAILS", each.detail) for each in tried]
        print("\n" + tables.render(("tried", "state", "detail"), lines))
    return 0 if all(each.ok for each in tried) else 1
