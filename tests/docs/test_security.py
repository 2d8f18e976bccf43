"""SECURITY.md: beside each promise stands the test that shows it."""

import re

from support.documents import ROOT, section_of, text_of

SECURITY = ROOT / "SECURITY.md"
TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
PROMISE = re.compile(r"\b(never|refuses|is refused|ignored|nothing|no key)\b")
PARTS = {
    "client",
    "proxy",
    "KMS process",
    "database",
    "audit log",
    "HSM token",
    "operator with the user PIN",
    "security officer",
}


def rows(table):
    for line in table.splitlines():
        if line.startswith("| ") and not line.startswith("|--"):
            yield [cell.strip() for cell in line.strip("| ").split(" | ")]


def missing(text):
    """What is named as a test and is none."""
    for file, name in TEST.findall(text):
        path = ROOT / file
        if not path.exists() or (name and f"def {name}(" not in text_of(path)):
            yield f"{file}::{name}"


def test_each_named_test_is_there():
    assert list(missing(text_of(SECURITY))) == []
    assert list(missing("`tests/docs/test_security.py::test_no` `tests/no.py`")) == [
        "tests/docs/test_security.py::test_no",
        "tests/no.py::",
    ]


def test_each_part_says_what_it_cannot_do_and_names_the_test():
    header, *table = rows(section_of(SECURITY, "The parts, and what each can do"))
    assert header[-1] == "cannot do, and the test"
    assert {row[0] for row in table} == PARTS
    for row in table:
        # The KMS process and the holder of the PIN: by the tests of the sections below.
        below = {"KMS process", "HSM token", "operator with the user PIN"}
        assert row[0] in below or TEST.search(row[-1]), row[0]


def test_each_attack_on_the_audit_log_names_its_test():
    header, *table = rows(section_of(SECURITY, "The audit log"))
    assert header == ["attack", "what happens", "test"]
    assert all(TEST.search(row[-1]) for row in table)


def test_each_section_of_promises_names_tests():
    for section in ("Who the attacker is", "Exposure"):
        for paragraph in section_of(SECURITY, section).split("\n\n"):
            if PROMISE.search(paragraph) and not re.search(r"(?i)padding|PKCS#1", paragraph):
                assert TEST.search(paragraph), paragraph
