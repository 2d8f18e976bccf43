"""The doctor's report: one document, which is printed as JSON, as plain text or as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from hsmwrap.backend import FailedTrial, Outcome
from hsmwrap.cli import tables
from hsmwrap.cli.doctor_examination import Findings, Key, Row

_WIDTH = 96
Document = dict[str, Any]
_Table = tuple[Sequence[str], Iterable[Sequence[str]]]


def of_findings(findings: Findings) -> Document:
    """What the examination found, for machines."""
    report = findings.capabilities
    return {
        "name": report.backend,
        "protection_levels": sorted(report.protection_levels),
        "production": report.production,
        "rows": [_row(row) for row in findings.rows],
        "keys": [_key(key) for key in findings.keys],
        "protections": [asdict(protection) for protection in report.protections],
        "failed": [_trial(trial) for trial in report.failed],
        "notes": list(report.notes),
        "threads": findings.threads,
        "import_tokens": {"failure": findings.import_tokens},
        "fork": {"failure": findings.fork},
        "health": findings.health,
        "durations": [asdict(duration) for duration in findings.durations],
    }


def _row(row: Row) -> Document:
    served = row.capability
    return {
        "wrapping_key_spec": row.spec,
        "wrapping_algorithm": row.algorithm,
        "served": served is not None,
        "exposure": served and served.exposure,
        "custody": served and served.custody,
        "path": served and served.path,
        "reason": row.reason,
        "tried": [_trial(trial) for trial in row.tried],
        "failure": row.failure,
        "issue_ms": row.issue_ms,
        "import_ms": row.import_ms,
    }


def _key(key: Key) -> Document:
    return {
        "key_spec": key.capability.key_spec,
        "usable": key.capability.usable,
        "custody": key.capability.custody,
        "outcome": key.outcome,
        "failure": key.failure,
    }


def _trial(trial: FailedTrial) -> Document:
    return asdict(trial) | {"answer": trial.answer}


# --- for people ----------------------------------------------------------------------------------


def as_text(document: Document) -> str:
    """The report in plain text."""
    return _render(document, "{}", tables.render, _filled)


def as_markdown(document: Document) -> str:
    """The report in Markdown, for a ticket."""
    return _render(document, "## {}", tables.markdown, _listed)


def _render(
    document: Document,
    heading: str,
    table: Callable[[Sequence[str], Iterable[Sequence[str]]], str],
    item: Callable[[str], str],
) -> str:
    parts = []
    for title, content in _sections(document):
        parts.append(heading.format(title))
        if isinstance(content, tuple):
            parts[-1] += "\n\n" + table(*content)
        else:
            parts[-1] += "\n\n" + "\n".join(map(item, content))
    return "\n\n".join(parts)


def _filled(text: str) -> str:
    first, *more = map(str.strip, text.split("\n"))
    lines = [textwrap.fill(f"- {first}", _WIDTH, subsequent_indent="  ")]
    lines += (textwrap.fill(f"  - {line}", _WIDTH, subsequent_indent="    ") for line in more)
    return "\n".join(lines)


def _listed(text: str) -> str:
    return "- " + "\n  - ".join(map(str.strip, text.split("\n")))


def _sections(document: Document) -> Iterator[tuple[str, _Table | list[str]]]:
    yield "Verdict", _verdict(document)
    run = {name: document[name] for name in ("hsmwrap", "at", "python", "platform")}
    yield "Backend", _facts(run | document["backend"])
    titles = {"module": "PKCS#11 module", "token": "HSM token", "profile": "Vendor profile"}
    for name, title in titles.items():
        if document[name]:
            yield title, _facts(document[name])
    if document["mechanisms"]:
        columns = ("mechanism", "listed", "for", "in the profile")
        yield "Mechanisms of the vendor's own", (columns, map(_mechanism, document["mechanisms"]))
    if document["key_sets"]:
        sets = [(s["key_set"], _yes(s["current"]), s["detail"]) for s in document["key_sets"]]
        yield "Key sets", (("key set", "current", "detail"), sets)
    examined = document["examination"]
    if examined:
        yield from _examined(examined)
    if examined or document["objects"]["before"] is not None:
        yield "What is left", [_left(document["objects"])]


def _examined(examined: Document) -> Iterator[tuple[str, _Table | list[str]]]:
    rows = examined["rows"]
    yield (
        "Compatibility table",
        (
            ("wrapping key spec", "wrapping algorithm", "exposure", "custody", "path", "import"),
            [
                (
                    row["wrapping_key_spec"],
                    row["wrapping_algorithm"],
                    row["exposure"] or "-",
                    row["custody"] or "-",
                    row["path"] or "not served",
                    _import(row),
                )
                for row in rows
            ],
        ),
    )
    # The same trial may have been made for several key specs.
    reasons = dict.fromkeys(
        f"{row['wrapping_algorithm']}: {reason}"
        for row in rows
        for reason in filter(None, (row["reason"], *map(_tried, row["tried"])))
    )
    if reasons:
        yield "Why not in_hsm", list(reasons)
    keys = [
        (k["key_spec"], _yes(k["usable"]), k["custody"], k["failure"] or k["outcome"])
        for k in examined["keys"]
    ]
    yield "Key specs", (("key spec", "usable", "custody", "tried"), keys)
    if examined["protections"]:
        yield "Protections", [_protection(each) for each in examined["protections"]]
    if examined["failed"]:
        yield "What does not work", [_tried(trial) for trial in examined["failed"]]
    said = tuple(f"{each['name']} is " for each in examined["protections"])
    if notes := [note for note in examined["notes"] if not note.startswith(said)]:
        yield "Notes", notes
    threads, fork = examined["threads"], examined["fork"]["failure"]
    one, several = (threads.get(f"calls_per_second_of_{who}", "-") for who in ("one", "all"))
    yield (
        "Threads and fork",
        [
            f"calls per second: {one} by one thread, {several} by {threads['threads']}",
            f"threads: {threads['failure'] or 'every answer was right'}",
            f"fork: {fork or 'the child used the HSM, and so did its parent meanwhile'}",
        ],
    )
    yield "Sessions", _facts(examined["health"])
    durations = [
        (d["operation"], f"{d['median_ms']:.2f}", str(d["runs"])) for d in _durations(examined)
    ]
    yield "Durations", (("operation", "median ms", "runs"), durations)


def _durations(examined: Document) -> list[Document]:
    named = {"issue_ms": "make a wrapping key", "import_ms": "import"}
    of_rows = [
        {"operation": f"{what}, {row['wrapping_algorithm']}", "median_ms": row[name], "runs": 1}
        for row in examined["rows"]
        for name, what in named.items()
        if row[name] is not None
    ]
    return [*examined["durations"], *of_rows]


def _verdict(document: Document) -> list[str]:
    verdict = document["verdict"]
    if verdict["cannot_run"]:
        return [f"CANNOT RUN: {verdict['cannot_run']}"]
    if verdict["broken"]:
        return [f"NOT KEPT: {each}" for each in verdict["broken"]]
    examined = document["examination"]
    met = [f"met: {each['requirement']}" for each in document["requirements"]]
    unserved = [
        f"{row['wrapping_key_spec']} with {row['wrapping_algorithm']} is not served: "
        "see Why not in_hsm"
        for row in examined["rows"]
        if not row["served"]
    ]
    unusable = [
        f"{key['key_spec']} cannot be used: see Key specs"
        for key in examined["keys"]
        if not key["usable"]
    ]
    failed = ["some trials failed: see What does not work"] if examined["failed"] else []
    weak = [
        f"{each['name']} is {each['outcome']}: see Protections"
        for each in examined["protections"]
        if each["outcome"] != Outcome.HONOURED
    ]
    kept = "every promise of the capability report was kept"
    return [kept, *met, *unserved, *unusable, *failed, *weak]


def _facts(facts: Mapping[str, Any]) -> _Table:
    return ("fact", "value"), [(name.replace("_", " "), _value(v)) for name, v in facts.items()]


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return _yes(value)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {each}" for name, each in value.items()) or "-"
    return str(value) or "-"


def _mechanism(each: Document) -> list[str]:
    names = (each["mechanism"], each["listed"], each["for"], each["profile"])
    return [*map(_value, names)]


def _tried(trial: Document) -> str:
    consequence = f" ({trial['consequence']})" if trial["consequence"] else ""
    return f"{trial['step']}: {trial['answer']}{consequence}"


def _protection(tried: Document) -> str:
    sentence = f"{tried['name']}: {tried['outcome']}. {tried['control']} {tried['consequence']}"
    return sentence.rstrip()


def _import(row: Document) -> str:
    if not row["served"]:
        return "-"
    return "FAILED" if row["failure"] else "done"


def _left(objects: Document) -> str:
    if objects["before"] is None:
        return "not counted: the contract has no way to list a plug-in's objects"
    if not objects["left"]:
        return (
            f"nothing: {objects['before']} token objects before and {objects['after']} after, "
            "the same ones"
        )
    return f"{objects['before']} token objects before, {objects['after']} after; new are " + (
        ", ".join(objects["left"])
    )


def _yes(value: bool) -> str:  # noqa: FBT001  # a table's cell
    return "yes" if value else "no"
