"""``hsmwrap audit verify`` checks an audit log; ``new-segment`` goes on after a damaged one."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from hsmwrap.cli import tables
from hsmwrap.cli.arguments import Subparsers, add_json_option
from hsmwrap.cli.extras import require_server
from hsmwrap.errors import ConfigurationError

if TYPE_CHECKING:
    from hsmwrap.chain import Link
    from hsmwrap.kms.audit import AuditLog, AuditReport
    from hsmwrap.kms.database import Database


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("audit", help="check an audit log, or begin a new segment")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    verify = actions.add_parser(
        "verify",
        help="find lines that were changed, removed or reordered",
        description="Check the chain of an audit log. With --config, path and key come from the "
        "server's configuration, and the database tells one line that the log must have (its "
        "anchor), so that a cut-off end is found. Exit code 1 if the log has a problem, or if the "
        "database stores no line of it.",
    )
    where = verify.add_mutually_exclusive_group(required=True)
    where.add_argument("--config", type=Path, metavar="FILE", help="the server's TOML file")
    where.add_argument("--file", type=Path, metavar="FILE", help="the audit log itself")
    verify.add_argument("--key-file", type=Path, metavar="FILE", help="HMAC key, with --file")
    verify.add_argument(
        "--without-anchor",
        action="store_true",
        help="with --config, accept that the database stores no line of the log",
    )
    add_json_option(verify)
    verify.set_defaults(run=run)
    segment = actions.add_parser(
        "new-segment",
        help="go on after a damaged log",
        description="End the audit log's segment, damaged or not, and begin a new one. The file is "
        "kept beside it with a number after its name; the first line of the new one has that "
        "name, the SHA-256 of its content and its first problem, and becomes the log's anchor. "
        "Servers go on with the new segment, without a restart. Look into the damage before.",
    )
    segment.add_argument(
        "--config", type=Path, metavar="FILE", required=True, help="the server's TOML file"
    )
    segment.set_defaults(run=run_new_segment)


def run(args: argparse.Namespace) -> int:
    """Verify the log and print the result."""
    require_server()
    from hsmwrap.kms.audit import verify  # noqa: PLC0415 (the extra may be absent)

    log = _from_config(args.config) if args.config else _from_arguments(args)
    try:
        report = verify(log.path, log.key, log.anchors)
    except OSError as error:
        raise ConfigurationError(f"{log.path}: {error.strerror}") from None
    # Renaming the log or the host, or emptying both, must not skip the check of the log's end. The
    # start of the chain is not an anchor: every log has it, also an emptied one.
    missing = bool(args.config and not report.anchor)
    whole = report.ok and (args.without_anchor or not missing)
    print(_json(report, whole=whole) if args.json else _text(log, report, missing=missing))
    return 0 if whole else 1


def run_new_segment(args: argparse.Namespace) -> int:
    """Begin a new segment and print what the old one was."""
    require_server()
    from hsmwrap.kms.anchors import begin_segment  # noqa: PLC0415 (the extra may be absent)

    with _opened(args.config) as (log, database):
        segment = begin_segment(database, log)
    print(f"{log.path}: new segment; before it {segment}")
    return 0


@dataclass(frozen=True, slots=True)
class _Log:
    """What to verify: the file, its HMAC key, and the lines that it must have.

    ``name`` is the id of the log in the database; None without a database.
    """

    path: Path
    key: bytes | None = field(repr=False)
    anchors: tuple[Link, ...] = ()
    name: str | None = None


def _from_arguments(args: argparse.Namespace) -> _Log:
    from hsmwrap.kms.opening import audit_key  # noqa: PLC0415 (the extra may be absent)

    return _Log(args.file, audit_key(args.key_file))


def _from_config(file: Path) -> _Log:
    from hsmwrap.kms.anchors import log_id, remembered  # noqa: PLC0415 (the extra may be absent)

    with _opened(file) as (log, database):
        return _Log(log.path, log.key, remembered(database, log), log_id(log))


@contextmanager
def _opened(file: Path) -> Iterator[tuple[AuditLog, Database]]:
    from hsmwrap.kms.config import load_config  # noqa: PLC0415 (the extra may be absent)
    from hsmwrap.kms.opening import open_audit_log, open_database  # noqa: PLC0415 (the extra may be absent)

    config = load_config(file)
    log = open_audit_log(config)
    database = open_database(config)
    try:
        yield log, database
    finally:
        database.close()


def _json(report: AuditReport, *, whole: bool) -> str:
    anchor = report.anchor
    return tables.to_json(
        {
            "ok": whole,
            "anchored": anchor is not None,
            "anchor": anchor and {"line": anchor.sequence, "age_seconds": _age(anchor)},
            "behind": report.behind,
            "before": report.before and asdict(report.before),
            "lines": report.lines,
            "problems": [{"line": p.line, "problem": p.problem} for p in report.problems],
        }
    )


def _age(anchor: Link) -> int | None:
    """Seconds since the database stored it."""
    if anchor.set_at is None:
        return None
    return round((datetime.now(UTC) - anchor.set_at).total_seconds())


def _text(log: _Log, report: AuditReport, *, missing: bool) -> str:
    found = [f"{log.path}: {problem}" for problem in report.problems]
    verdict = "damaged" if found else "complete"
    end = "" if log.name else "; only --config can check that the end was not cut off"
    if report.anchor:
        end = (
            f"; anchored at line {report.anchor.sequence} ({_age(report.anchor)} seconds ago), "
            f"{report.behind} lines after it"
        )
    elif missing:
        end = (
            "; cannot check that the end was not cut off: the database stores no line of a log "
            f"with the id {log.name!r}. If the host was renamed or the log moved, set "
            "audit_log_id; if no server has used this log with this database yet, use "
            "--without-anchor"
        )
    if report.before:
        found.append(f"{log.path}: began after {report.before}")
    return "\n".join([*found, f"{log.path}: {report.lines} lines, {verdict}{end}"])
