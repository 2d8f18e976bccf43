"""What ``hsmwrap keys`` does in ceremonies: with shares, on two HSM tokens, with a transcript."""

from __future__ import annotations

import argparse
import getpass
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hsmwrap import backup, shares, transcript
from hsmwrap.backend import KeySetInfo
from hsmwrap.cli import tables
from hsmwrap.cli.newfiles import NewFiles, new_files
from hsmwrap.coredumps import forbid_core_dumps
from hsmwrap.errors import ConfigurationError, HsmwrapError, PinError
from hsmwrap.privatefile import PrivateFile
from hsmwrap.registry import KeySetManager
from hsmwrap.settings import read_settings

_TERMINAL = "/dev/tty"
_CLEAR = "\x1b[H\x1b[2J\x1b[3J"
_WORDS_IN_A_ROW = 6


@dataclass(frozen=True, slots=True)
class Ceremony:
    """A command of ``hsmwrap keys`` that changes or moves key sets.

    Attributes:
        args: The command's arguments.
        key_sets: Of the backend that they name.
        so_pin_file: File with the security officer's PIN.
        facts: What the transcript says of it beside its name and the time.
    """

    args: argparse.Namespace
    key_sets: KeySetManager
    so_pin_file: str | None
    facts: dict[str, Any] = field(default_factory=dict)

    def compared(self, what: str, fingerprint: str) -> None:
        """Note a fingerprint for the transcript."""
        self.facts.setdefault("fingerprints", {})[what] = fingerprint

    def present(self, sets: tuple[KeySetInfo, ...]) -> tuple[KeySetInfo, ...]:
        """Note the key sets that there are afterwards; returns them."""
        self.facts["key_sets"] = [each.key_set for each in sets]
        return sets


def files_of(args: argparse.Namespace) -> AbstractContextManager[NewFiles | None]:
    """The files that this command makes: see :func:`~.newfiles.new_files`.

    Raises:
        ConfigurationError: They are not named, or one cannot be made.
    """
    if args.action not in {"transport-key", "export", "backup"}:
        return nullcontext()
    if args.action == "backup" and (args.shares is None or args.threshold is None):
        raise ConfigurationError("backup: give --shares N and --threshold M")
    if args.out is None:
        raise ConfigurationError(f"{args.action}: name a new file by --out FILE")
    shares_of: list[Path] = []
    if args.action == "backup":
        if args.shares_to is None:
            _require_terminal("give --shares-to DIR for files, or read the shares from a terminal")
        elif not args.shares_to.is_dir():
            raise ConfigurationError(
                f"--shares-to {args.shares_to}: is not a directory: make it first"
            )
        else:
            shares_of = _share_files(args)
    return new_files(args.action, [*shares_of, args.out])  # shares open nothing without a backup


@contextmanager
def recorded(ceremony: Ceremony) -> Iterator[None]:
    """Write a line before the ceremony, and one when it ended or failed, if a transcript is named.

    Raises:
        ConfigurationError: The transcript cannot be written, or is damaged. Before the ceremony
            that means that nothing was done. After a ceremony that failed it is only printed.
    """
    args, path = ceremony.args, ceremony.args.transcript
    if path is None:
        if args.words:
            raise ConfigurationError("--words: are for --transcript FILE")
        yield
        return
    if args.words and len(args.words) > transcript.MAX_WORDS:
        raise ConfigurationError(f"--words: at most {transcript.MAX_WORDS} characters")

    def write(outcome: str) -> str:
        content = {
            "ceremony": args.action,
            "outcome": outcome,
            "backend": ceremony.key_sets.plugin,
            **({"key_set": args.key_set} if args.key_set else {}),
            **ceremony.facts,
            **({"words": args.words} if args.words else {}),
        }
        return transcript.append(path, datetime.now(UTC), content)

    write("began")
    try:
        yield
    except BaseException as error:
        try:
            write(type(error).__name__)
        except ConfigurationError as unwritten:  # the ceremony's own error is the one that counts
            print(f"hsmwrap: {unwritten}", file=sys.stderr)
        raise
    digest = write("ok")
    print(f"hsmwrap: {path}: last line {digest}", file=sys.stderr)


def verify_transcript(args: argparse.Namespace) -> int:
    """Check a transcript; the exit code is 1 if something is wrong with it."""
    if args.transcript is None:
        raise ConfigurationError("verify-transcript: give --transcript FILE")
    found = transcript.verify(args.transcript, args.fingerprint)
    if args.json:
        document = {"ok": not found.problems, "lines": found.lines, "digest": found.digest}
        document["noted"] = found.noted or None
        print(tables.to_json(document | {"problems": found.problems}))
    else:
        problems = [f"{args.transcript}: {problem}" for problem in found.problems]
        verdict = "damaged" if problems else "complete"
        end = "" if args.fingerprint else "; compare the last line's digest with what was noted"
        if 0 < found.noted < found.lines:
            follow = found.lines - found.noted
            end = f"; noted after line {found.noted}; {follow} lines follow"
        summary = f"{args.transcript}: {found.lines} lines, {verdict}{end}"
        print("\n".join([*problems, summary, f"last line {found.digest}"]))
    return 1 if found.problems else 0


# --- clone ----------------------------------------------------------------------------------------


def other_token(ceremony: Ceremony) -> tuple[KeySetManager, str | None]:
    """The HSM token that ``--to`` names, and its SO PIN's file.

    Raises:
        ConfigurationError: They are not given.
    """
    args = ceremony.args
    if args.to is None or args.to_so_pin_file is None:
        raise ConfigurationError(
            f"{args.action}: give --to SETTINGS.toml and --to-so-pin-file FILE, of the other HSM "
            "token"
        )
    settings = read_settings(args.to, "--to")
    return KeySetManager(ceremony.key_sets.plugin, settings), args.to_so_pin_file


def clone(ceremony: Ceremony) -> tuple[KeySetInfo, ...]:
    """The three steps in one process; returns the key sets of the other HSM token."""
    target, so_pin_file = other_token(ceremony)
    transport = target.make_transport_key(so_pin_file=so_pin_file)
    exported = False
    try:
        ceremony.compared("transport_key", transport.fingerprint)
        made = ceremony.key_sets.export(
            transport.content, transport.fingerprint, so_pin_file=ceremony.so_pin_file
        )
        ceremony.compared("key_sets", made.fingerprint)
        exported = True
        cloned = target.import_exported(made.content, made.fingerprint, so_pin_file=so_pin_file)
    except BaseException as error:
        # A PIN that the target refused is not tried again: that may lock it.
        if not (exported and isinstance(error, PinError)):
            _discard_transport_key(target, so_pin_file)
        raise
    return ceremony.present(cloned)


def _discard_transport_key(target: KeySetManager, so_pin_file: str | None) -> None:
    try:
        target.discard_transport_key(so_pin_file=so_pin_file)
    except HsmwrapError as error:  # that of the clone is the one that counts
        left = "a transport key is left in the other HSM token; the next clone replaces it"
        print(f"hsmwrap: {left}: {error}", file=sys.stderr)


# --- backup ---------------------------------------------------------------------------------------


def back_up(ceremony: Ceremony, files: NewFiles) -> None:
    """Make a backup file, and hand out its shares."""
    args = ceremony.args
    forbid_core_dumps()
    made, words = backup.back_up(
        ceremony.key_sets,
        shares=args.shares,
        threshold=args.threshold,
        now=datetime.now(UTC),
        so_pin_file=ceremony.so_pin_file,
    )
    ceremony.facts["key_sets"] = list(made.key_sets)
    ceremony.facts["shares"] = f"{made.threshold} of {len(made.shares)}"
    ceremony.compared("backup", made.fingerprint)
    if args.shares_to is None:
        _show(words)
    written = [] if args.shares_to is None else _share_files(args)
    files.write([*(f"{share}\n" for _, share in zip(written, words, strict=False)), made.to_json()])
    if args.json:
        shown = {"file": str(args.out), "fingerprint": made.fingerprint}
        shares_of = {"identifier": made.identifier, "shares": [str(file) for file in written]}
        print(tables.to_json(shown | shares_of), flush=True)
    else:
        needed = f"{made.threshold} of {len(made.shares)} shares open it"
        named = f"SLIP-39 identifier of the shares: {made.identifier}"
        print(f"{args.out}\nfingerprint {made.fingerprint}\n{needed}\n{named}", flush=True)


def restore(ceremony: Ceremony) -> tuple[KeySetInfo, ...]:
    """Restore a backup; returns the key sets that there are then."""
    opened = _backup_of(ceremony)
    given = _given_shares(ceremony.args, opened)
    restored = backup.restore(ceremony.key_sets, opened, given, so_pin_file=ceremony.so_pin_file)
    return ceremony.present(restored)


def drill(ceremony: Ceremony, config: Any) -> int:
    """Restore a backup on a scratch HSM token; the exit code is 1 if a stored key does not open."""
    scratch, so_pin_file = other_token(ceremony)
    opened = _backup_of(ceremony)
    given = _given_shares(ceremony.args, opened)
    tried: dict[str, int] = {}

    def examine(settings: Mapping[str, Any]) -> None:
        if config is not None:
            from hsmwrap.kms.opening import try_stored_keys  # noqa: PLC0415 (the extra may be absent)

            # They are sealed again under one more key set: so each is opened, and checked.
            KeySetManager(scratch.plugin, settings).rotate(so_pin_file=so_pin_file)
            done = try_stored_keys(config, scratch.plugin, settings)
            tried.update(opened=done.moved, failed=done.failed)

    restored = backup.drill(scratch, opened, given, examine, so_pin_file=so_pin_file)
    ceremony.present(restored)
    ceremony.facts["stored_keys"] = tried or None
    names = [each.key_set for each in restored]
    if ceremony.args.json:
        print(tables.to_json({"key_sets": names, "stored_keys": tried or None}))
    else:
        stored = (
            f"{tried['opened']} stored keys opened, {tried['failed']} did not"
            if tried
            else "stored keys were not tried (--config FILE names them)"
        )
        print(f"key sets {', '.join(names)} were restored, proven and destroyed again; {stored}")
    return 1 if tried.get("failed") else 0


def _backup_of(ceremony: Ceremony) -> backup.Backup:
    file = ceremony.args.file
    if file is None:
        raise ConfigurationError(f"{ceremony.args.action}: give --file FILE, the backup")
    made = backup.Backup.from_json(read_text(file))
    ceremony.compared("backup", made.fingerprint)
    return made


def read_text(file: Path) -> str:
    """The content of ``--file``.

    Raises:
        ConfigurationError: It cannot be read.
    """
    try:
        return file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise ConfigurationError(f"--file {file}: {why}") from None


# --- shares ---------------------------------------------------------------------------------------


def _given_shares(args: argparse.Namespace, opened: backup.Backup) -> dict[str, str]:
    """The shares from their files, or typed at the terminal, which does not show them."""
    forbid_core_dumps()
    if args.share_file:
        for file in args.share_file:
            if args.share_file.count(file) > 1:
                raise ConfigurationError(f"--share-file: {file} is given twice")
        files = [PrivateFile(file, "share") for file in args.share_file]
        return {str(file): file.read_text() for file in files}
    _require_terminal("give --share-file FILE for each share, or type them at a terminal")
    given: dict[str, str] = {}
    seen: dict[str, str] = {}
    while len(given) < opened.threshold:
        named = f"share {len(given) + 1}"
        try:
            words = getpass.getpass(f"{named} of {opened.threshold} (not shown): ")
        except EOFError:
            raise ConfigurationError(f"{named} was not typed") from None
        try:
            shares.require_share(named, words, opened.shares, seen)
        except ConfigurationError as error:
            print(f"hsmwrap: {error}", file=sys.stderr)
            continue
        given[named], seen[shares.digest(words)] = words, named
    return given


def _share_files(args: argparse.Namespace) -> list[Path]:
    """The file of each share in the directory --shares-to."""
    return [args.shares_to / f"share-{number}" for number in range(1, args.shares + 1)]


def _require_terminal(otherwise: str) -> None:
    try:
        os.close(os.open(_TERMINAL, os.O_RDWR | os.O_NOCTTY))
    except OSError:
        raise ConfigurationError(f"there is not a terminal: {otherwise}") from None


def _show(words: tuple[str, ...]) -> None:
    """Show one share after another on the terminal, whatever standard output is."""
    with open(_TERMINAL, "w", encoding="utf-8") as out, open(_TERMINAL, encoding="utf-8") as keys:  # noqa: PTH123 (a device)
        for number, share in enumerate(words, start=1):
            numbered = [f"{place:2} {word:<10}" for place, word in enumerate(share.split(), 1)]
            rows = (
                numbered[at : at + _WORDS_IN_A_ROW]
                for at in range(0, len(numbered), _WORDS_IN_A_ROW)
            )
            table = "\n".join(" ".join(row) for row in rows)
            out.write(f"{_CLEAR}Share {number} of {len(words)}\n\n{table}\n\n")
            out.write("Write it down; it is not shown again. Then press Enter. ")
            out.flush()
            keys.readline()
        out.write(_CLEAR)
