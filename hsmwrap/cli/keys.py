"""``hsmwrap keys``: a backend's own keys: make, rotate, retire, list."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from hsmwrap import registry
from hsmwrap.backend import KeySetInfo
from hsmwrap.cli import tables
from hsmwrap.cli.arguments import Subparsers, add_json_option
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.software.settings import SoftwareSettings

_DESCRIPTION = """\
A backend seals import tokens, wrapping keys and imported keys under keys of its own, which come
in sets. The newest set is current; older ones open what they sealed until they are retired.
The settings come from options, or from HSMWRAP_PKCS11_MODULE, HSMWRAP_TOKEN_LABEL,
HSMWRAP_PIN_FILE and HSMWRAP_SO_PIN_FILE. With the security officer's PIN the key-encryption keys
of an HSM token become CKA_TRUSTED, and nothing else can wrap what they wrap.

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

_ENVIRONMENT = {
    "module": "HSMWRAP_PKCS11_MODULE",
    "token_label": "HSMWRAP_TOKEN_LABEL",
    "pin_file": "HSMWRAP_PIN_FILE",
    "so_pin_file": "HSMWRAP_SO_PIN_FILE",
    "keyring_file": "HSMWRAP_KEYRING_FILE",
}
_OPTIONS = {
    "pkcs11": (
        "uri",
        "module",
        "library_parameters",
        "token_label",
        "token_serial",
        "pin_file",
        "key_prefix",
        "profile",
        "force_login",
    ),
    "software": ("keyring_file",),
}


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
    parser.add_argument("--backend", default="pkcs11", help="default: pkcs11")
    parser.add_argument("--so-pin-file", help="file with the security officer's PIN")
    for row in (*Pkcs11Settings.table(), *SoftwareSettings.table()):
        if any(row.name in names for names in _OPTIONS.values()):
            parser.add_argument(
                f"--{row.name.replace('_', '-')}",
                action="store_true" if row.default is False else "store",
                help=row.help,
            )
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do what ``args.action`` says and print the key sets that there are afterwards."""
    backend = registry.load(args.backend)
    settings = _settings(args)
    so_pin_file = args.so_pin_file or os.environ.get(_ENVIRONMENT["so_pin_file"])
    if args.action in {"init", "rotate"} and args.backend == "pkcs11" and not so_pin_file:
        print(_WEAKER, file=sys.stderr)
    if args.action == "init":
        backend.initialise_keys(settings, so_pin_file=so_pin_file)
    elif args.action == "rotate":
        backend.rotate_keys(settings, so_pin_file=so_pin_file)
    elif args.action == "retire":
        backend.retire_keys(settings, args.key_set or "")
    elif args.action == "reap":
        return _reap(args, settings)
    _print(backend.list_keys(settings), as_json=args.json)
    return 0


def _reap(args: argparse.Namespace, settings: dict[str, Any]) -> int:
    """Remove expired wrapping keys; the exit code is 1 if one could not be removed."""
    with registry.open_backend(args.backend, settings) as backend:
        report = backend.reap(datetime.now(UTC))
    if args.json:
        print(tables.to_json(asdict(report)))
    else:
        print(
            f"{report.examined} resident wrapping keys: {len(report.removed)} expired and "
            f"removed, {len(report.failed)} could not be removed"
        )
    return 1 if report.failed else 0


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    names = _OPTIONS.get(args.backend, ())
    given = {name: getattr(args, name) for name in names}
    if given.get("uri"):
        return {name: value for name, value in given.items() if value}
    found = {
        name: value or os.environ.get(_ENVIRONMENT.get(name, "")) for name, value in given.items()
    }
    return {name: value for name, value in found.items() if value}


def _print(sets: tuple[KeySetInfo, ...], *, as_json: bool) -> None:
    if as_json:
        rows = [{"key_set": s.key_set, "current": s.current, "detail": s.detail} for s in sets]
        print(tables.to_json({"key_sets": rows}))
        return
    marks = {True: "current", False: "opens only"}
    cells = [(each.key_set, marks[each.current], each.detail) for each in sets]
    print(tables.render(("key set", "use", "detail"), cells))
