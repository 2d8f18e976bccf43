"""``hsmwrap audit verify``: whether an audit log is whole and unchanged."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from hsmwrap.cli import tables
from hsmwrap.cli.arguments import Subparsers, add_json_option
from hsmwrap.cli.extras import require_server
from hsmwrap.errors import ConfigurationError

if TYPE_CHECKING:
    from hsmwrap.kms.audit import Anchor, AuditReport


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("audit", help="check an audit log")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    verify = actions.add_parser(
        "verify",
        help="find lines that were changed, removed or reordered",
        description="Follow the chain of an audit log. With --config, the path, the key and the "
        "line that the database remembers come from the server's configuration; that line is "
        "what shows that the end was cut off. Exit code 1 if something is wrong.",
    )
    where = verify.add_mutually_exclusive_group(required=True)
    where.add_argument("--config", type=Path, metavar="FILE", help="the server's TOML file")
    where.add_argument("--file", type=Path, metavar="FILE", help="the audit log itself")
    verify.add_argument("--key-file", type=Path, metavar="FILE", help="HMAC key, with --file")
    add_json_option(verify)
    verify.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Verify the log and print what was found."""
    require_server()
    from hsmwrap.kms.audit import verify  # noqa: PLC0415 (the extra may be absent)

    path, key, anchors = _from_config(args.config) if args.config else _from_arguments(args)
    try:
        report = verify(path, key, anchors)
    except OSError as error:
        raise ConfigurationError(f"{path}: {error.strerror}") from None
    print(_json(report) if args.json else _text(path, report, anchored=bool(anchors)))
    return 0 if report.ok else 1


def _from_arguments(args: argparse.Namespace) -> tuple[Path, bytes | None, tuple[Anchor, ...]]:
    from hsmwrap.kms.opening import audit_key  # noqa: PLC0415 (the extra may be absent)

    return args.file, audit_key(args.key_file), ()


def _from_config(file: Path) -> tuple[Path, bytes | None, tuple[Anchor, ...]]:
    from hsmwrap.kms.anchors import remembered  # noqa: PLC0415 (the extra may be absent)
    from hsmwrap.kms.config import load_config  # noqa: PLC0415 (the extra may be absent)
    from hsmwrap.kms.opening import open_audit_log, open_database  # noqa: PLC0415 (the extra may be absent)

    config = load_config(file)
    log = open_audit_log(config)
    database = open_database(config)
    try:
        return log.path, log.key, remembered(database, log.path)
    finally:
        database.close()


def _json(report: AuditReport) -> str:
    return tables.to_json(
        {
            "ok": report.ok,
            "lines": report.lines,
            "problems": [{"line": p.line, "problem": p.problem} for p in report.problems],
        }
    )


def _text(path: Path, report: AuditReport, *, anchored: bool) -> str:
    found = [f"{path}: {problem}" for problem in report.problems]
    verdict = "wrong" if found else "whole"
    end = "" if anchored else "; whether the end was cut off, only --config can tell"
    return "\n".join([*found, f"{path}: {report.lines} lines, {verdict}{end}"])
