"""The plug-in in PLUGINS.md is found by its entry point and passes the kit, as it stands there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "PLUGINS.md").read_text("utf-8")
FILES = dict(re.findall(r"^```\w+\n# (\S+\.\w+)\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL))


@pytest.fixture
def installed(tmp_path):
    """A directory with the guide's files, installed as a distribution."""
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    info = tmp_path / "acme_hsm-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-hsm\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        FILES["pyproject.toml"]
        .replace('[project.entry-points."hsmwrap.backends"]', "[hsmwrap.backends]")
        .replace('"', "")
    )
    return tmp_path


def run(directory, *arguments):
    path = os.pathsep.join([str(directory), str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


def test_it_is_found_by_its_entry_point(installed):
    (installed / "key").write_bytes(bytes(32))
    script = (
        "from hsmwrap.registry import open_backend\n"
        "with open_backend('acme', {'key_file': 'key'}) as backend:\n"
        "    print(backend.name)"
    )
    done = run(installed, "-c", script)
    assert (done.stdout, done.stderr) == ("acme\n", "")


def test_it_passes_the_kit(installed):
    done = run(installed, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider")
    assert done.returncode == 0, done.stdout
    skipped = set(re.findall(r"SKIPPED .*: (capability: .*)", done.stdout))
    assert skipped == {
        "capability: does not serve RSAES_PKCS1_V1_5",
        "capability: does not serve RSAES_OAEP_SHA_1",
        "capability: does not serve SM2PKE",
        "capability: does not import Aliyun_SM4",
        "capability: has no objects to count",
    }
