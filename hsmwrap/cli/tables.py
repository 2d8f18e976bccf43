"""Output as aligned plain text, as Markdown and as JSON."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from typing import Any

_GAP = "  "


def render(
    headings: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[str] = ()
) -> str:
    """Lay out a table in plain text, without a trailing newline.

    Args:
        headings: One for each column.
        rows: Cells as text, as many as there are headings.
        right: Headings of the right-aligned columns.
    """
    lines = [tuple(headings), *(tuple(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rights = [heading in right for heading in headings]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(_line(line, widths, rights) for line in lines)


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The same in Markdown."""
    lines = [tuple(headings), ("---",) * len(headings), *(tuple(row) for row in rows)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    )


def to_json(document: Any) -> str:
    """Serialise as JSON: indented by two spaces, keys in insertion order."""
    return json.dumps(document, indent=2, ensure_ascii=False)


def _line(cells: Sequence[str], widths: Sequence[int], rights: Sequence[bool]) -> str:
    return _GAP.join(
        cell.rjust(width) if right else cell.ljust(width)
        for cell, width, right in zip(cells, widths, rights, strict=True)
    ).rstrip()
