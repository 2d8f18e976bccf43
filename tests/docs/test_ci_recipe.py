"""The recipe for an embedder's CI in docs/testing.md: its test runs, by its commands."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import metadata
from pathlib import Path

import pytest
import yaml
from support.documents import ROOT, section_of

import pytest_hsmwrap

SECTION = section_of(ROOT / "docs/testing.md", "In your own CI")
FILES = dict(re.findall(r"^```\w+\n# (\S+)\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL))
GITHUB = yaml.safe_load(FILES[".github/workflows/test.yml"])["jobs"]["test"]
GITLAB = yaml.safe_load(FILES[".gitlab-ci.yml"])["test"]
COMMANDS = GITLAB["script"]
ENVIRONMENT = GITLAB["variables"]


def test_both_run_the_same():
    steps = [step["run"].removeprefix("sudo ") for step in GITHUB["steps"] if "run" in step]
    assert steps == COMMANDS
    assert GITHUB["env"] == ENVIRONMENT


def test_it_fails_without_softhsm():
    assert ENVIRONMENT == {"HSMWRAP_REQUIRE_SOFTHSM": "1"}


def test_the_python_version_is_supported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (setup,) = [step["with"] for step in GITHUB["steps"] if "setup-python" in step.get("uses", "")]
    version = setup["python-version"]
    assert GITLAB["image"].startswith(f"python:{version}-")
    assert f"Programming Language :: Python :: {version}" in project["classifiers"]


@pytest.mark.slow
def test_the_packages_exist():
    update, install, pip, _ = COMMANDS
    assert update == "apt-get update"
    if shutil.which("apt-get"):
        subprocess.run([*install.split(), "--simulate"], check=True, capture_output=True)
    assert pip == "python -m pip install './hsmwrap[testing]'"
    assert "testing" in metadata("hsmwrap").get_all("Provides-Extra")


def test_the_test_passes_by_the_command(hsmwrap_softhsm, tmp_path):
    (tmp_path / "test_import.py").write_text(FILES["test_import.py"])
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    clean = {n: v for n, v in os.environ.items() if not re.match("HSMWRAP_|SOFTHSM2|PY", n)}
    done = subprocess.run(
        [*COMMANDS[-1].split(), "-W", "error"],
        cwd=tmp_path,
        env=clean | ENVIRONMENT | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert " 2 passed" in done.stdout


def test_the_table_lists_all_fixtures():
    names = re.findall(r"^\| `(hsmwrap_\w+)` \| (\w+) \|", SECTION, re.MULTILINE)
    fixtures = {
        name: value
        for name, value in vars(pytest_hsmwrap).items()
        if isinstance(value, type(pytest_hsmwrap.hsmwrap_softhsm))
    }
    scopes = {name: value._fixture_function_marker.scope for name, value in fixtures.items()}
    assert dict(names) == scopes
