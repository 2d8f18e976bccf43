"""``hsmwrap demo``: run the whole compatibility table with an independent client."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hsmwrap import policy, registry
from hsmwrap.backend import Backend, Capabilities
from hsmwrap.catalog import ProtectionLevel
from hsmwrap.cli import demo_report, tables
from hsmwrap.cli.arguments import (
    Subparsers,
    add_json_option,
    add_settings_option,
)
from hsmwrap.cli.compat import Combination, combinations
from hsmwrap.cli.demo_runner import DEPLOYMENT, DemoRunner, Row
from hsmwrap.errors import ConfigurationError, UnsupportedOperation
from hsmwrap.policy import Verdict
from hsmwrap.settings import read_settings
from hsmwrap.testing.clients import GMSSL, OPENSSL, Client, clients_of

_PlannedRow = tuple[Combination, Verdict, Client | None]


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "demo",
        help="import key material by every row of the compatibility table",
        description="For every allowed combination: issue parameters, encrypt key material with "
        "the openssl command (and gmssl), import it, use the key. For every refused one: show "
        "the refusal. The exit code is 0 only if every row did what the table says.",
    )
    parser.add_argument(
        "--backend",
        default="pkcs11",
        help="the plug-in of protection level HSM; pkcs11 (default) takes its token from "
        "HSMWRAP_PKCS11_MODULE, HSMWRAP_TOKEN_LABEL, HSMWRAP_PIN_FILE and, for trusted keys, "
        "HSMWRAP_SO_PIN_FILE if no --settings are given",
    )
    add_settings_option(parser)
    parser.add_argument(
        "--profile",
        help="vendor profile of pkcs11: a name of `hsmwrap profiles list`, or a file (.toml)",
    )
    parser.add_argument(
        "--served",
        action="store_true",
        help="import only by the rows that the backend says it serves; the others have to be "
        "refused before a key is generated",
    )
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run every row and print the report; return 0 only if each did what the table says."""
    for client in (OPENSSL, GMSSL):
        client.require()
    with ExitStack() as stack:
        backends = _open_backends(args.backend, args.settings, args.profile, stack)
        capabilities = {b.name: b.capabilities() for b in backends.values()}
        for capability in capabilities.values():
            print(demo_report.announcement(capability), file=sys.stderr)
        rows = list(_run_rows(DemoRunner(backends), served=args.served))
    print(_report(rows, capabilities, as_json=args.json))
    return 0 if demo_report.all_ok(rows) else 1


def _report(rows: list[Row], capabilities: Mapping[str, Capabilities], *, as_json: bool) -> str:
    if as_json:
        return tables.to_json(demo_report.document(rows))
    return demo_report.text(rows, capabilities.values())


def _run_rows(runner: DemoRunner, *, served: bool) -> Iterator[Row]:
    """Run each planned row, with progress on stderr; ``served``: see the option."""
    plan = list(_plan())
    if served and not any(client and runner.serves(row) for row, _, client in plan):
        raise UnsupportedOperation(
            "the backends serve no row of the compatibility table, so there is nothing to import; "
            "`hsmwrap doctor` says why"
        )
    for number, (combination, verdict, client) in enumerate(plan, 1):
        print(
            f"[{number:2}/{len(plan)}] {' '.join(combination)}",
            end=" ",
            file=sys.stderr,
            flush=True,
        )
        if client is None:
            row = runner.run_refused(combination, verdict)
        elif served and not runner.serves(combination):
            row = runner.run_unserved(combination)
        else:
            row = runner.run_allowed(combination, client)
        print(demo_report.progress(row), file=sys.stderr)
        yield row


def _plan() -> Iterator[_PlannedRow]:
    """Every combination, the allowed ones once for each client that can encrypt for them."""
    for combination in combinations():
        verdict = policy.check(*combination, DEPLOYMENT)
        for client in clients_of(combination[1]) if verdict.allowed else (None,):
            yield combination, verdict, client


def _open_backends(
    plugin: str, file: Path | None, profile: str | None, stack: ExitStack
) -> dict[ProtectionLevel, Backend]:
    """Open the backend of each protection level; ``stack`` closes them."""
    settings = {} if file is None else read_settings(file)
    if plugin == "software":
        both = registry.open_backend(plugin, settings | {"serve_hsm_level": True})
        return dict.fromkeys(ProtectionLevel, stack.enter_context(both))
    if plugin == "pkcs11" and file is None:
        settings = _token_settings(os.environ)
    if profile is not None:
        settings["profile_file" if profile.endswith(".toml") else "profile"] = profile
    _ensure_keys(plugin, settings, os.environ.get("HSMWRAP_SO_PIN_FILE") or None)
    return {
        ProtectionLevel.SOFTWARE: stack.enter_context(registry.open_backend("software", {})),
        ProtectionLevel.HSM: stack.enter_context(registry.open_backend(plugin, settings)),
    }


def _token_settings(environment: Mapping[str, str]) -> dict[str, str]:
    variables = {
        "module": "HSMWRAP_PKCS11_MODULE",
        "token_label": "HSMWRAP_TOKEN_LABEL",
        "pin_file": "HSMWRAP_PIN_FILE",
    }
    if missing := [name for name in variables.values() if not environment.get(name)]:
        raise ConfigurationError(
            f"no token is configured: {', '.join(missing)} not set; ./scripts/demo makes a "
            "private SoftHSM2 token and sets them, --backend software needs none"
        )
    return {setting: environment[name] for setting, name in variables.items()}


def _ensure_keys(plugin: str, settings: Mapping[str, Any], so_pin_file: str | None) -> None:
    """Make the backend's own keys in a fresh HSM token; the SO's PIN makes them trusted."""
    try:
        with registry.open_backend(plugin, settings) as backend:
            backend.mac(b"")
    except ConfigurationError:
        # No keys yet. Were something else wrong, initialising would say so again.
        registry.KeySetManager(plugin, settings).initialise(so_pin_file=so_pin_file)
