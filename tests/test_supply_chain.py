"""What is installed: by locked hashes, under known licences; and no more than is said."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distribution, requires

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.documents import ROOT

LOCKS = {path.stem: path for path in (ROOT / "requirements").glob("*.txt")}
LICENCES = LOCKS.pop("licences")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = [
    each.rpartition(" ")[2]
    for each in PROJECT["project"]["classifiers"]
    if re.search(r":: 3\.\d+$", each)
]
ENTRY = re.compile(
    r"(?P<name>[a-z0-9-]+)==(?P<version>[a-z0-9.]+)( ; (?P<marker>[^\\\n]+?))?"
    r"(?P<hashes>( \\\n    --hash=sha256:[0-9a-f]{64})+)\n"
)
EXTRAS = {
    "dev": ["dev"],
    "run": ["gmssl", "metrics", "server"],
    "bench": ["bench"],
    "fuzz": ["fuzz"],
    "tools": ["mutate", "release"],
}
# What `pip install hsmwrap` brings, and nothing else does.
CORE = {"asn1crypto", "cffi", "cryptography", "pycparser", "python-pkcs11"}


def entries(lock):
    """Each entry of a lock; nothing may stand between them."""
    text, at = LOCKS[lock].read_text(), 0
    while at < len(text):
        match = ENTRY.match(text, at)
        assert match, f"requirements/{lock}.txt: {text[at : at + 120]!r}"
        yield match
        at = match.end()


def applies(marker, python):
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    return not marker or Marker(str(marker)).evaluate(environment)


def versions(lock, python):
    """What a lock installs with this Python: versions by name."""
    return {e["name"]: e["version"] for e in entries(lock) if applies(e["marker"], python)}


# --- the locks


def test_each_lock_is_used():
    assert LOCKS.keys() == EXTRAS.keys() | {"build"}


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_is_of_names_versions_and_hashes_alone(lock):
    """No index, no path, no option, no address: nothing of the machine that it was made on."""
    names = [entry["name"] for entry in entries(lock) if not entry["marker"]]
    assert names
    assert len(names) == len(set(names))


@pytest.mark.parametrize("python", PYTHONS)
def test_all_locks_have_one_version_of_a_package(python):
    together = {}
    for lock in LOCKS:
        for name, version in versions(lock, python).items():
            assert together.setdefault(name, version) == version, f"{name} in {lock}"


def requirements(extras):
    """The requirements of the project itself, those of its extras resolved."""
    project = PROJECT["project"]
    waiting, found = [*project["dependencies"]], []
    for extra in extras:
        waiting += project["optional-dependencies"][extra]
    while waiting:
        requirement = Requirement(waiting.pop())
        if requirement.name == "hsmwrap":
            for extra in requirement.extras:
                waiting += project["optional-dependencies"][extra]
        else:
            found.append(requirement)
    return found


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", EXTRAS)
def test_a_lock_has_what_pyproject_asks_for(lock, python):
    locked = versions(lock, python)
    for requirement in requirements(EXTRAS[lock]):
        if not applies(requirement.marker, python):
            continue
        version = locked.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is not locked: run scripts/lock"
        assert version in requirement.specifier, f"{requirement}: run scripts/lock"


def test_the_build_tools_are_locked():
    locked = versions("build", PYTHONS[0])
    for text in (*PROJECT["build-system"]["requires"], *PROJECT["dependency-groups"]["build"]):
        assert locked[Requirement(text).name] in Requirement(text).specifier


def test_these_tests_run_with_what_is_locked():
    locked = versions("dev", f"{sys.version_info.major}.{sys.version_info.minor}")
    assert {name: distribution(name).version for name in locked} == locked


# --- licences


def licences():
    return dict(line.split(" ", 1) for line in LICENCES.read_text().splitlines())


def test_the_list_of_licences_has_each_locked_package():
    assert licences().keys() == {entry["name"] for lock in LOCKS for entry in entries(lock)}


def test_each_licence_is_one_that_was_decided_on():
    found = {
        (package, licence)
        for package, text in licences().items()
        for licence in re.split(" AND | OR ", text)
    }
    allowed = set(PROJECT["tool"]["hsmwrap"]["licences"]["allowed"])
    assert {each for each in found if each[1] not in allowed} == set()
    assert allowed == {licence for _, licence in found}


# --- what a plain install brings


def closure(name, seen):
    if name not in seen:
        seen.add(name)
        for text in requires(name) or ():
            requirement = Requirement(text)
            if not requirement.marker or requirement.marker.evaluate({"extra": ""}):
                closure(canonicalize_name(requirement.name), seen)
    return seen


def test_a_plain_install_brings_what_it_always_did():
    assert closure("hsmwrap", set()) - {"hsmwrap"} == CORE


def test_importing_the_package_loads_the_standard_library_alone():
    code = (
        "import sys; before = set(sys.modules); import hsmwrap; print(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert loaded - sys.stdlib_module_names == {"hsmwrap"}


# --- the wheel


def test_a_wheel_is_the_same_wherever_and_whenever_it_is_built(tmp_path):
    sums = []
    for place, mask, zone in (("one", 0o022, "UTC"), ("a/longer/one", 0o077, "Asia/Shanghai")):
        copy = tmp_path / place
        shutil.copytree(ROOT / "hsmwrap", copy / "hsmwrap", copy_function=shutil.copyfile)
        for name in ("pyproject.toml", "README.md", "LICENSE", "pytest_hsmwrap.py"):
            shutil.copyfile(ROOT / name, copy / name)
        environment = os.environ | {"SOURCE_DATE_EPOCH": "1700000000", "TZ": zone}
        command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel"]
        subprocess.run(
            command, cwd=copy, env=environment, umask=mask, check=True, capture_output=True
        )
        (wheel,) = (copy / "dist").iterdir()
        sums.append(hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert sums[0] == sums[1]
