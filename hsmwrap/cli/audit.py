"""``hsmwrap audit``: verify an audit log, rotate it, export it, accept a damaged one."""

from __future__ import annotations

import argparse
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from hsmwrap import chain
from hsmwrap.cli import tables
from hsmwrap.cli.arguments import Subparsers, add_json_option
from hsmwrap.cli.extras import require_server
from hsmwrap.errors import ConfigurationError
from hsmwrap.privatefile import PrivateFile

if TYPE_CHECKING:
    from hsmwrap.chain import Link
    from hsmwrap.kms.audit import AuditLog
    from hsmwrap.kms.auditfiles import AuditReport
    from hsmwrap.kms.database import Database


_MOST_PROBLEMS = 20  # that are printed


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("audit", help="verify, rotate, export or accept an audit log")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    verify = actions.add_parser(
        "verify",
        help="find lines that were changed, removed or reordered",
        description="Check the chain of an audit log over all its files. With --config, path and "
        "key come from the server's configuration, and the database tells one line that the log "
        "must have (its anchor), so that a cut-off end is found. Exit code 1 if the log has a "
        "problem, or if the database stores no line of it.",
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
    rotate = _with_config(
        actions,
        "rotate",
        "go on in a new file",
        "Give the audit log's file a name with a number, and go on in a new one, which is chained "
        "to it. Servers do so at once. Leave the old files where they are, or accept the log after "
        "you have moved some.",
    )
    rotate.set_defaults(run=run_rotate)
    accept = _with_config(
        actions,
        "accept",
        "go on after damage, a restore, or files that are missing",
        "Accept the audit log as it is: damaged, restored from a backup, or with files missing. It "
        "goes on in a new file, whose first line is the log's anchor and has the reason, what was "
        "found, and the SHA-256 of the files concerned. Servers go on with it, without a restart. "
        "Look into what happened before.",
    )
    accept.add_argument("--reason", metavar="TEXT", required=True, help="why, for the log")
    accept.set_defaults(run=run_accept)
    export = _with_config(
        actions,
        "export",
        "print lines for a SIEM",
        "Print the lines of the audit log as they are: one JSON object each. Problems go to stderr "
        "(exit code 1), and do not stop the export.",
    )
    position = export.add_mutually_exclusive_group()
    position.add_argument(
        "--after",
        type=int,
        default=0,
        metavar="N",
        help="only lines whose 'sequence' is higher (default: all)",
    )
    position.add_argument(
        "--position-file",
        type=Path,
        metavar="FILE",
        help="go on after the line in this file, and write number and digest of the last one there "
        "at the end",
    )
    export.set_defaults(run=run_export)


def _with_config(actions: Subparsers, name: str, summary: str, text: str) -> ArgumentParser:
    parser = actions.add_parser(name, help=summary, description=text)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", required=True, help="the server's TOML file"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Verify the log and print the result."""
    require_server()
    from hsmwrap.kms.audit import START  # noqa: PLC0415 (the extra may be absent)
    from hsmwrap.kms.auditfiles import verify  # noqa: PLC0415 (the extra may be absent)

    log = _from_config(args.config) if args.config else _from_arguments(args)
    try:
        with _progress() as progress:
            report = verify(log.path, log.key, log.anchors, progress)
    except OSError as error:
        raise ConfigurationError(f"{log.path}: {error.strerror}") from None
    # Renaming the log or the host, or emptying both, must not skip the check of the log's end. The
    # start of the chain is not an anchor: every log has it, also an emptied one.
    anchored = any(anchor != START for anchor in log.anchors)
    missing = bool(args.config and not report.anchor and not anchored)
    whole = report.ok and (args.without_anchor or not missing)
    print(_json(report, whole=whole) if args.json else _text(log, report, missing=missing))
    return 0 if whole else 1


def run_rotate(args: argparse.Namespace) -> int:
    """Begin a new file and print what the old one is called."""
    require_server()
    from hsmwrap.kms.config import load_config  # noqa: PLC0415 (the extra may be absent)
    from hsmwrap.kms.opening import open_audit_log  # noqa: PLC0415 (the extra may be absent)

    log = open_audit_log(load_config(args.config))
    old = log.rotate()
    print(f"{log.path}: " + (f"goes on after {old}" if old else "is empty, so it is not rotated"))
    return 0


def run_accept(args: argparse.Namespace) -> int:
    """Accept the log as it is, and print what was found."""
    require_server()
    from hsmwrap.kms.anchors import accept  # noqa: PLC0415 (the extra may be absent)

    with _opened(args.config) as (log, database):
        report, old = accept(database, log, args.reason)
    found = [f"{log.path}: {problem}" for problem in report.problems]
    print("\n".join([*found, f"{log.path}: goes on after {old}, which is accepted"]))
    return 0


def run_export(args: argparse.Namespace) -> int:
    """Print lines from a position on."""
    require_server()
    from hsmwrap.kms.auditfiles import AuditProblem, export  # noqa: PLC0415 (the extra may be absent)
    from hsmwrap.kms.config import load_config  # noqa: PLC0415 (the extra may be absent)
    from hsmwrap.kms.opening import open_audit_log  # noqa: PLC0415 (the extra may be absent)

    log = open_audit_log(load_config(args.config))
    position, digest = _position(args.position_file) if args.position_file else (args.after, "")
    code, lines = 0, 0
    try:
        with _progress(shown=not sys.stdout.isatty()) as progress:
            for sequence, each in export(log.path, position, log.key, digest):
                if isinstance(each, AuditProblem):
                    print(f"{log.path}: {each}", file=sys.stderr)
                    code = 1
                else:
                    sys.stdout.buffer.write(each)
                    position, digest = sequence, chain.read(each)[0].digest
                    lines += 1
                    progress(lines)
        sys.stdout.flush()
    except OSError as error:
        raise ConfigurationError(f"{log.path}: {error.strerror}") from None
    if args.position_file:
        _keep_position(args.position_file, f"{position} {digest}".rstrip())
    return code


@contextmanager
def _progress(*, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Takes the number of lines so far, and shows it once a second if stderr is a terminal."""
    if not (shown and sys.stderr.isatty()):
        yield lambda _lines: None
        return
    due = time.monotonic() + 1

    def show(lines: int) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + 1
            print(f"\r{lines} lines", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _keep_position(file: Path, position: str) -> None:
    beside = file.with_name(f".{file.name}.new")
    try:
        beside.unlink(missing_ok=True)  # left by a command that was killed
        PrivateFile(beside, "--position-file").write_new(f"{position}\n".encode())
        beside.replace(file)
    except OSError as error:
        raise ConfigurationError(f"--position-file {file}: {error.strerror}") from None


def _position(file: Path) -> tuple[int, str]:
    """Number of the last line that was exported, and its digest; empty: not known."""
    try:
        number, _, digest = file.read_text("ascii").strip().partition(" ")
        return int(number), digest
    except FileNotFoundError:
        return 0, ""
    except (OSError, ValueError):
        raise ConfigurationError(
            f"{file}: has to hold one number, and the digest of that line if it is known, or not "
            "to exist"
        ) from None


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
            "accepted": [asdict(each) for each in report.accepted],
            "files": report.files,
            "lines": report.lines,
            "problems": [asdict(each) for each in report.problems],
        }
    )


def _age(anchor: Link) -> int | None:
    """Seconds since the database stored it."""
    if anchor.set_at is None:
        return None
    return round((datetime.now(UTC) - anchor.set_at).total_seconds())


def _text(log: _Log, report: AuditReport, *, missing: bool) -> str:
    found = [f"{log.path}: {problem}" for problem in report.problems[:_MOST_PROBLEMS]]
    if more := len(report.problems) - len(found):
        found.append(f"{log.path}: and {more} more problems; --json has them all")
    verdict = "damaged" if found else "complete"
    if report.lines and not report.sound:  # none chains to the line before
        verdict += ", or the key is another one"
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
    accepted = [f"{log.path}: {each}" for each in report.accepted]
    lines = f"{report.lines} lines{f' in {report.files} files' if report.files > 1 else ''}"
    return "\n".join([*accepted, *found, f"{log.path}: {lines}, {verdict}{end}"])
