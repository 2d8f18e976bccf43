"""The documents of this repository, as text and as the parts that the tests compare."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
_FENCE = re.compile(r"^(```|~~~).*?^\1\s*$", re.MULTILINE | re.DOTALL)


def name_of(path):
    return str(path.relative_to(ROOT))


def text_of(path):
    return path.read_text("utf-8")


def prose_of(path):
    """The text without its fenced blocks."""
    return _FENCE.sub("", text_of(path))


def anchors_of(path):
    """The anchors of a document's headings, as GitHub makes them."""
    anchors = []
    for heading in re.findall(r"^#{1,6} (.+?)\s*$", prose_of(path), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        repeated = anchors.count(anchor)
        anchors.append(f"{anchor}-{repeated}" if repeated else anchor)
    return frozenset(anchors)


def section_of(path, heading):
    """The text under a heading of the second level, without its subsections cut off."""
    found = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text_of(path), re.MULTILINE | re.DOTALL)
    assert found, f"{name_of(path)} has no heading '## {heading}'"
    return found[1]
