"""The kit itself: each plug-in that breaks a promise is caught. The honest one: test_memory.py."""

from collections import defaultdict
from pathlib import Path

import pytest
from support.backends.honest import Sm4Only
from support.backends.honest_kit import BareKit, HonestKit
from support.backends.mutants import MUTANTS

from hsmwrap.errors import HsmwrapError

pytestmark = pytest.mark.slow

# What a test of the kit fails with; anything else is a mutant that does not work as meant.
VERDICTS = (AssertionError, pytest.fail.Exception, HsmwrapError, ValueError)


class TestSm4Only(HonestKit):
    plugin = Sm4Only


class Jury:
    """A pytest plug-in: of each mutant's kit only the test that has to fail, and how it did."""

    def __init__(self):
        self.verdicts = defaultdict(list)

    def pytest_pycollect_makeitem(self, collector, name):
        spoiled = getattr(getattr(collector, "cls", None), "spoiled", None)
        return [] if spoiled and name != spoiled.test else None

    def pytest_runtest_makereport(self, item, call):
        if call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception):
            self.verdicts[item.cls.__name__].append(call.excinfo.value)


@pytest.fixture(scope="module")
def verdicts():
    jury = Jury()
    kit = Path(__file__).parents[1] / "support/backends/kit_over_mutants.py"
    options = ["-s", "--noconftest", "-o", "addopts="]
    options += ["-p", "no:cacheprovider", "-p", "no:terminal", "-p", "no:faulthandler"]
    assert pytest.main([*options, str(kit)], plugins=[jury]) == pytest.ExitCode.TESTS_FAILED
    return jury.verdicts


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_the_kit_catches(mutant, verdicts):
    """Behind the guard; one that the guard makes harmless, without it."""
    kit = BareKit if mutant.repaired else HonestKit
    raised = verdicts[f"Test{kit.__name__}{mutant.backend.__name__}"]
    assert raised, f"{mutant.test} passed"
    assert [error for error in raised if not isinstance(error, VERDICTS)] == []


@pytest.mark.parametrize("mutant", [m for m in MUTANTS if m.repaired], ids=str)
def test_the_guard_makes_harmless(mutant, verdicts):
    assert not verdicts[f"TestHonestKit{mutant.backend.__name__}"]
