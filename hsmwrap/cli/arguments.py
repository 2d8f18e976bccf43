"""Helpers for argparse that the subcommands share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, TypeAlias

from hsmwrap.errors import ConfigurationError
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.pkcs11.token.pin import PIN_PAD
from hsmwrap.settings import read_settings
from hsmwrap.software.settings import SoftwareSettings

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # noqa: SLF001 (no public name)
"""The type of ``add_subparsers()``; argparse has no public name for it."""


ENVIRONMENT = {
    "module": "HSMWRAP_PKCS11_MODULE",
    "token_label": "HSMWRAP_TOKEN_LABEL",
    "pin_file": "HSMWRAP_PIN_FILE",
    "so_pin_file": "HSMWRAP_SO_PIN_FILE",
    "keyring_file": "HSMWRAP_KEYRING_FILE",
}
"""The variable of each setting that has one."""
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
        "profile_file",
        "force_login",
    ),
    "software": ("keyring_file",),
}


def add_json_option(parser: argparse._ActionsContainer) -> None:
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


def add_backend_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--backend``, ``--settings`` and options for the usual settings of both backends."""
    parser.add_argument("--backend", default="pkcs11", help="the plug-in; default: pkcs11")
    add_settings_option(parser)
    parser.add_argument(
        "--so-pin-file",
        help=f"file with the security officer's PIN; {PIN_PAD}: it is typed at the HSM token",
    )
    for row in (*Pkcs11Settings.table(), *SoftwareSettings.table()):
        if any(row.name in names for names in _OPTIONS.values()):
            parser.add_argument(
                f"--{row.name.replace('_', '-')}",
                action="store_true" if row.default is False else "store",
                help=row.help,
            )


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given as options."""
    options = {name: getattr(args, name) for names in _OPTIONS.values() for name in names}
    return {name: value for name, value in options.items() if value}


def backend_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings from :func:`add_backend_options`; options outrank the file.

    Raises:
        ConfigurationError: An option belongs to another backend, or the file cannot be read.
    """
    given = given_options(args)
    takes = _OPTIONS.get(args.backend, ())
    if other := sorted(given.keys() - set(takes)):
        raise ConfigurationError(
            f"--{other[0].replace('_', '-')} is an option of another backend; the settings of "
            f"{args.backend} come from --settings FILE"
        )
    if args.settings is not None:
        return read_settings(args.settings) | given
    if "uri" in given:
        return given
    variables = {name: os.environ.get(ENVIRONMENT.get(name, "")) for name in takes}
    return {name: value for name, value in variables.items() if value} | given
