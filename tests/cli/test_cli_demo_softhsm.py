"""The demo on a private SoftHSM2 token, as ``scripts/demo`` runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.pkcs11.sm4_vendors import WITH_GCM
from support.pkcs11.vendors import SM_ONLY

from hsmwrap.pkcs11.binding import profiles
from hsmwrap.testing import faults

ROOT = Path(__file__).parents[2]


@pytest.fixture
def demo(softhsm, tmp_path):
    """Run ``hsmwrap demo --json`` on the token in ``tmp_path``: (exit code, document).

    Not with the RSA pairs of the tests: each is generated, as everywhere outside of them.
    """
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}

    def run(*arguments, before=()):
        command = [*before, sys.executable, "-m", "hsmwrap.cli", "demo", "--json", *arguments]
        done = subprocess.run(
            [ROOT / "softhsm/init-token", *command],
            env={**environment, "HSMWRAP_TOKEN_DIR": str(tmp_path)},
            cwd=ROOT,
            capture_output=True,
            check=False,
        )
        return done.returncode, json.loads(done.stdout)

    return run


def token_objects(directory):
    return {path.name for path in directory.glob("tokens/*/*.object")}


def test_every_row_on_the_token_that_is_left_as_it_was(demo, tmp_path):
    status, document = demo()
    assert (status, document["ok"]) == (0, True)
    before = token_objects(tmp_path)

    assert demo()[0] == 0
    assert token_objects(tmp_path) == before

    imported = [row for row in document["rows"] if row["allowed"]]
    assert {(row["protection_level"], row["backend"]) for row in imported} == {
        ("SOFTWARE", "software"),
        ("HSM", "pkcs11"),
    }
    assert {
        row["wrapping_algorithm"]: row["exposure"]
        for row in imported
        if row["protection_level"] == "HSM"
    } == {
        "RSAES_PKCS1_V1_5": "in_hsm",
        "RSAES_OAEP_SHA_1": "in_hsm",
        "RSAES_OAEP_SHA_256": "host",
        "SM2PKE": "host",
    }


def test_an_hsm_with_sm2_and_sm4_alone(demo, tmp_path, capsys):
    restricted = ["--restrict", "NO_AES", "NO_RSA"]
    assert faults.main(["play", "sansec", str(tmp_path / "shim"), *restricted]) == 0
    module = capsys.readouterr().out.strip()
    profile = tmp_path / "sm.toml"
    profile.write_text(f"{profiles.text_of('sansec')}\n{SM_ONLY.sm4}", "utf-8")
    status, document = demo(
        *("--served", "--profile", str(profile)), before=["env", f"HSMWRAP_PKCS11_MODULE={module}"]
    )
    assert (status, document["ok"]) == (0, True)
    inside = [row for row in document["rows"] if row["allowed"] and row["backend"] == "pkcs11"]
    assert {row["outcome"] for row in inside} == {"imported", "not served"}
    for row in (row for row in inside if row["outcome"] == "imported"):
        assert (row["wrapping_algorithm"], row["exposure"]) == ("SM2PKE", "in_hsm")
        assert row["key_specs"] == {"Aliyun_SM4": "used"}


def test_sm2_and_sm4_inside_an_hsm_of_a_vendor_that_is_played(demo, tmp_path, capsys):
    assert faults.main(["play", "sansec", str(tmp_path / "shim")]) == 0
    module = capsys.readouterr().out.strip()
    profile = tmp_path / "sansec.toml"
    profile.write_text(f"{profiles.text_of('sansec')}\n{WITH_GCM.sm4}", "utf-8")
    status, document = demo(
        "--profile", str(profile), before=["env", f"HSMWRAP_PKCS11_MODULE={module}"]
    )
    assert (status, document["ok"]) == (0, True)
    inside = [row for row in document["rows"] if row["allowed"] and row["backend"] == "pkcs11"]
    sm2 = {row["exposure"] for row in inside if row["wrapping_algorithm"] == "SM2PKE"}
    assert sm2 == {"in_hsm"}
    used = [row["key_specs"] for row in inside]
    assert all(each == {"Aliyun_AES_256": "used", "Aliyun_SM4": "used"} for each in used)
