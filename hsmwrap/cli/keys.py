"""``hsmwrap keys``: a backend's own keys: make, rotate, retire, list."""

from __future__ import annotations

import argparse
import os
import pwd
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsmwrap import registry
from hsmwrap.backend import KeySetInfo, ReapReport, ReapsWrappingKeys
from hsmwrap.catalog import ProtectionLevel
from hsmwrap.cli import ceremonies, tables
from hsmwrap.cli.arguments import (
    ENVIRONMENT,
    Subparsers,
    add_backend_options,
    add_json_option,
    backend_settings,
    given_options,
)
from hsmwrap.cli.ceremonies import Ceremony
from hsmwrap.cli.extras import require_server
from hsmwrap.cli.newfiles import NewFiles
from hsmwrap.errors import ConfigurationError
from hsmwrap.keypool import PoolSettings

if TYPE_CHECKING:
    from hsmwrap.kms.config import ServerConfig
    from hsmwrap.kms.keysets import Progress, StoredKeys

_DESCRIPTION = """\
A backend seals import tokens, wrapping keys and imported keys under keys of its own, which come
in sets. The newest set is current; older ones open what they sealed until they are retired.
The settings of any plug-in come from --settings. For pkcs11 and software there are options for the
usual ones, which outrank the file; without a file the variables HSMWRAP_PKCS11_MODULE,
HSMWRAP_TOKEN_LABEL, HSMWRAP_PIN_FILE and HSMWRAP_SO_PIN_FILE are read as well. With the security
officer's PIN the key-encryption keys of an HSM token become CKA_TRUSTED, and nothing else can wrap
what they wrap.

With --config FILE, the file of `hsmwrap serve`, backend and settings come from there, and the
database is asked which stored keys need which set: `list` counts them (exit code 1 if a set that
they need is missing), `reseal` moves them to the current set, `retire` refuses while something
needs the old one, and `init` and `rotate` while one is missing, as the new set may take its number.
`usage` counts the stored keys of each backend and key set, without any HSM; exit code 1 if a
backend that has some is not configured. --backend names one that is configured.

`reseal` moves sealed keys inside the HSM; no client imports again. It runs beside serving
processes, shows its progress, and goes on where it was when it is run again.

`retire` destroys a set that is not current; everything that it sealed becomes unusable. So it
refuses while a stored key needs the set, or an import token may: for the lifetime of a token after
the rotation, plus the max_age of key-pair pools, plus 60 seconds in which running processes still
use the set that they know; by default 25 hours and a minute. Without --config nothing tells what
the set sealed, so it takes --force. A set that `list` shows as not finished sealed nothing.

A key set is cloned to another HSM token in three steps, with the SO PIN on both sides, never in
plaintext outside a token: `transport-key --out FILE` on the target, `export --file FILE --out FILE`
on the source, `import --file FILE` on the target. Each file has a fingerprint, which the next step
takes by --fingerprint: compare it by another way than the file came, by telephone for example. What
was sealed on one side then opens on the other, and import tokens hold.

`clone` is the same in one step, where this host sees both tokens: --to names the settings of the
target, and --to-so-pin-file its SO PIN.

`backup --shares N --threshold M --out FILE` wraps the trusted key sets under a key that exists as
N shares afterwards (SLIP-39), of which `restore --file FILE` takes any M. Shares are secrets: they
are shown on the terminal, one at a time, or each is a file of its own in the directory --shares-to;
restore takes them by --share-file, once for each, or asks for them and does not show what is typed.
In between the key is in this host's memory: do it on an offline machine.

`drill` restores a backup on a scratch token (--to, --to-so-pin-file), where it proves that each key
set opens and authenticates what it did before, and destroys what it restored. It refuses the token
of the backup, and one that has key sets. With --config it also opens each key of that server's
database there, and checks its check value.

--transcript FILE adds lines to a transcript: what was done, when, fingerprints, key sets, and
--words, but no secret. Its lines are chained. `verify-transcript` checks them; that the end was cut
off is found by --fingerprint, the digest of the last line, which is printed after each ceremony.

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
        help="make, rotate, retire, list, clone or back up a backend's own keys",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "action",
        choices=(
            *("init", "rotate", "reseal", "retire", "list", "usage", "reap"),
            *("transport-key", "export", "import", "clone"),
            *("backup", "restore", "drill", "verify-transcript"),
        ),
    )
    parser.add_argument("key_set", nargs="?", help="the key set to retire; see above for when")
    add_backend_options(parser)
    parser.set_defaults(backend=None)
    parser.add_argument("--config", type=Path, metavar="FILE", help="the server's TOML file")
    parser.add_argument(
        "--level",
        choices=[level.value for level in ProtectionLevel],
        help="with --config: which backend; default: HSM if there is one",
    )
    parser.add_argument(
        "--rate",
        type=float,
        default=200.0,
        metavar="N",
        help="reseal: at most so many keys a second (default: %(default)g)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="retire, init, rotate: all the same; what is needed is lost",
    )
    parser.add_argument(
        "--file",
        type=Path,
        help="export, import: the file of the step before; restore, drill: the backup",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="transport-key, export, backup: new file"
    )
    parser.add_argument(
        "--fingerprint",
        metavar="HEX",
        help="export, import: of --file, as the other side showed it; verify-transcript: of the "
        "last line",
    )
    parser.add_argument(
        "--to", type=Path, metavar="FILE", help="clone, drill: settings of the other HSM token"
    )
    parser.add_argument("--to-so-pin-file", metavar="FILE", help="clone, drill: its SO PIN")
    parser.add_argument("--shares", type=int, metavar="N", help="backup: how many shares")
    parser.add_argument(
        "--threshold", type=int, metavar="M", help="backup: how many of them are needed"
    )
    parser.add_argument(
        "--shares-to",
        type=Path,
        metavar="DIR",
        help="backup: a file for each share, in place of the terminal",
    )
    parser.add_argument(
        "--share-file",
        action="append",
        metavar="FILE",
        help="restore, drill: a share, once for each, in place of the terminal",
    )
    parser.add_argument("--transcript", type=Path, metavar="FILE", help="write down what is done")
    parser.add_argument("--words", metavar="TEXT", help="for the transcript, in your own words")
    add_json_option(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Do what ``args.action`` says and print the key sets that there are afterwards."""
    if args.action in {"verify-transcript", "usage"}:
        return (_show_usage if args.action == "usage" else ceremonies.verify_transcript)(args)
    chosen = _chosen(args)
    if args.action == "reap":
        return _reap(args, chosen)
    if args.action == "reseal":
        with _audited(args, chosen) as facts:
            return _reseal(args, chosen, facts)
    key_sets = registry.KeySetManager(chosen.plugin, chosen.settings)
    if args.action == "list":
        sets, usage = key_sets.list(), _usage(chosen)
        _print(sets, usage, as_json=args.json)
        return 1 if _missing(sets, usage) else 0
    so_pin_file = args.so_pin_file or os.environ.get(ENVIRONMENT["so_pin_file"])
    if args.action in {"init", "rotate"} and chosen.plugin == "pkcs11" and not so_pin_file:
        print(_WEAKER, file=sys.stderr)
    ceremony = ceremonies.Ceremony(args, key_sets, so_pin_file)
    with (
        ceremonies.files_of(args) as files,
        _audited(args, chosen, key_sets) as facts,
        ceremonies.recorded(ceremony),
    ):
        if files is not None:
            (ceremonies.back_up if args.action == "backup" else _write_file)(ceremony, files)
        elif args.action == "drill":
            return ceremonies.drill(ceremony, chosen.config)
        else:
            _print(_changed(ceremony, chosen), None, as_json=args.json)
        facts["key_sets"] = " ".join(ceremony.facts.get("key_sets", ()))
    return 0


_AUDITED = {
    "init": "InitKeySets",
    "rotate": "RotateKeySets",
    "reseal": "ResealAllKeys",
    "retire": "RetireKeySet",
    "transport-key": "MakeTransportKey",
    "export": "ExportKeySets",
    "import": "ImportKeySets",
    "clone": "CloneKeySets",
    "backup": "BackUpKeySets",
    "restore": "RestoreKeySets",
}


@contextmanager
def _audited(
    args: argparse.Namespace, chosen: _Chosen, key_sets: registry.KeySetManager | None = None
) -> Iterator[dict[str, str]]:
    """With --config, a line of the server's audit log: what was done, or that it was refused."""
    if chosen.config is None or args.action not in _AUDITED:
        yield {}
        return
    from hsmwrap.kms.opening import audited_command  # noqa: PLC0415 (the extra may be absent)

    try:
        operator = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        operator = str(os.getuid())
    facts = {"operator": operator, "backend": chosen.name}
    if args.key_set:
        facts["key_set"] = args.key_set
    with audited_command(chosen.config, _AUDITED[args.action], facts):
        if key_sets is not None:
            with suppress(ConfigurationError):  # which the command itself says better
                before = [each.key_set for each in key_sets.list()]
                facts["key_sets_before"] = " ".join(before)
        yield facts


def _changed(ceremony: Ceremony, chosen: _Chosen) -> tuple[KeySetInfo, ...]:
    """Change key sets; those that there are afterwards."""
    args, key_sets, so_pin_file = ceremony.args, ceremony.key_sets, ceremony.so_pin_file
    if args.action == "clone":
        return ceremonies.clone(ceremony)
    if args.action == "restore":
        return ceremonies.restore(ceremony)
    if args.action == "import":
        content, fingerprint = _confirmed(args)
        ceremony.compared("key_sets", fingerprint)
        key_sets.import_exported(content, fingerprint, so_pin_file=so_pin_file)
    elif args.action in {"init", "rotate"}:
        if not args.force:
            _require_none_missing(chosen, key_sets)
        make = key_sets.initialise if args.action == "init" else key_sets.rotate
        make(so_pin_file=so_pin_file)
    elif args.action == "retire":
        if not args.key_set:
            raise ConfigurationError("retire: name the key set; `hsmwrap keys list` shows them all")
        if not args.force:
            _require_unneeded(args.key_set, chosen, key_sets)
        key_sets.retire(args.key_set)
    return ceremony.present(key_sets.list())


@dataclass(frozen=True, slots=True)
class _Chosen:
    """The backend that the command is for; with --config its name, and the server whose it is."""

    plugin: str
    settings: dict[str, Any] = field(repr=False)  # a PIN may be in it
    config: ServerConfig | None = None
    name: str = ""


def _write_file(ceremony: Ceremony, files: NewFiles) -> None:
    """A step of cloning that makes a file: write it, and show its fingerprint."""
    args, key_sets, so_pin_file = ceremony.args, ceremony.key_sets, ceremony.so_pin_file
    if args.action == "transport-key":
        made = key_sets.make_transport_key(so_pin_file=so_pin_file)
        ceremony.compared("transport_key", made.fingerprint)
    else:
        content, fingerprint = _confirmed(args)
        ceremony.compared("transport_key", fingerprint)
        made = key_sets.export(content, fingerprint, so_pin_file=so_pin_file)
        ceremony.compared("key_sets", made.fingerprint)
        ceremony.present(key_sets.list())
    files.write([made.content])
    if args.json:
        shown = tables.to_json({"file": str(args.out), "fingerprint": made.fingerprint})
    else:
        shown = f"{args.out}\nfingerprint {made.fingerprint}\nCompare it on the other side."
    print(shown, flush=True)


def _confirmed(args: argparse.Namespace) -> tuple[str, str]:
    """The content of --file, and the fingerprint that was confirmed."""
    if args.file is None or args.fingerprint is None:
        raise ConfigurationError(
            f"{args.action}: give --file FILE, and --fingerprint with what the other side showed; "
            "do not take it from where the file came from"
        )
    return ceremonies.read_text(args.file), args.fingerprint


def _show_usage(args: argparse.Namespace) -> int:
    """Count stored keys by backend and key set; 1 if the backend of some is not configured."""
    if args.config is None:
        raise ConfigurationError("usage: give --config FILE, the server's; it names the database")
    require_server()
    from hsmwrap.kms.config import load_config, name_of  # noqa: PLC0415 (the extra may be absent)
    from hsmwrap.kms.keysets import usage_of_backends  # noqa: PLC0415 (the extra may be absent)
    from hsmwrap.kms.opening import open_database  # noqa: PLC0415 (the extra may be absent)

    config = load_config(args.config)
    roles = {name_of(backend): "former" for backend in config.former_backends.values()}
    for level, backend in config.backends.items():
        roles[name_of(backend)] = f"new keys of {level}"
    with closing(open_database(config)) as database:
        rows = usage_of_backends(database)
    if args.json:
        print(tables.to_json({"usage": [asdict(r) | {"use": roles.get(r.backend)} for r in rows]}))
    else:
        cells = [
            (
                r.backend,
                roles.get(r.backend, "NOT CONFIGURED"),
                r.level,
                r.key_set or "-",
                str(r.keys),
            )
            for r in rows
        ]
        headings = ("backend", "use", "level", "key set", "keys")
        print(tables.render(headings, cells, right={"keys"}))
    return 0 if all(row.backend in roles for row in rows) else 1


def _usage(chosen: _Chosen) -> Mapping[str, int] | None:
    """How many stored keys need each key set; None without a database to ask."""
    if chosen.config is None:
        return None
    from hsmwrap.kms.keysets import usage_of  # noqa: PLC0415 (the extra may be absent)
    from hsmwrap.kms.opening import open_database  # noqa: PLC0415 (the extra may be absent)

    with closing(open_database(chosen.config)) as database:
        return usage_of(database, chosen.name)


def _require_none_missing(chosen: _Chosen, key_sets: registry.KeySetManager) -> None:
    usage = _usage(chosen)
    if usage and (missing := _missing(key_sets.list(), usage)):
        raise ConfigurationError(
            f"stored keys need key set {', '.join(missing)}, which the backend does not have: "
            "bring it back first (`hsmwrap keys restore`), as a new set may take its number. "
            "With --force they are lost"
        )


def _require_unneeded(key_set: str, chosen: _Chosen, key_sets: registry.KeySetManager) -> None:
    known = {each.key_set: each for each in key_sets.list()}
    # What the backend refuses anyway, it says best; what is not finished sealed nothing.
    if key_set not in known or known[key_set].current or not known[key_set].finished:
        return
    if chosen.config is None:
        raise ConfigurationError(
            f"without the server's file nothing tells what key set {key_set} sealed: give "
            "--config FILE, or --force to retire it and lose what needs it"
        )
    from hsmwrap.pkcs11.keysets.keys import CURRENT_SET_LIFETIME  # noqa: PLC0415 (loads python-pkcs11)

    stale = timedelta(seconds=CURRENT_SET_LIFETIME)
    wait = chosen.config.token_lifetime + PoolSettings().max_age + stale
    with _stored_keys(chosen, chosen.config) as stored:
        stored.require_unneeded(key_set, wait, datetime.now(UTC))


def _reseal(args: argparse.Namespace, chosen: _Chosen, facts: dict[str, str]) -> int:
    """Move stored keys to the current key set; the exit code is 1 if one did not move."""
    if chosen.config is None:
        raise ConfigurationError("reseal: give --config FILE, the server's; it names the database")
    if not args.rate > 0:
        raise ConfigurationError("--rate: takes more than 0 keys a second")
    with _stored_keys(chosen, chosen.config, moves=True) as stored:
        progress = _Progress(sum(stored.usage().values()), args.rate)
        done = stored.reseal(report=progress)
        current = stored.current_key_set
    facts |= {"key_set": current, "moved": str(done.moved), "failed": str(done.failed)}
    if args.json:
        print(tables.to_json({"key_set": current, **asdict(done)}))
    else:
        print(
            f"{done.moved} keys moved to key set {current}, {done.failed} could not be moved, "
            f"{done.examined - done.moved - done.failed} were under it"
        )
    return 1 if done.failed else 0


class _Progress:
    """Says how far a re-sealing is, once a second, and keeps it to ``rate`` keys a second."""

    def __init__(self, expected: int, rate: float) -> None:
        self._expected = expected
        self._rate = rate
        self._started = self._said = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._said >= 1:
            self._said = now
            left = f"{progress.examined} of {self._expected}"
            print(f"{left}: {progress.moved} moved, {progress.failed} failed", file=sys.stderr)
        due = self._started + (progress.moved + progress.failed) / self._rate
        time.sleep(max(0.0, due - now))


@contextmanager
def _stored_keys(
    chosen: _Chosen, config: ServerConfig, *, moves: bool = False
) -> Iterator[StoredKeys]:
    from hsmwrap.kms.opening import opened_stored_keys  # noqa: PLC0415 (the extra may be absent)

    with (
        registry.open_backend(chosen.plugin, chosen.settings) as backend,
        opened_stored_keys(config, backend, moves=moves) as stored,
    ):
        yield stored


def _reap(args: argparse.Namespace, chosen: _Chosen) -> int:
    """Remove expired wrapping keys; the exit code is 1 if one could not be removed."""
    with registry.open_backend(chosen.plugin, chosen.settings) as backend:
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


def _chosen(args: argparse.Namespace) -> _Chosen:
    if args.config is None:
        args.backend = args.backend or "pkcs11"
        return _Chosen(args.backend, backend_settings(args))
    if args.settings or given_options(args):
        raise ConfigurationError("--config names backend and settings: give no others")
    require_server()
    from hsmwrap.kms.config import load_config, name_of  # noqa: PLC0415 (the extra may be absent)

    config = load_config(args.config)
    if args.backend:
        current = {name_of(each): each for each in config.backends.values()}
        configured = {**current, **config.former_backends}
        if args.backend not in configured:
            raise ConfigurationError(
                "--config names backend and settings: give no others, or by --backend the name of "
                f"one that is configured: {', '.join(configured)}; {args.backend} is not"
            )
        named = configured[args.backend]
        return _Chosen(named.plugin, named.settings, config, args.backend)
    hsm = ProtectionLevel.HSM
    level = args.level or (hsm if hsm in config.backends else next(iter(config.backends), hsm))
    if level not in config.backends:
        raise ConfigurationError(f"{args.config} has no backend of level {level}")
    backend = config.backends[ProtectionLevel(level)]
    return _Chosen(backend.plugin, backend.settings, config, name_of(backend))


def _missing(sets: tuple[KeySetInfo, ...], usage: Mapping[str, int] | None) -> Mapping[str, int]:
    """How many stored keys need each key set that the backend does not have."""
    if not usage:
        return {}
    from hsmwrap.kms.keysets import missing_from  # noqa: PLC0415 (the extra may be absent)

    return missing_from(sets, usage)


def _print(sets: tuple[KeySetInfo, ...], usage: Mapping[str, int] | None, *, as_json: bool) -> None:
    missing = _missing(sets, usage)
    if as_json:
        rows = [
            {"key_set": s.key_set, "current": s.current, "detail": s.detail}
            | ({} if usage is None else {"keys": usage.get(s.key_set, 0)})
            for s in sets
        ]
        print(tables.to_json({"key_sets": rows} | ({"missing": missing} if missing else {})))
        return
    marks = {True: "current", False: "opens only"}
    headings = ["key set", "use", "detail"]
    cells = [[each.key_set, marks[each.current], each.detail] for each in sets]
    if usage is not None:
        headings.append("keys")
        cells = [[*row, str(usage.get(row[0], 0))] for row in cells]
        lost = "restore a backup that has it"
        cells += [[key_set, "MISSING", lost, str(keys)] for key_set, keys in missing.items()]
    print(tables.render(headings, cells, right={"keys"}))
