"""One run of the kit by pytest: its options, and the report that it ends with.

``pytest_hsmwrap`` registers a :class:`KitRun` as a pytest plug-in where an option is given.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hsmwrap import registry
from hsmwrap.backend import Backend, KeepsTrialsApart, ManagesKeySets
from hsmwrap.errors import ConfigurationError, HsmwrapError
from hsmwrap.privatefile import PrivateFile
from hsmwrap.settings import read_settings
from hsmwrap.testing._conformance.report import (
    WRITERS,
    Kit,
    Result,
    as_lines,
    document_of,
    topic_of,
)

NAME = "hsmwrap-kit"
"""What pytest calls the :class:`KitRun`."""


@dataclass(frozen=True, slots=True)
class Target:
    """A backend that the options name: settings, and the file with the security officer's PIN."""

    settings: Mapping[str, Any] = field(repr=False)
    so_pin_file: str | None


class KitRun:
    """The options of one run, and what became of its tests."""

    def __init__(self, config: pytest.Config) -> None:
        """Read and check the options.

        Raises:
            UsageError: One is wrong, or one that belongs to it is missing.
        """

        def option(name: str) -> Any:
            return config.getoption(f"hsmwrap_{name}")

        self.plugin: str | None = option("backend")
        self.files = [_report_file(each) for each in option("report") or ()]
        self.first = Target({}, None)
        self.other: Target | None = None
        self._kits: dict[type, Kit] = {}
        if (self.plugin is None) != (option("settings") is None):
            raise pytest.UsageError(
                "--hsmwrap-backend NAME and --hsmwrap-settings FILE.toml are given together; for a "
                "backend without settings, FILE.toml is empty"
            )
        if self.plugin is None:
            for name in ("so_pin_file", "clone_settings", "clone_so_pin_file"):
                if option(name) is not None:
                    raise pytest.UsageError(
                        f"{_spelled(name)} is for a plug-in that --hsmwrap-backend names"
                    )
            return
        if getattr(config.option, "numprocesses", None):
            raise pytest.UsageError(
                "the kit counts the objects in the HSM, so it takes one process: leave out -n"
            )
        try:
            self.plugin_class = registry.load(self.plugin)
            self.first = self._target(option, "settings", "so_pin_file")
            if option("clone_settings") is not None:
                if not issubclass(self.plugin_class, KeepsTrialsApart):
                    raise pytest.UsageError(
                        f"--hsmwrap-clone-settings: {self.plugin} does not keep trials apart "
                        "(KeepsTrialsApart), so the kit cannot empty the second HSM for each test; "
                        "subclass BackendConformance and override its fixture other_settings"
                    )
                self.other = self._target(option, "clone_settings", "clone_so_pin_file")
        except HsmwrapError as error:
            raise pytest.UsageError(str(error)) from None

    def _target(self, option: Any, settings: str, so_pin_file: str) -> Target:
        """What two options name, checked as far as that goes without the HSM."""
        assert self.plugin is not None  # noqa: S101  # for mypy
        read = read_settings(Path(option(settings)), _spelled(settings))
        registry.check_settings(self.plugin, read)
        if file := option(so_pin_file):
            PrivateFile(file, _spelled(so_pin_file)).read_erasable()
        return Target(read, file)

    # --- for the fixtures --------------------------------------------------------------------

    @contextmanager
    def key_sets(self, target: Target, *, make: bool) -> Iterator[Mapping[str, Any]]:
        """Settings for key sets of the run's own, which are destroyed at the end.

        The settings of ``target`` where the plug-in cannot keep trials apart.

        Args:
            target: What the options name.
            make: Whether to make a key set.
        """
        plugin, given = self.plugin_class, target.settings
        own = given
        if issubclass(plugin, KeepsTrialsApart):
            with suppress(ConfigurationError):  # a keyring in memory
                own = plugin.trial_settings(given)
        if own is given or not issubclass(plugin, KeepsTrialsApart):  # the second for mypy
            yield given
            return
        try:
            if make and issubclass(plugin, ManagesKeySets):
                with required("its key set cannot be made"):
                    plugin.initialise_keys(own, so_pin_file=target.so_pin_file)
            yield own
        finally:
            plugin.end_trial(own)

    # --- hooks of pytest ---------------------------------------------------------------------

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        """A test that is left out makes the report incomplete."""
        for item in items:
            if kit := self._kit(item):
                kit.left_out += 1

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """How many tests there are."""
        for item in session.items:
            if kit := self._kit(item):
                kit.selected += 1

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Generator[None, None, None]:
        """Look at the first backend that a test got."""
        yield
        kit, found = self._kit(item), getattr(item, "funcargs", {})
        if kit and isinstance(backend := found.get("backend"), Backend):
            kit.look_at(backend, found.get("settings"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Note what became of a test."""
        report = yield
        if kit := self._kit(item):
            kit.note(Result.of(item, call, report))
        return report

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Write the reports."""
        document = document_of(self._kits.values())
        for file in self.files:
            try:
                file.write_text(WRITERS[file.suffix](document), "utf-8")
            except OSError as error:
                raise pytest.UsageError(f"--hsmwrap-report {file}: {error.strerror}") from None

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Show the report."""
        if not self._kits:
            return
        terminalreporter.section("hsmwrap's conformance kit")
        for line in as_lines(document_of(self._kits.values())):
            terminalreporter.line(line)
        for file in self.files:
            terminalreporter.line(f"report: {file}")

    def _kit(self, item: pytest.Item) -> Kit | None:
        """The record of a test's class; None for a test that is not the kit's."""
        tested = getattr(item, "cls", None)
        if tested is None or not topic_of(item):
            return None
        if tested not in self._kits:
            named = getattr(tested, "plugin", None) or getattr(self, "plugin_class", None)
            self._kits[tested] = Kit(tested.__name__, named)
        return self._kits[tested]


def kit_run(config: pytest.Config) -> KitRun:
    """The run over a registered plug-in; ends pytest where the options name none."""
    found = config.pluginmanager.get_plugin(NAME)
    if isinstance(found, KitRun) and found.plugin is not None:
        return found
    if not config.pluginmanager.has_plugin("hsmwrap"):
        why = "pytest has not loaded hsmwrap's plug-in: give -p pytest_hsmwrap as well"
    else:
        why = "name the plug-in: --hsmwrap-backend NAME --hsmwrap-settings FILE.toml"
    pytest.exit(why, pytest.ExitCode.USAGE_ERROR)


@contextmanager
def required(otherwise: str) -> Iterator[None]:
    """Ends pytest where what every test needs fails, so that it is said once."""
    try:
        yield
    except HsmwrapError as error:
        why = f"{otherwise}: {type(error).__name__}: {error}"
        pytest.exit(why, pytest.ExitCode.USAGE_ERROR)


def _spelled(option: str) -> str:
    return f"--hsmwrap-{option.replace('_', '-')}"


def _report_file(name: str) -> Path:
    file = Path(name)
    if file.suffix not in WRITERS:
        raise pytest.UsageError(
            f"--hsmwrap-report {file}: takes a file whose name ends with {' or '.join(WRITERS)}"
        )
    if not file.absolute().parent.is_dir():
        raise pytest.UsageError(f"--hsmwrap-report {file}: there is not such a directory")
    return file
