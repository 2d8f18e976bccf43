"""What mutation testing names is there: a sample of mutants does not see an entry that is not."""

import shlex
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hsmwrap"]["mutate"][
    "modules"
]
SURVIVORS = tomllib.loads((ROOT / "scripts/mutation_survivors.toml").read_text())["survivor"]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_and_its_tests_are_there(module):
    assert (ROOT / module).is_file()
    tests = [each for each in shlex.split(MODULES[module]) if each.startswith("tests/")]
    assert tests
    assert [each for each in tests if not (ROOT / each).exists()] == []


@pytest.mark.parametrize("survivor", SURVIVORS, ids=lambda each: f"{each['module']}-{each['in']}")
def test_the_line_of_an_explained_survivor_is_there(survivor):
    assert survivor["module"] in MODULES
    assert survivor["was"] in " ".join((ROOT / survivor["module"]).read_text().split())
