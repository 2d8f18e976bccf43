"""Skips are counted and compared with a list: a new one fails the run, and so does a lost one.

The list is tests/expected_skips.toml. A skip is expected if its test and its reason match an entry
(shell patterns). ``always = true``: the skip happens on every machine that the tests run on, so a
whole run without it fails too: the capability is there now.

The workers of pytest-xdist send their reports to the controller, and only that one counts.
"""

import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from support import fast

LIST = Path(__file__).parents[1] / "expected_skips.toml"


@dataclass(frozen=True)
class Expected:
    test: str
    reason: str
    always: bool = False

    def matches(self, test, reason):
        return fnmatchcase(test, self.test) and fnmatchcase(reason, self.reason)


class SkipList:
    """The pytest plug-in."""

    def __init__(self, expected, *, whole_run):
        self.expected = expected
        self.whole_run = whole_run
        self.skipped = []

    def pytest_runtest_logreport(self, report):
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2].removeprefix("Skipped: ")
            if reason != fast.LEFT_OUT:
                self.skipped.append((report.nodeid, reason))

    def unexpected(self):
        return [skip for skip in self.skipped if not any(e.matches(*skip) for e in self.expected)]

    def lost(self):
        """Entries that every machine should show and this whole run did not."""
        if not self.whole_run:
            return []
        return [
            e for e in self.expected if e.always and not any(e.matches(*s) for s in self.skipped)
        ]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session, exitstatus):
        if exitstatus == pytest.ExitCode.OK and (self.unexpected() or self.lost()):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("skips against the list")
        unexpected, lost = self.unexpected(), self.lost()
        for test, reason in unexpected:
            terminalreporter.line(f"UNEXPECTED SKIP {test}: {reason}", red=True)
        for entry in lost:
            terminalreporter.line(f"EXPECTED SKIP THAT DID NOT HAPPEN {entry}", red=True)
        terminalreporter.line(
            f"{len(self.skipped)} skipped: {len(self.skipped) - len(unexpected)} expected, "
            f"{len(unexpected)} not; {len(lost)} expected ones did not happen"
        )


def expected_skips():
    return [Expected(**entry) for entry in tomllib.loads(LIST.read_text())["skip"]]


def register(config):
    """Watch this run; a run of a selection cannot tell what is lost."""
    if hasattr(config, "workerinput"):
        return
    option = config.option
    selected = option.keyword or option.markexpr or option.collectonly or option.fast
    selected = selected or config.getoption("lf", default=False)
    whole = not selected and config.args_source is not config.ArgsSource.ARGS
    config.pluginmanager.register(SkipList(expected_skips(), whole_run=whole), "skip-list")
