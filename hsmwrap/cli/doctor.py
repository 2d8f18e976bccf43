"""``hsmwrap doctor``: what a backend can do on the HSM at hand, tried, for a ticket."""

from __future__ import annotations

import argparse
import platform
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any

from hsmwrap import __version__, registry
from hsmwrap.backend import Exposure
from hsmwrap.catalog import COMPATIBILITY_TABLE, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.cli import doctor_report, tables
from hsmwrap.cli.arguments import (
    Subparsers,
    add_backend_options,
    add_json_option,
    backend_settings,
)
from hsmwrap.cli.doctor_examination import Duration, Findings, Requirement, examine, say, timed
from hsmwrap.cli.doctor_report import Document
from hsmwrap.errors import ConfigurationError, HsmwrapError, UnsupportedOperation
from hsmwrap.pkcs11 import inspection
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.pkcs11.token.pin import officer_pin

_DESCRIPTION = """\
Open a backend and try what its capability report promises: import by each row of the compatibility
table, use each key spec, work in threads and in a forked child, measure. The report is for a
ticket: it holds no secret. Progress is on stderr.

An HSM token without a key set is examined under keys of the doctor's own, which it destroys again;
the objects in the HSM token are counted before and after. A plug-in is examined through the
contract alone.

Exit code: 0 every promise was kept, 1 one was not, or a --require is not met, 2 it cannot run.
"""


def add_parser(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser(
        "doctor",
        help="try everything that a backend promises on the HSM at hand",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_backend_options(parser)
    parser.add_argument(
        "--require",
        action="append",
        default=[],
        type=_requirement,
        metavar="SPEC:ALGORITHM[:EXPOSURE]",
        help="a row that has to be served, as RSA_2048:RSAES_OAEP_SHA_256:in_hsm; repeatable",
    )
    form = parser.add_mutually_exclusive_group()
    add_json_option(form)
    form.add_argument("--markdown", action="store_true", help="print Markdown, for a ticket")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Examine the backend and print the report; the exit code is in the module's description."""
    settings = backend_settings(args)
    document: Document = {
        "hsmwrap": __version__,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "backend": _plugin(args.backend),
        "module": {},
        "token": {},
        "profile": {},
        "mechanisms": [],
        "key_sets": [],
        "objects": {"before": None, "after": None, "left": []},
        "examination": {},
        "requirements": [],
        "verdict": {"kept": False, "broken": [], "cannot_run": None},
    }
    verdict = document["verdict"]
    try:
        with _terminable():
            findings = _examine(args, settings, document)
    except HsmwrapError as error:
        verdict["cannot_run"] = f"{type(error).__name__}: {error}"
    else:
        unmet = [(each, each.unmet(findings.rows)) for each in args.require]
        document["requirements"] = [
            {"requirement": str(each), "met": why is None, "why": why} for each, why in unmet
        ]
        verdict["broken"] = findings.broken() + [why for _, why in unmet if why is not None]
        if left := document["objects"]["left"]:
            verdict["broken"].append(
                f"the HSM token has new objects: {', '.join(left)}; the doctor left them, if no "
                "other application was at work"
            )
        verdict["kept"] = not verdict["broken"]
    forms = {"json": tables.to_json, "markdown": doctor_report.as_markdown}
    chosen = next((form for name, form in forms.items() if getattr(args, name)), None)
    print((chosen or doctor_report.as_text)(document))
    return 2 if verdict["cannot_run"] else 0 if verdict["kept"] else 1


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the examination as an interrupt does: what it made is destroyed."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _plugin(name: str) -> Document:
    found = [entry for entry in registry.available() if entry.name == name]
    return {
        "plugin": name,
        "class": found[0].value if found else None,
        "distribution": found[0].distribution if found else None,
    }


def _examine(args: argparse.Namespace, settings: Mapping[str, Any], document: Document) -> Findings:
    if args.backend != "pkcs11":
        registry.load(args.backend)
        with suppress(ConfigurationError):  # a keyring in memory has none to list
            document["key_sets"] = _key_sets(args.backend, settings)
        return _open_and_examine(args.backend, settings, document)
    checked = Pkcs11Settings.from_mapping(settings)
    say(f"asking {checked.module} what it is")
    identity = inspection.identify(checked)
    document["module"], document["token"] = identity.module, identity.token
    document["mechanisms"] = identity.mechanisms
    fitting = ", ".join(identity.profiles) or "none of `hsmwrap profiles list`"
    document["profile"] = {
        "used": checked.profile or checked.profile_file or "none",
        "fits": fitting,
        "forbids": list(checked.traits.forbidden),
    }
    document["key_sets"] = _key_sets(args.backend, settings)
    objects = document["objects"]
    before = inspection.token_objects(checked)
    objects["before"] = before.total()
    try:
        with _keys(args, checked, settings, document) as usable:
            return _open_and_examine(args.backend, usable, document)
    finally:
        after = inspection.token_objects(checked)
        objects["after"] = after.total()
        objects["left"] = [" ".join(filter(None, name)) for name in (after - before).elements()]


@contextmanager
def _keys(
    args: argparse.Namespace,
    checked: Pkcs11Settings,
    settings: Mapping[str, Any],
    document: Document,
) -> Iterator[Mapping[str, Any]]:
    """Settings for a key set: that of the HSM token, or one of the doctor's own for so long."""
    if any(each["current"] for each in document["key_sets"]):
        yield settings
        return
    say("the HSM token has no key set: making one for the examination")
    with ExitStack() as made:
        trial_keys, trust = partial(inspection.trial_keys, checked), ""
        try:
            prefix = made.enter_context(trial_keys(officer_pin(args.so_pin_file or None)))
        except UnsupportedOperation as error:
            say(f"{error}: making those")
            prefix = made.enter_context(trial_keys(None))
            trust = "; the security officer makes no trusted ones"
        own = {**settings, "key_prefix": prefix}
        document["key_sets"] = [
            each | {"detail": f"{each['detail']}; of the doctor, for the examination only{trust}"}
            for each in _key_sets(args.backend, own)
        ]
        yield own
        say("destroying the key set of the examination")


def _open_and_examine(plugin: str, settings: Mapping[str, Any], document: Document) -> Findings:
    say(f"opening backend {plugin}")
    backend, open_ms = timed(lambda: registry.open_backend(plugin, settings))
    with backend:
        findings = examine(backend)
    findings.durations.insert(0, Duration("open the backend", open_ms, 1))
    document["examination"] = doctor_report.of_findings(findings)
    return findings


def _key_sets(plugin: str, settings: Mapping[str, Any]) -> list[Document]:
    try:
        sets = registry.KeySetManager(plugin, settings).list()
    except UnsupportedOperation:
        return []
    return [{"key_set": s.key_set, "current": s.current, "detail": s.detail} for s in sets]


def _requirement(text: str) -> Requirement:
    spec, _, rest = text.partition(":")
    algorithm, _, exposure = rest.partition(":")
    rows = {(row.spec.value, row.algorithm.value) for row in COMPATIBILITY_TABLE}
    if (spec, algorithm) not in rows:
        known = ", ".join(":".join(row) for row in sorted(rows))
        raise argparse.ArgumentTypeError(f"{text!r} names no row of the table; there are {known}")
    if exposure not in {"", *Exposure}:
        raise argparse.ArgumentTypeError(f"{text!r}: the exposure is {' or '.join(Exposure)}")
    return Requirement(
        WrappingKeySpec(spec),
        WrappingAlgorithm(algorithm),
        Exposure(exposure) if exposure else None,
    )
