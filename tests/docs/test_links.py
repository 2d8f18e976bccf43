"""Links between the documents lead somewhere, and what the documents name exists."""

import importlib.util
import re
import tomllib
from urllib.parse import unquote

import pytest
from support.documents import DOCUMENTS, ROOT, anchors_of, name_of, prose_of, text_of

LINK = re.compile(r"(?<!!)\[[^]]*\]\(\s*<?([^)>\s]+)>?\s*\)")
PATH = re.compile(r"`((?:hsmwrap|tests|scripts|softhsm|docs|\.ci)/[^`\s*<>]*|[A-Z]+\.md)`")
MODULE = re.compile(r"\bhsmwrap(?:\.[A-Za-z_]\w*)+")
EXTRA = re.compile(r"hsmwrap\[([\w,]+)\]")
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)


def broken_links(document, text):
    for link in LINK.findall(text):
        path, _, anchor = unquote(link).partition("#")
        target = (document.parent / path).resolve() if path else document
        if not (re.match(r"[a-z]+:", link) or _leads_to(target, anchor)):
            yield link


def _leads_to(target, anchor):
    return target.exists() and (not anchor or anchor in anchors_of(target))


def missing_paths(text):
    """Paths are those of the repository, wherever the document is; ``::test_name`` may follow."""
    for path in PATH.findall(text):
        name, _, test = path.partition("::")
        file = ROOT / name
        if not file.exists() or (test and f"def {test}(" not in text_of(file)):
            yield path


def missing_names(text):
    """Dotted names that are neither a module nor in one."""
    for name in dict.fromkeys(MODULE.findall(text)):
        if not _is_there(name):
            yield name


def _is_there(name):
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.util.find_spec(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        if found is None:
            continue
        thing = importlib.import_module(".".join(parts[:length]))
        for part in parts[length:]:
            if not hasattr(thing, part):
                return False
            thing = getattr(thing, part)
        return True
    return False


@each_document
def test_every_link_leads_somewhere(document):
    assert list(broken_links(document, prose_of(document))) == []


@each_document
def test_every_path_is_there(document):
    assert list(missing_paths(prose_of(document))) == []


@each_document
def test_every_module_and_every_name_in_one_is_there(document):
    # Loggers, metrics, configuration files and entry points have names of the same form.
    foreign = {"hsmwrap.backends", "hsmwrap.db", "hsmwrap.service", "hsmwrap.toml"}
    assert set(missing_names(prose_of(document))) <= foreign


@each_document
def test_every_extra_is_there(document):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    named = {extra for found in EXTRA.findall(text_of(document)) for extra in found.split(",")}
    assert named <= project["optional-dependencies"].keys()


def test_what_is_not_there_is_found():
    readme = ROOT / "README.md"
    links = "[a](docs/no.md) [b](#no-such) [c](LICENSE) [d](SECURITY.md#no-such) [e](https://x.org)"
    assert list(broken_links(readme, links)) == ["docs/no.md", "#no-such", "SECURITY.md#no-such"]
    paths = "`hsmwrap/no.py` `hsmwrap/errors.py` `NO.md` `tests/docs/test_links.py::test_no`"
    assert list(missing_paths(paths)) == [
        "hsmwrap/no.py",
        "NO.md",
        "tests/docs/test_links.py::test_no",
    ]
    names = "hsmwrap.no.such hsmwrap.errors hsmwrap.errors.HsmError hsmwrap.errors.NoSuch.code"
    assert list(missing_names(names)) == ["hsmwrap.no.such", "hsmwrap.errors.NoSuch.code"]
