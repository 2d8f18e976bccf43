"""hsmwrap doctor: on SoftHSM and NSS, on the software backend, on a plug-in."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from support.faults.shim import fault_shim
from support.services.nss import make_nss

from hsmwrap import registry
from hsmwrap.backend import Exposure, FailedTrial
from hsmwrap.catalog import WrappingKeySpec
from hsmwrap.cli import doctor_examination, main
from hsmwrap.errors import HsmError
from hsmwrap.pkcs11 import Pkcs11Backend, inspection
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.testing import MemoryBackend
from hsmwrap.testing.faults import Restriction

OAEP_256 = "RSA_2048:RSAES_OAEP_SHA_256"
KEYS = {
    "hsmwrap",
    "at",
    "python",
    "platform",
    "backend",
    "module",
    "token",
    "profile",
    "mechanisms",
    "key_sets",
    "objects",
    "examination",
    "requirements",
    "verdict",
}
EXAMINATION = {
    "name",
    "protection_levels",
    "production",
    "rows",
    "keys",
    "protections",
    "failed",
    "notes",
    "threads",
    "import_tokens",
    "fork",
    "health",
    "durations",
}
ROW = {
    "wrapping_key_spec",
    "wrapping_algorithm",
    "served",
    "exposure",
    "custody",
    "path",
    "reason",
    "tried",
    "failure",
    "issue_ms",
    "import_ms",
}
NO_PIN = "a PIN that no output may show"


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch):
    monkeypatch.setattr(doctor_examination, "_RUNS", 3)
    monkeypatch.setattr(doctor_examination, "_SECONDS", 0.05)


@pytest.fixture
def plug_in(tmp_path, monkeypatch):
    """Options for a plug-in of this class, whose objects are files in ``tmp_path / "objects"``."""

    def register(kind, **settings):
        monkeypatch.setattr(registry, "load", lambda _name: kind)
        return ["--backend", "acme", "--settings", write(tmp_path, directory="objects", **settings)]

    monkeypatch.chdir(tmp_path)
    return register


def write(where, /, **settings):
    file = where / "doctor.toml"
    file.write_text("".join(f'{name} = "{value}"\n' for name, value in settings.items()))
    return str(file)


def options(settings):
    return [
        word
        for name, value in settings.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


def exposures(document):
    rows = document["examination"]["rows"]
    return {row["wrapping_algorithm"]: row["exposure"] for row in rows}


# --- SoftHSM -------------------------------------------------------------------------------------


def test_a_token_without_a_key_set_is_left_as_it_was(softhsm, run_json):
    settings = softhsm.bare_settings(key_prefix="nothing-here")
    checked = Pkcs11Settings.from_mapping(settings)
    before = inspection.token_objects(checked)
    status, document = run_json(
        "doctor", *options(settings), "--require", OAEP_256, "--require", "EC_SM2:SM2PKE:host"
    )
    assert (status, document["verdict"]["broken"]) == (0, [])
    assert inspection.token_objects(checked) == before
    assert document["profile"] == {
        "used": "none",
        "fits": "softhsm2",
        "forbids": [],
    }
    assert document["objects"] == {"before": before.total(), "after": before.total(), "left": []}
    assert document.keys() == KEYS
    assert document["examination"].keys() == EXAMINATION
    assert all(row.keys() == ROW for row in document["examination"]["rows"])
    assert exposures(document) == {
        "RSAES_PKCS1_V1_5": "in_hsm",
        "RSAES_OAEP_SHA_1": "in_hsm",
        "RSAES_OAEP_SHA_256": "host",
        "SM2PKE": "host",
    }
    for row in document["examination"]["rows"]:
        assert (row["failure"], bool(row["reason"])) == (None, row["exposure"] == "host")
    tried = document["examination"]["rows"][2]["tried"][0]
    assert tried["answer"] == "C_UnwrapKey(CKM_RSA_PKCS_OAEP) answered CKR_ARGUMENTS_BAD (0x7)"
    assert {k["key_spec"]: k["outcome"] for k in document["examination"]["keys"]} == {
        "Aliyun_AES_256": "used",
        "Aliyun_SM4": "stored",
    }
    assert document["module"]["manufacturer"] == "SoftHSM"
    assert document["token"]["label"] == settings["token_label"]
    assert "LOGIN_REQUIRED" in document["token"]["flags"]
    assert "of the doctor" in document["key_sets"][0]["detail"]
    assert [each["met"] for each in document["requirements"]] == [True, True]
    assert document["examination"]["fork"] == {"failure": None}
    assert document["examination"]["threads"]["failure"] is None
    assert all(each["median_ms"] > 0 for each in document["examination"]["durations"])


def test_what_is_left_is_seen(softhsm, tmp_path, run_json, monkeypatch):
    """The control of the test before: an imported key that is not destroyed."""
    settings = softhsm.settings("doctor", material_custody="HsmInternal")
    monkeypatch.setattr(Pkcs11Backend, "destroy_key", lambda *_: None)
    status, document = run_json("doctor", "--settings", write(tmp_path, **settings))
    objects = document["objects"]
    assert status == 1
    assert len(objects["left"]) == objects["after"] - objects["before"] > 0
    assert "SECRET_KEY" in objects["left"][0]
    assert "new objects" in document["verdict"]["broken"][-1]
    assert "trusted" in document["key_sets"][0]["detail"]  # those of the HSM token, not its own


def test_no_secret_is_in_the_output(softhsm, capsys):
    pin = Path(softhsm.environment["HSMWRAP_PIN_FILE"]).read_text("utf-8").strip()
    settings = softhsm.settings("doctor")
    assert main(["doctor", "--markdown", *options(settings)]) == 0
    captured = capsys.readouterr()
    assert pin not in captured.out + captured.err
    assert settings["pin_file"] not in captured.out
    assert "importing by EC_SM2 SM2PKE" in captured.err  # progress
    assert "| EC_SM2 | SM2PKE | host |" in captured.out
    assert "## Protections" in captured.out or "## Notes" in captured.out


def test_a_doctor_that_is_terminated_leaves_nothing(softhsm):
    checked = Pkcs11Settings.from_mapping(softhsm.bare_settings())
    before = inspection.token_objects(checked)
    command = [sys.executable, "-m", "hsmwrap.cli", "doctor", "--key-prefix", "nothing-here"]
    trusted = ["--so-pin-file", softhsm.environment["HSMWRAP_SO_PIN_FILE"]]
    with subprocess.Popen(
        [*command, *trusted, *options(softhsm.bare_settings())], stderr=subprocess.PIPE, text=True
    ) as doctor:
        for line in doctor.stderr:
            if line.startswith("importing"):
                between = inspection.token_objects(checked)
                doctor.terminate()
                break
        doctor.stderr.read()
    assert doctor.returncode == 143
    assert between != before  # the key set of the examination
    assert inspection.token_objects(checked) == before


@pytest.mark.parametrize("form", [[], ["--markdown"]])
def test_an_error_of_several_lines_keeps_them(softhsm, capsys, form):
    """As the list of HSM tokens where none is the one that is meant."""
    settings = {**softhsm.settings("doctor"), "token_label": "none of this name"}
    assert main(["doctor", *form, *options(settings)]) == 2
    _, _, said = capsys.readouterr().out.partition("CANNOT RUN: ")
    first, *tokens = said.partition("\n\n")[0].splitlines()
    assert "match" in " ".join([first, tokens[0]])
    label = softhsm.environment["HSMWRAP_TOKEN_LABEL"]
    assert [each for each in tokens if each.startswith(f"  - label '{label}', serial ")]
    assert [each for each in tokens if each.startswith("  - set one of: ")]


# --- an HSM without trusted keys -----------------------------------------------------------------


@pytest.fixture
def no_trust(softhsm, tmp_path):
    """Options for SoftHSM that knows no CKA_TRUSTED, as vendors say of their HSMs."""
    shim = fault_shim(softhsm.module, tmp_path)
    shim.restrict(Restriction.NO_TRUST)
    yield options(softhsm.bare_settings(module=str(shim.path), key_prefix="no-trust"))
    assert not shim.counters().token_objects_delta


def test_where_the_officer_makes_no_trusted_keys_the_doctor_makes_others(softhsm, no_trust):
    officer = ("--so-pin-file", softhsm.environment["HSMWRAP_SO_PIN_FILE"])
    status, document = run_in_a_process(*no_trust, *officer)
    assert (status, document["verdict"]["kept"]) == (0, True)
    (made,) = document["key_sets"]
    assert "NOT trusted" in made["detail"]
    assert made["detail"].endswith("the security officer makes no trusted ones")
    status, document = run_in_a_process(*no_trust)
    assert "security officer" not in document["key_sets"][0]["detail"]


def test_where_the_officer_makes_no_trusted_keys_keys_init_says_so(softhsm, no_trust):
    officer = ("--so-pin-file", softhsm.environment["HSMWRAP_SO_PIN_FILE"])
    done = subprocess.run(
        [sys.executable, "-m", "hsmwrap.cli", "keys", "init", *no_trust, *officer],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    said = " ".join(done.stderr.split())
    assert "C_GenerateKey(CKM_AES_KEY_GEN) answered CKR_ATTRIBUTE_TYPE_INVALID" in said
    assert "without the SO PIN (--so-pin-file) the user makes keys" in said


# --- NSS -----------------------------------------------------------------------------------------


def run_in_a_process(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "hsmwrap.cli", "doctor", "--json", *arguments],
        env=os.environ | environment,
        capture_output=True,
        check=False,
        timeout=120,
    )
    return done.returncode, json.loads(done.stdout)


def test_on_nss(tmp_path):
    nss = make_nss(tmp_path)
    settings = nss.settings("unused")
    del settings["key_prefix"]
    status, document = run_in_a_process(
        *options(settings), "--require", f"{OAEP_256}:in_hsm", "--require", "EC_SM2:SM2PKE"
    )
    assert exposures(document)["RSAES_OAEP_SHA_256"] == "in_hsm"
    assert (status, len(document["verdict"]["broken"])) == (1, 1)
    assert "EC_SM2:SM2PKE is required, but not served" in document["verdict"]["broken"][0]
    assert document["profile"]["fits"] == "nss"
    sm2 = document["examination"]["rows"][-1]
    assert (sm2["served"], sm2["exposure"], bool(sm2["reason"])) == (False, None, True)
    assert document["objects"]["left"] == []


@pytest.mark.slow
def test_why_it_cannot_run_is_in_the_report(softhsm, tmp_path):
    pin = tmp_path / "pin"
    pin.write_text(NO_PIN)
    pin.chmod(0o400)
    status, document = run_in_a_process(
        *("--module", str(softhsm.module), "--token-label", "any", "--pin-file", str(pin)),
        SOFTHSM2_CONF="/nonexistent",
    )
    assert status == 2
    assert "C_Initialize answered CKR_GENERAL_ERROR (0x5)" in document["verdict"]["cannot_run"]
    assert NO_PIN not in json.dumps(document)


def test_what_cannot_be_opened_leaves_nothing_to_say_of_objects(capsys, tmp_path):
    file = tmp_path / "hsm.toml"
    file.write_text('module = "/nowhere/libnothing.so"\ntoken_label = "t"\npin_env = "NONE"\n')
    assert main(["doctor", "--settings", str(file)]) == 2
    said = capsys.readouterr().out
    assert "CANNOT RUN" in said
    assert "What is left" not in said


# --- by the contract alone -----------------------------------------------------------------------


def test_on_the_software_backend(run_json):
    status, document = run_json("doctor", "--backend", "software")
    assert (status, document["verdict"]["kept"]) == (0, True)
    assert document["objects"] == {"before": None, "after": None, "left": []}
    assert set(exposures(document).values()) == {"host"}


def test_on_a_plug_in(plug_in, run_json):
    internal = {"wrapping_custody": "HsmInternal", "material_custody": "HsmInternal"}
    acme = plug_in(MemoryBackend, **internal)
    with MemoryBackend.from_settings({"directory": "objects", **internal}) as backend:
        kept = set(backend.store)
        status, document = run_json("doctor", *acme, "--require", f"{OAEP_256}:host")
        assert (status, document["verdict"]["broken"]) == (0, [])
        assert set(backend.store) == kept
    assert (document["module"], document["token"]) == ({}, {})
    assert document["key_sets"] != []


class Broken(MemoryBackend):
    """Each method keeps its promise until a test breaks it."""


def test_exposure_is_compared_with_the_report(plug_in, run_json, monkeypatch):
    def unwrap(self, *arguments, **named):
        imported = MemoryBackend.unwrap_material(self, *arguments, **named)
        return replace(imported, exposure=Exposure.HOST)

    monkeypatch.setattr(Broken, "unwrap_material", unwrap)
    status, document = run_json("doctor", *plug_in(Broken, exposure="in_hsm"))
    assert status == 1
    assert (
        "HsmEncryptedDatabase, host; its capabilities promise" in document["verdict"]["broken"][0]
    )


def test_a_trial_that_failed_for_each_key_spec_is_told_once(plug_in, capsys, monkeypatch):
    failed = FailedTrial("unwrap a key", "C_UnwrapKey", "CKM_VENDOR", 0x70)

    def capabilities(self):
        known = MemoryBackend.capabilities(self)
        first, *others = known.wrapping
        return replace(known, wrapping=(replace(first, tried=(failed, failed)), *others))

    monkeypatch.setattr(Broken, "capabilities", capabilities)
    main(["doctor", *plug_in(Broken)])
    said = capsys.readouterr().out
    assert said.count("unwrap a key: C_UnwrapKey(CKM_VENDOR) answered") == 1


def test_the_verdict_says_what_does_not_work(plug_in, capsys, monkeypatch):
    failed = FailedTrial("make a session object", "C_CreateObject", None, 0x70)

    def capabilities(self):
        known = MemoryBackend.capabilities(self)
        served = tuple(each for each in known.wrapping if each.spec is not WrappingKeySpec.EC_SM2)
        first, *others = known.keys
        keys = (replace(first, usable=False), *others)
        return replace(known, wrapping=served, keys=keys, failed=(failed,))

    def verdict():
        assert main(["doctor", *plug_in(Broken)]) == 0
        text = capsys.readouterr().out
        return text[text.index("Verdict") : text.index("Backend")].split("\n- ")[1:]

    good = " ".join(verdict())
    assert "not served" not in good
    assert "cannot be used" not in good
    assert "trials failed" not in good
    monkeypatch.setattr(Broken, "capabilities", capabilities)
    said = [" ".join(line.split()) for line in verdict()]
    assert said[0] == "every promise of the capability report was kept"
    assert "EC_SM2 with SM2PKE is not served: see Why not in_hsm" in said
    first = MemoryBackend.from_settings({}).capabilities().keys[0].key_spec
    assert f"{first} cannot be used: see Key specs" in said
    assert "some trials failed: see What does not work" in said


def test_a_use_that_fails_is_a_promise_that_is_not_kept(plug_in, capsys, monkeypatch):
    def encrypt(*_arguments, **_named):
        raise HsmError("C_Encrypt(CKM_AES_GCM) answered CKR_DEVICE_MEMORY (0x31)")

    monkeypatch.setattr(Broken, "encrypt", encrypt)
    assert main(["doctor", *plug_in(Broken)]) == 1
    said = "C_Encrypt(CKM_AES_GCM) answered CKR_DEVICE_MEMORY (0x31)"
    assert f"NOT KEPT: Aliyun_AES_256: HsmError: {said}" in " ".join(
        capsys.readouterr().out.split()
    )


def test_a_child_that_cannot_verify_is_a_promise_that_is_not_kept(plug_in, run_json, monkeypatch):
    here = os.getpid()

    def verify(self, data, mac):
        if os.getpid() != here:
            raise HsmError("not in this process")
        MemoryBackend.verify_mac(self, data, mac)

    monkeypatch.setattr(Broken, "verify_mac", verify)
    status, document = run_json("doctor", *plug_in(Broken))
    assert status == 1
    assert document["verdict"]["broken"][0].startswith("fork: the child ended with status 1")


def test_without_import_tokens_there_is_a_report_all_the_same(plug_in, run_json, monkeypatch):
    def mac(*_arguments):
        raise HsmError("C_SignInit(CKM_SHA256_HMAC) answered CKR_KEY_TYPE_INCONSISTENT (0x63)")

    monkeypatch.setattr(Broken, "mac", mac)
    status, document = run_json("doctor", *plug_in(Broken))
    assert status == 1
    assert [each.split(":")[0] for each in document["verdict"]["broken"]] == [
        "import tokens",
        "8 threads",
        "fork",
    ]
    assert len(document["examination"]["rows"]) == 4


def test_a_thread_that_fails_is_a_promise_that_is_not_kept(plug_in, run_json, monkeypatch):
    def mac(self, data):
        if threading.current_thread() is not threading.main_thread():
            raise HsmError("by one thread only")
        return MemoryBackend.mac(self, data)

    monkeypatch.setattr(Broken, "mac", mac)
    status, document = run_json("doctor", *plug_in(Broken))
    assert status == 1
    assert document["verdict"]["broken"] == ["8 threads: HsmError: by one thread only"]


def test_a_requirement_that_is_not_met(run_json):
    status, document = run_json(
        "doctor", "--backend", "software", "--require", f"{OAEP_256}:in_hsm"
    )
    assert status == 1
    assert document["requirements"][0]["met"] is False
    assert "the exposure is host" in document["verdict"]["broken"][0]


@pytest.mark.parametrize("wrong", ["RSA_2048", "EC_SM2:RSAES_OAEP_SHA_1", f"{OAEP_256}:outside"])
def test_a_requirement_that_names_nothing_is_refused(wrong, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--backend", "software", "--require", wrong])
    assert ended.value.code == 2
    assert "RSAES_OAEP_SHA_256" in capsys.readouterr().err


def test_a_plug_in_that_is_not_there_cannot_run(run_json):
    status, document = run_json("doctor", "--backend", "nothing")
    assert (status, document["verdict"]["kept"]) == (2, False)
    assert "no backend plug-in is called 'nothing'" in document["verdict"]["cannot_run"]
