"""What code, tests and documents cite by number is in the documents, once and in order."""

import re
from pathlib import Path

from support.documents import ROOT, text_of

NUMBERS = r"(\d+(?:(?:, | and |, and | or | to )\d+)*)"
CITATION = re.compile(
    rf"\b(field notes?|(?:design )?invariants?)\s+(?:# )?{NUMBERS}", re.IGNORECASE
)
HEADINGS = {
    "field note": (ROOT / "docs" / "field-notes.md", r"^### Field note (\d+): \S"),
    "invariant": (ROOT / "docs" / "architecture.md", r"^### Design invariant (\d+): \S"),
}


def cited(text):
    """(kind, number) of each citation; line breaks, and the # of a comment, do not hide one."""
    text = re.sub(r"\s*\n\s*(?:#\s*)?", " ", text)
    for what, numbers in CITATION.findall(text):
        kind = "field note" if what.lower().startswith("field") else "invariant"
        for number in re.findall(r"\d+", numbers):
            yield kind, int(number)


def numbered(kind):
    document, heading = HEADINGS[kind]
    return [int(number) for number in re.findall(heading, text_of(document), re.MULTILINE)]


def files():
    for place in ("hsmwrap", "tests", "docs", "scripts", "softhsm", "."):
        listed = (ROOT / place).glob("*") if place == "." else (ROOT / place).rglob("*")
        for path in listed:
            if path.is_file() and "__pycache__" not in path.parts and path != Path(__file__):
                yield path


def test_every_citation_has_its_heading():
    there = {(kind, number) for kind in HEADINGS for number in numbered(kind)}
    missing = {
        f"{path.relative_to(ROOT)}: {kind} {number}"
        for path in files()
        for kind, number in cited(path.read_text("utf-8", errors="replace"))
        if (kind, number) not in there
    }
    assert not missing


def test_numbers_are_given_once_and_in_order():
    for kind in HEADINGS:
        assert numbered(kind) == list(range(1, 1 + len(numbered(kind))))


def test_citations_are_found():
    text = "see field note 17, and field\n    # notes 3 and 41; design invariant 1; invariants 2, 4"
    assert set(cited(text)) == {
        ("field note", 17),
        ("field note", 3),
        ("field note", 41),
        ("invariant", 1),
        ("invariant", 2),
        ("invariant", 4),
    }


def test_what_the_package_says_was_measured_cites_its_note():
    said = re.compile(r"\([^()]*\bmeasured\b[^()]*\)")
    bare = [
        f"{path.relative_to(ROOT)}: {found}"
        for path in sorted((ROOT / "hsmwrap").rglob("*.py"))
        for found in said.findall(text_of(path))
    ]
    assert not bare, "say (field note N), and add the note to docs/field-notes.md"
