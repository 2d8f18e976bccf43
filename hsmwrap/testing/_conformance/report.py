"""What a run of the kit found, as a document to publish: no serial number, no PIN, no path."""

from __future__ import annotations

import json
import linecache
import platform
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import pytest

from hsmwrap import __version__, registry
from hsmwrap.backend import CONTRACT_VERSION, Backend, Capabilities, DescribesHsm
from hsmwrap.catalog import COMPATIBILITY_TABLE, KeySpec, ProtectionLevel, WrappingAlgorithm
from hsmwrap.errors import HsmwrapError
from hsmwrap.testing._conformance.base import ConformanceFixtures

SCHEMA = "hsmwrap-conformance/1"
"""Of the JSON document: another number after a change that its readers have to know of."""

Document = dict[str, Any]

_HERE = Path(__file__).parent
_PATH = r"(?<![\w/.:])(?:/[\w.@+~-]+){2,}/?"
_SECRET = re.compile("pin|serial|label|password|secret|uri|user")
_HIDDEN = "(not shown)"
_PASSED, _FAILED, _SKIPPED = "passed", "failed", "skipped"
_ANY = "-"


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one test, in one of its phases.

    Attributes:
        test: Its name, with its parameters.
        topic: The part of the kit that it is of.
        algorithm: The wrapping algorithm that it was about; ``-`` where it was about none.
        key_spec: The key spec, likewise.
        outcome: ``passed``, ``failed`` or ``skipped``; empty where this phase says nothing new.
        why: The reason of a skip, or type and place of a failure.
        replaced: Whether the test is another one than the kit's of that name.
    """

    test: str
    topic: str
    algorithm: str
    key_spec: str
    outcome: str
    why: str = ""
    replaced: bool = False

    @classmethod
    def of(cls, item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport) -> Self:
        """What pytest says of a phase."""
        params: Mapping[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
        outcome, why = "", ""
        if report.failed:
            outcome, why = _FAILED, _failure(call)
        elif report.skipped:
            assert isinstance(report.longrepr, tuple)  # noqa: S101  # of a skip
            outcome, why = _SKIPPED, str(report.longrepr[2]).removeprefix("Skipped: ")
        elif report.when == "call":
            outcome = _PASSED
        return cls(
            test=item.name,
            topic=topic_of(item),
            algorithm=str(params["pair"][1]) if "pair" in params else _ANY,
            key_spec=str(params.get("key_spec", _ANY)),
            outcome=outcome,
            why=why,
            replaced="topic" not in vars(_owners(item)[0]),
        )


def topic_of(item: pytest.Item) -> str:
    """The part of the kit that a test is of; empty for a test that is not the kit's."""
    return next((vars(c)["topic"] for c in _owners(item) if "topic" in vars(c)), "")


def _owners(item: pytest.Item) -> list[type]:
    """The classes that have a test of this name, the one whose it is first."""
    tested = getattr(item, "cls", None)
    if tested is None or not issubclass(tested, ConformanceFixtures):
        return []
    return [c for c in tested.__mro__ if getattr(item, "originalname", "") in vars(c)]


def _failure(call: pytest.CallInfo[None]) -> str:
    """Type and place of what a test failed with. Not its text, which may hold anything."""
    assert call.excinfo is not None  # noqa: S101  # it failed
    kind = "AssertionError" if call.excinfo.errisinstance(AssertionError) else call.excinfo.typename
    for entry in reversed(call.excinfo.traceback):
        path = Path(str(entry.path))
        if path.parent == _HERE and path != _HERE / "run.py":
            number = entry.lineno + 1
            line = linecache.getline(str(path), number).strip()
            return f"{kind} at {path.name}:{number}: {line}"
    return f"{kind} outside of the kit"


@dataclass
class Kit:
    """The record of one class of tests.

    Attributes:
        name: Of the class.
        plugin: The backend's class.
        selected: How many tests pytest chose.
        left_out: How many it did not choose.
        results: By name of the test.
        backend: What the backend is called in import tokens and key references.
        hsm: What it says of its HSM.
        capabilities: What it says that it can do.
        settings: Those that it was opened with.
    """

    name: str
    plugin: type[Backend] | None
    selected: int = 0
    left_out: int = 0
    results: dict[str, Result] = field(default_factory=dict)
    backend: str | None = None
    hsm: Document | None = None
    capabilities: Document | None = None
    settings: dict[str, Any] = field(default_factory=dict, repr=False)

    def note(self, result: Result) -> None:
        """Keep the first thing that went wrong in a test, else that it passed."""
        if result.outcome:
            known = self.results.get(result.test)
            if known is None or known.outcome == _PASSED:
                self.results[result.test] = result

    def look_at(self, backend: Backend, settings: Any) -> None:
        """Ask the first backend what it is and what it can do."""
        if self.backend is not None:
            return
        self.backend = backend.name
        if isinstance(settings, Mapping):
            self.settings = dict(settings)
        with suppress(HsmwrapError):
            self.capabilities = _capabilities(backend.capabilities())
            if describes := DescribesHsm.of(backend):
                self.hsm = asdict(describes.describe_hsm())

    def document(self) -> Document:
        """What is published of it."""
        results = list(self.results.values())
        counts = Counter(each.outcome for each in results)
        gaps, hidden = [], _secrets_in(self.settings)
        if self.left_out:
            gaps.append(f"{self.left_out} tests were left out by pytest's options")
        if not_run := self.selected - len(results):
            gaps.append(f"{not_run} tests did not run")
        if replaced := sorted(each.test for each in results if each.replaced):
            gaps.append(f"replaced by other tests: {', '.join(replaced)}")
        if self.capabilities is None:
            gaps.append("there was not a capability report")
        verdict = "incomplete" if gaps else _PASSED
        made: Document = {
            "kit": self.name,
            "backend": self.backend,
            **_registered(self.plugin),
            "verdict": _FAILED if counts[_FAILED] else verdict,
            "incomplete": gaps,
            "counts": {each: counts[each] for each in (_PASSED, _FAILED, _SKIPPED)},
            "hsm": _publishable(self.hsm, hidden),
            "capabilities": _publishable(self.capabilities, hidden),
            "results": _rows(results),
            "failures": [
                {"test": each.test, "failure": each.why}
                for each in sorted(results, key=lambda each: each.test)
                if each.outcome == _FAILED
            ],
            "skips": _publishable(_skips(results), hidden),
        }
        return made


# --- the document ---------------------------------------------------------------------------------


def document_of(kits: Iterable[Kit]) -> Document:
    """The report of a run."""
    return {
        "schema": SCHEMA,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "hsmwrap": __version__,
        "contract_version": CONTRACT_VERSION,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "kits": [kit.document() for kit in sorted(kits, key=lambda kit: kit.name)],
    }


def _registered(plugin: type[Backend] | None) -> Document:
    """The plug-in's class, and name and installed package that it is registered by, if it is."""
    found: Document = {"plugin": None, "class": None, "distribution": None}
    if plugin is not None:
        found["class"] = f"{plugin.__module__}:{plugin.__qualname__}"
        for entry in registry.available():
            with suppress(HsmwrapError):
                if registry.load(entry.name) is plugin:
                    found |= {"plugin": entry.name, "distribution": entry.distribution}
    return found


def _capabilities(report: Capabilities) -> Document:
    return {
        "protection_levels": sorted(report.protection_levels),
        "production": report.production,
        "wrapping": list(_wrapping(report)),
        "keys": [
            {"key_spec": each.key_spec, "usable": each.usable, "custody": each.custody}
            for each in sorted(report.keys, key=lambda each: each.key_spec)
        ],
        "protections": [asdict(each) for each in sorted(report.protections, key=lambda p: p.name)],
        "notes": list(report.notes),
    }


def _wrapping(report: Capabilities) -> Iterator[Document]:
    """A row for each algorithm and level of the compatibility table, served or not."""
    missing = {(each.spec, each.algorithm): each.reason for each in report.missing}
    for row in COMPATIBILITY_TABLE:
        served = report.wrapping_for(row.spec, row.algorithm)
        for level in ProtectionLevel:
            if level not in row.levels:
                continue
            why = served.reason if served else missing.get((row.spec, row.algorithm), "")
            offered = served if level in report.protection_levels else None
            if level not in report.protection_levels:
                why = f"the backend does not serve level {level}"
            yield {
                "wrapping_key_spec": row.spec,
                "wrapping_algorithm": row.algorithm,
                "protection_level": level,
                "served": offered is not None,
                "exposure": offered and offered.exposure,
                "custody": offered and offered.custody,
                "by": offered and offered.path,
                "why": why,
            }


def _rows(results: Sequence[Result]) -> list[Document]:
    """How many tests passed, failed and were skipped by topic, algorithm and key spec."""
    orders = (_topics(), [_ANY, *WrappingAlgorithm], [_ANY, *KeySpec])
    counted: dict[tuple[str, str, str], Counter[str]] = {}
    for each in results:
        about = each.topic, each.algorithm, each.key_spec
        counted.setdefault(about, Counter())[each.outcome] += 1
    ordered = sorted(
        counted, key=lambda row: [o.index(v) for o, v in zip(orders, row, strict=True)]
    )
    names = "topic", "wrapping_algorithm", "key_spec"
    return [
        dict(zip(names, row, strict=True))
        | {each: counted[row][each] for each in (_PASSED, _FAILED, _SKIPPED)}
        for row in ordered
    ]


def _topics() -> list[str]:
    return [part.topic for part in ConformanceFixtures.__subclasses__() if "topic" in vars(part)]


def _skips(results: Iterable[Result]) -> list[Document]:
    """Each reason once, with what was left out for it."""
    reasons: dict[str, set[str]] = {}
    counts: Counter[str] = Counter()
    for each in results:
        if each.outcome == _SKIPPED:
            why = each.why.removeprefix("capability: ")
            reasons.setdefault(why, set()).add(each.test.partition("[")[0])
            counts[why] += 1
    return [
        {"reason": why, "count": counts[why], "tests": sorted(reasons[why])}
        for why in sorted(reasons)
    ]


def _secrets_in(settings: Mapping[str, Any]) -> re.Pattern[str]:
    """What no published text has: absolute paths; PINs, serial numbers and labels of settings."""
    found = (
        rf"(?<!\w){re.escape(value)}(?!\w)"
        for name, value in settings.items()
        if isinstance(value, str) and value and _SECRET.search(name)
    )
    return re.compile("|".join([*found, _PATH]))


def _publishable(value: Any, hidden: re.Pattern[str]) -> Any:
    """The same without what is hidden."""
    if isinstance(value, Mapping):
        return {name: _publishable(each, hidden) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_publishable(each, hidden) for each in value]
    return hidden.sub(_HIDDEN, value) if isinstance(value, str) else value


# --- for people -----------------------------------------------------------------------------------


def as_json(document: Document) -> str:
    """The document, for machines."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def as_markdown(document: Document) -> str:
    """The document, for a web page or a ticket."""
    return "\n\n".join(_parts(document)) + "\n"


WRITERS: Mapping[str, Callable[[Document], str]] = {".json": as_json, ".md": as_markdown}
"""How a report is written, by the end of its file's name."""


def as_lines(document: Document) -> Iterator[str]:
    """What the terminal shows: verdict, failures, and what was not tested."""
    for kit in document["kits"]:
        yield f"{kit['kit']}: {_title(kit)}: {_verdict(kit)}"
        yield from (f"  failed: {each['test']}: {each['failure']}" for each in kit["failures"])
        yield from (f"  incomplete: {each}" for each in kit["incomplete"])
        yield from (
            f"  not tested, {each['count']} times: {each['reason']}" for each in kit["skips"]
        )


def _title(kit: Document) -> str:
    return f"{kit['distribution'] or kit['class']}, backend {kit['plugin'] or kit['backend']}"


def _verdict(kit: Document) -> str:
    counts = ", ".join(f"{count} {each}" for each, count in kit["counts"].items())
    words = {_PASSED: "PASSED", _FAILED: "FAILED"}.get(kit["verdict"], "INCOMPLETE")
    return f"{words} ({counts})"


def _parts(document: Document) -> Iterator[str]:
    yield "# Report of hsmwrap's conformance kit"
    names = "at", "hsmwrap", "contract_version", "python", "platform"
    yield _table(("fact", "value"), [(_plain(n), document[n]) for n in names])
    for kit in document["kits"]:
        yield f"## {_title(kit)}"
        yield _verdict(kit)
        if kit["incomplete"]:
            yield _list(kit["incomplete"])
        facts = {n: kit[n] for n in ("kit", "plugin", "class", "distribution", "backend")}
        facts |= kit["hsm"] or {}
        yield _table(("fact", "value"), [(_plain(name), value) for name, value in facts.items()])
        if kit["capabilities"]:
            yield from _capability_parts(kit["capabilities"])
        yield "### Results"
        yield _table(
            ("part of the kit", "wrapping algorithm", "key spec", _PASSED, _FAILED, _SKIPPED),
            [tuple(row.values()) for row in kit["results"]],
        )
        if kit["failures"]:
            yield "### Failures"
            yield _table(("test", "failure"), [tuple(each.values()) for each in kit["failures"]])
        if kit["skips"]:
            yield "### What was not tested"
            yield _table(
                ("reason", "count", "tests"),
                [(e["reason"], e["count"], ", ".join(e["tests"])) for e in kit["skips"]],
            )


def _capability_parts(report: Document) -> Iterator[str]:
    yield "### What it says that it can do"
    columns = ("wrapping_algorithm", "protection_level", "exposure", "custody", "by", "why")
    yield _table(
        [_plain(each) for each in columns],
        [[row[each] for each in columns] for row in report["wrapping"]],
    )
    yield _table(
        ("key spec", "usable", "custody"), [tuple(each.values()) for each in report["keys"]]
    )
    if report["protections"]:
        named = ("name", "outcome", "control", "consequence")
        yield _table(named, [[each[c] for c in named] for each in report["protections"]])
    notes = list(report["notes"])
    if not report["production"]:
        notes.insert(0, "It is for development, not for production.")
    if notes:
        yield _list(notes)


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {each}" for each in items)


def _table(headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines: list[Sequence[Any]] = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = "-" if value in (None, "") else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
