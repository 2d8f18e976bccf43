"""The plug-in in PLUGINS.md is found by its entry point and passes the kit, as it stands there."""

import json
import os
import re
import shlex
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
    (installed / "key").chmod(0o400)
    script = (
        "from hsmwrap.registry import open_backend\n"
        "with open_backend('acme', {'key_file': 'key'}) as backend:\n"
        "    print(backend.name)"
    )
    done = run(installed, "-c", script)
    assert (done.stdout, done.stderr) == ("acme\n", "")


def test_it_passes_mypy_strict(installed):
    done = run(installed, "-m", "mypy", "--strict", "--config-file=", "acme_hsm.py")
    assert done.returncode == 0, done.stdout


def test_it_serves_keys_of_level_hsm(installed):
    (installed / "key").write_bytes(bytes(32))
    (installed / "key").chmod(0o400)
    done = run(installed, "-c", IMPORT)
    assert (done.stdout, done.stderr) == ("b'message' host\n", "")


IMPORT = """
from hsmwrap import Cmk, Deployment, ImportService, KeySpec, ProtectionLevel, open_backend
from hsmwrap.testing.clients import pyca_encrypt

with open_backend("acme", {"key_file": "key"}) as acme:
    service = ImportService({ProtectionLevel.HSM: acme}, Deployment())
    cmk = Cmk("key-1", KeySpec.ALIYUN_AES_256, ProtectionLevel.HSM)
    issued = service.get_parameters_for_import(cmk, "RSA_2048", "RSAES_OAEP_SHA_256")
    ciphertext = pyca_encrypt(issued.algorithm, issued.public_key, bytes(range(32)))
    imported = service.import_key_material(cmk, ciphertext, issued.import_token).imported
    print(acme.decrypt(imported.key, acme.encrypt(imported.key, b"message")), imported.exposure)
"""


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
        "capability: no holder of a PIN who could try to read keys",
        "capability: does not re-seal keys",
        "capability: key sets do not move to another HSM",
        "capability: keeps no wrapping keys in the HSM",
        "capability: keeps no imported keys in the HSM",
        "capability: can use every Aliyun_AES_256 key",
    }


@pytest.fixture
def settings_file(installed):
    (installed / "key").write_bytes(bytes(32))
    (installed / "key").chmod(0o400)
    (installed / "acme.toml").write_text('key_file = "key"\n')
    return installed


def test_the_kit_runs_over_a_registered_plug_in_as_it_says(settings_file):
    (command,) = re.findall(r"^\$ pytest (--pyargs .*?acme\.md)$", GUIDE, re.MULTILINE | re.DOTALL)
    arguments = shlex.split(command.replace("\\\n", " "))
    done = run(settings_file, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
    assert done.returncode == 0, done.stdout
    report = json.loads((settings_file / "acme.json").read_text("utf-8"))
    assert [(kit["plugin"], kit["verdict"]) for kit in report["kits"]] == [("acme", "passed")]
    assert "acme" in (settings_file / "acme.md").read_text("utf-8")


@pytest.mark.parametrize("command", ["doctor", "demo --served"])
def test_commands_take_its_settings_as_it_says(settings_file, command):
    said = f"hsmwrap {command} --backend acme --settings acme.toml"
    assert f"`{said}`" in GUIDE
    done = run(settings_file, "-m", "hsmwrap.cli", *said.split()[1:])
    assert done.returncode == 0, done.stdout
    assert re.search(r"RSA_2048 +RSAES_OAEP_SHA_256 ", done.stdout)
