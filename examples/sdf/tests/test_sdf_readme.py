"""README.md says what is true: its settings are read, and its commands do what it says."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import simulated

from hsmwrap.cli import main
from hsmwrap_sdf.binding import _FUNCTIONS
from hsmwrap_sdf.settings import SdfSettings

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
(TOML,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)


def test_its_settings_are_read():
    settings = SdfSettings.from_mapping(tomllib.loads(TOML))
    assert (len(settings.pool), settings.reuse_pairs) == (64, False)


def test_the_header_declares_what_is_called_and_nothing_else():
    header = (ROOT / "simulator" / "sdf.h").read_text("utf-8")
    assert set(re.findall(r"^int (SDF_\w+)\(", header, re.MULTILINE)) == _FUNCTIONS.keys()


def test_keys_init_doctor_and_demo_run_as_it_says(sdf_settings, tmp_path, capsys):
    (tmp_path / "state" / "key-set-1.json").unlink()
    file = tmp_path / "sdf.toml"
    file.write_text(simulated.as_toml(sdf_settings))
    options = ["--backend", "sdf", "--settings", str(file)]
    assert main(["keys", "init", *options]) == 0
    assert "storage pair 1, key-encryption key 1" in capsys.readouterr().out
    status = main(["doctor", *options])
    said = capsys.readouterr().out
    assert "NOT KEPT" not in said
    assert re.search(r"EC_SM2 +SM2PKE +in_hsm +HsmInternal .* done$", said, re.MULTILINE)
    assert re.search(r"Aliyun_SM4 +yes +HsmEncryptedDatabase +used", said), said
    assert status == 0, said
    status = main(["demo", "--served", *options, "--json"])
    document = json.loads(capsys.readouterr().out)
    assert (status, document["ok"]) == (0, True)
    imported = [row for row in document["rows"] if row["backend"] == "sdf" and row["key_specs"]]
    assert {row["client"] for row in imported} == {"openssl", "gmssl"}
    assert [(row["wrapping_algorithm"], row["exposure"], row["key_specs"]) for row in imported] == [
        ("SM2PKE", "in_hsm", {"Aliyun_SM4": "used"})
    ] * 2


def test_without_a_device_it_runs_as_it_says(tmp_path):
    (commands,) = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    done = subprocess.run(
        ["bash", "-eu", "-c", commands.replace("build/sdf", str(tmp_path / "sdf"))],
        cwd=ROOT.parents[1],
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"EC_SM2 +SM2PKE +in_hsm ", done.stdout)


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(SDF_\w+)`", README))))
def test_every_function_that_it_names_is_called(name):
    assert name in _FUNCTIONS
