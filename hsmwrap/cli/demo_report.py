"""The demo's report: two tables and a paragraph, or one JSON document."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from hsmwrap.backend import Capabilities
from hsmwrap.cli import tables
from hsmwrap.cli.demo_runner import Row

_WIDTH = 96
_COMBINATION = ("wrapping key spec", "wrapping algorithm", "level")
_EXPOSURE = """\
Exposure: where the key material was in plaintext during its import. in_hsm: only inside the HSM, \
which unwrapped the client's ciphertext itself. host: also, for a moment, in the memory of this \
process, because the key is a software key, or because the HSM token has no mechanism for the \
whole unwrapping. If host is not acceptable for keys of protection level HSM, require in_hsm in \
the configuration; such combinations are then refused before a key is generated."""


def all_ok(rows: Iterable[Row]) -> bool:
    """Whether every row gave the result that the compatibility table says."""
    return all(row.failure is None for row in rows)


def document(rows: Sequence[Row]) -> dict[str, Any]:
    """The report for machines."""
    return {"rows": [row.to_json() for row in rows], "ok": all_ok(rows)}


def announcement(capabilities: Capabilities) -> str:
    """One line about a backend: the levels it serves, and whether it is for production."""
    levels = " and ".join(sorted(capabilities.protection_levels))
    kind = "" if capabilities.production else ", not for production"
    return f"backend {capabilities.backend} for protection level {levels}{kind}"


def progress(row: Row) -> str:
    """The end of a row's progress line."""
    by = f"by {row.client}: " if row.client else ""
    return f"{by}{row.outcome}" + (f" - FAILED: {row.failure}" if row.failure else "")


def text(rows: Sequence[Row], capabilities: Iterable[Capabilities]) -> str:
    """The report for people."""
    allowed = [row for row in rows if row.allowed]
    refused = [row for row in rows if not row.allowed]
    return "\n\n".join(
        [
            "Allowed: issue, encrypt by the client, import, use the key",
            _allowed_table(allowed),
            "Refused: nothing is generated",
            _refused_table(refused),
            _fill(_EXPOSURE),
            *(_backend_notes(capability) for capability in capabilities),
            _summary(rows),
        ]
    )


def _allowed_table(rows: Iterable[Row]) -> str:
    return tables.render(
        (
            *_COMBINATION,
            "backend",
            "client",
            "outcome",
            "exposure",
            "issue ms",
            "import ms",
            "keys",
        ),
        [
            (
                *row.combination,
                row.backend,
                row.client or "-",
                row.outcome,
                row.exposure or "-",
                _ms(row.issue_ms),
                _ms(row.import_ms),
                _keys(row),
            )
            for row in rows
        ],
        right=("issue ms", "import ms"),
    )


def _refused_table(rows: Iterable[Row]) -> str:
    return tables.render(
        (*_COMBINATION, "outcome", "code", "rule"),
        [(*row.combination, row.outcome, row.code or "-", row.rule or "-") for row in rows],
    )


def _backend_notes(capabilities: Capabilities) -> str:
    heading = announcement(capabilities).replace("backend", "Backend", 1)
    return "\n".join([heading, *(_fill(f"- {note}") for note in capabilities.notes)])


def _summary(rows: Sequence[Row]) -> str:
    failed = [row for row in rows if row.failure is not None]
    if not failed:
        unserved = sum(row.outcome == "not served" for row in rows)
        but = f"; {unserved} of them are allowed, and not served here" if unserved else ""
        return f"ok: all {len(rows)} rows did what the compatibility table says{but}"
    lines = [
        f"- {' '.join(row.combination)}, {row.client or 'no client'}: {row.failure}"
        for row in failed
    ]
    return "\n".join([f"FAILED: {len(failed)} of {len(rows)} rows did not", *lines])


def _ms(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds:.1f}"


def _keys(row: Row) -> str:
    used = (f"{spec.removeprefix('Aliyun_')} {use}" for spec, use in row.key_specs.items())
    return ", ".join(used) or "-"


def _fill(paragraph: str) -> str:
    return textwrap.fill(paragraph, _WIDTH, subsequent_indent="  " if paragraph[0] == "-" else "")
