"""``hsmwrap keys``: a backend's own keys: make, rotate, retire, list."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from hsmwrap import registry
from hsmwrap.backend import KeySetInfo, ReapReport, ReapsWrappingKeys
from hsmwrap.cli import tables
from hsmwrap.cli.arguments import (
    ENVIRONMENT,
    Subparsers,
    add_backend_options,
    add_json_option,
    backend_settings,
)

_DESCRIPTION = """\
A backend seals import tokens, wrapping keys and imported keys under keys of its own, which come
in sets. The newest set is current; older ones open what they sealed until they are retired.
The settings of any plug-in come from --settings. For pkcs11 and software there are options for the
usual ones, which outrank the file; without a file the variables HSMWRAP_PKCS11_MODULE,
HSMWRAP_TOKEN_LABEL, HSMWRAP_PIN_FILE and HSMWRAP_SO_PIN_FILE are read as well. With the security
officer's PIN the key-encryption keys of an HSM token become CKA_TRUSTED, and nothing else can wrap
what they wrap.

`retire` destroys a set that is not current; everything that it sealed becomes unusable. After
`rotate`, wait until no import token needs the old set: the lifetime of a token, plus the max_age of
key-pair pools, plus 60 seconds in which running processes still use the set that they know; by
default 25 hours and a minute. Import keys that the old set sealed (HsmEncryptedDatabase) again
before you retire it. The command cannot check this. A set that `list` shows as not finished sealed
nothing; retire it at any time.

`reap` removes resident wrapping keys whose import tokens expired more than 15 minutes ago, also
those of other processes.
"""

_WEAKER = """\
hsmwrap: without --so-pin-file the key-encryption keys are not trusted: the holder of the user PIN
can wrap key material with a key of their own while it is being imported, or plant a key set."""


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "keys",
        help="make, rotate, retire or list a backend's own keys; reap expired wrapping keys",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", choices=("init", "rotate", "retire", "list", "reap"))
    parser.add_argument("key_set", nargs="?", help="the key set to retire; see above for when")
    add_backend_options(parser)
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do what ``args.action`` says and print the key sets that there are afterwards."""
    settings = backend_settings(args)
    if args.action == "reap":
        return _reap(args, settings)
    key_sets = registry.KeySetManager(args.backend, settings)
    so_pin_file = args.so_pin_file or os.environ.get(ENVIRONMENT["so_pin_file"])
    if args.action in {"init", "rotate"} and args.backend == "pkcs11" and not so_pin_file:
        print(_WEAKER, file=sys.stderr)
    if args.action == "init":
        key_sets.initialise(so_pin_file=so_pin_file)
    elif args.action == "rotate":
        key_sets.rotate(so_pin_file=so_pin_file)
    elif args.action == "retire":
        key_sets.retire(args.key_set or "")
    _print(key_sets.list(), as_json=args.json)
    return 0


def _reap(args: argparse.Namespace, settings: dict[str, Any]) -> int:
    """Remove expired wrapping keys; the exit code is 1 if one could not be removed."""
    with registry.open_backend(args.backend, settings) as backend:
        reaper = ReapsWrappingKeys.of(backend)
        report = reaper.reap(datetime.now(UTC)) if reaper else ReapReport()
    if args.json:
        print(tables.to_json(asdict(report)))
    else:
        print(
            f"{report.examined} resident wrapping keys: {len(report.removed)} expired and "
            f"removed, {len(report.failed)} could not be removed"
        )
    return 1 if report.failed else 0


def _print(sets: tuple[KeySetInfo, ...], *, as_json: bool) -> None:
    if as_json:
        rows = [{"key_set": s.key_set, "current": s.current, "detail": s.detail} for s in sets]
        print(tables.to_json({"key_sets": rows}))
        return
    marks = {True: "current", False: "opens only"}
    cells = [(each.key_set, marks[each.current], each.detail) for each in sets]
    print(tables.render(("key set", "use", "detail"), cells))
