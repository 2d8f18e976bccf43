"""``hsmwrap profiles``: what is known of families of PKCS#11 modules, as files."""

from __future__ import annotations

import argparse
import sys

from hsmwrap.cli import tables
from hsmwrap.cli.arguments import Subparsers, add_json_option
from hsmwrap.pkcs11.binding import profiles


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommands."""
    parser = subparsers.add_parser(
        "profiles",
        help="list, show and check the profiles of HSM vendors",
        description="A profile says what a family of PKCS#11 modules does in its own way: the "
        "settings `profile` and `profile_file` choose one.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    listed = commands.add_parser("list", help="list those that hsmwrap brings along")
    add_json_option(listed)
    listed.set_defaults(run=_list)
    show = commands.add_parser("show", help="print one, to copy and change it")
    show.add_argument("name", metavar="NAME")
    show.set_defaults(run=_show)
    check = commands.add_parser("check", help="check a file of your own")
    check.add_argument("file", metavar="FILE")
    check.set_defaults(run=_check)


def _list(args: argparse.Namespace) -> int:
    rows = [
        {
            "name": name,
            "summary": each.summary,
            "sm2": _sm2(each),
            "sm4": _sm4(each),
            "tried": each.tried,
        }
        for name in profiles.names()
        for each in [profiles.load(name)]
    ]
    if args.json:
        print(tables.to_json({"profiles": rows}))
    else:
        head = ("name", "summary", "sm2", "sm4", "tried")
        print(tables.render(head, [tuple(row.values()) for row in rows]))
    return 0


def _sm2(profile: profiles.Profile) -> str:
    if profile.sm2 is None:
        return "as the standard has it"
    does = ["unwraps"] if profile.sm2.unwrap is not None else []
    ecdh = "ECDH with its own key type" if profile.sm2.key_type is not None else "ECDH"
    return " and ".join([*does, ecdh if profile.sm2.decrypt is None else "decrypts"])


def _sm4(profile: profiles.Profile) -> str:
    if profile.sm4 is None:
        return "kept, not used"
    mode = "GCM" if profile.sm4.gcm is not None else "CCM"
    return mode if profile.sm4.key_wrap is None else f"{mode}, seals keys"


def _show(args: argparse.Namespace) -> int:
    print(profiles.text_of(args.name), end="")
    return 0


def _check(args: argparse.Namespace) -> int:
    profile = profiles.load_file(args.file)
    print(f"{args.file}: {profile.summary}; SM2: {_sm2(profile)}; SM4: {_sm4(profile)}")
    print("`hsmwrap doctor` tries on the HSM what it says.", file=sys.stderr)
    return 0
