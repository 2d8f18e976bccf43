"""Plain technical English: words and phrases that this repository does not use."""

import re

import pytest
from support.documents import DOCUMENTS, ROOT, name_of, text_of

PLACES = ("hsmwrap", "scripts", "softhsm", "tests", "docs", "examples")
SUFFIXES = frozenset({".c", ".h", ".md", ".py", ".sh", ".template", ".toml"})
SCRIPTS = frozenset({"scripts", "softhsm"})  # their programs have no suffix
BANNED = {
    r"(who|some|any|every)body|nobody|whoever": "name the actor: the caller, a client, a process",
    r"(is|are|was|were)\s+no\s+(?!longer\b)[a-z]+": "is not a, has no, without, no … exists",
    "away": "unavailable, unreachable, removed",
    r"\w*doom\w*|condemned|needy|laden": "schedule destruction, wants refill, has discards",
    r"rehears\w*|arena|weather": "demo runner, load target, fault schedule",
    "present life|without_frames|sleep_about": "initialisation generation, strip tracebacks",
}
# A Unix user.
ALLOWED = frozenset({("tests/support/services/postgres.py", "nobody")})


def found_in(text):
    for pattern, instead in BANNED.items():
        for match in re.finditer(rf"\b({pattern})\b", text, re.IGNORECASE):
            yield match, instead


def files():
    yield from (path for path in DOCUMENTS if path.parent == ROOT)
    yield ROOT / "pyproject.toml"
    for place in PLACES:
        for path in sorted((ROOT / place).rglob("*")):
            is_script = not path.suffix and path.parent.name in SCRIPTS
            if path.is_file() and (is_script or path.suffix in SUFFIXES):
                yield path


def test_banned_words_are_not_used():
    found = []
    for path in files():
        if path.name == "test_wording.py":
            continue
        text = text_of(path)
        for match, instead in found_in(text):
            if (name_of(path), match[0]) not in ALLOWED:
                line = text.count("\n", 0, match.start()) + 1
                found.append(f"{name_of(path)}:{line}: {match[0]!r}; better: {instead}")
    assert found == []


@pytest.mark.parametrize(
    "text",
    ["Whoever asks", "for anybody's use", "it is no key", "there are\nno keys", "The HSM is away"],
)
def test_a_banned_word_is_found(text):
    assert list(found_in(text))


@pytest.mark.parametrize("text", ["it is no longer valid", "always", "everyone", "has no key"])
def test_other_words_are_not(text):
    assert not list(found_in(text))
