"""The report that a run of the kit ends with: what was tested, in a form to publish."""

import json
import re
import subprocess
import sys

import pytest
from support.services.softhsm import two_slots

from hsmwrap import __version__
from hsmwrap.software import SoftwareBackend
from hsmwrap.testing._conformance.report import _publishable, _secrets_in

pytestmark = pytest.mark.slow

KIT = "hsmwrap.testing.conformance"
FEW = (
    "test_material_becomes_a_key or moved_is_the_same or import_leaves_its_key or contract_version"
)


class Run:
    """A run of pytest, and its reports."""

    def __init__(self, directory, *options):
        reports = [directory / f"report.{suffix}" for suffix in ("json", "md")]
        named = [word for report in reports for word in ("--hsmwrap-report", str(report))]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *named, *options]
        self.done = subprocess.run(
            command, cwd=directory, capture_output=True, text=True, check=False
        )
        shown = self.done.stdout + self.done.stderr
        assert all(report.exists() for report in reports), shown
        self.text, self.markdown = (report.read_text("utf-8") for report in reports)
        self.document = json.loads(self.text)
        (self.kit,) = self.document["kits"]


def toml(file, settings):
    file.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    return str(file)


def over(directory, plugin, settings, *options):
    file = toml(directory / "settings.toml", settings)
    named = ("--pyargs", KIT, "--hsmwrap-backend", plugin, "--hsmwrap-settings", file)
    return Run(directory, *named, *options)


def served(kit):
    """Exposure by algorithm and level; None where it is not served."""
    rows = kit["capabilities"]["wrapping"]
    return {(r["wrapping_algorithm"], r["protection_level"]): r["exposure"] for r in rows}


@pytest.fixture(scope="module")
def software(tmp_path_factory):
    directory = tmp_path_factory.mktemp("software")
    settings = {"keyring_file": str(directory / "keyring")}
    SoftwareBackend.initialise_keys(settings)
    return over(directory, "software", settings, "-k", FEW)


def test_over_software(software):
    document, kit = software.document, software.kit
    assert (document["schema"], document["hsmwrap"]) == ("hsmwrap-conformance/1", __version__)
    assert (kit["plugin"], kit["distribution"]) == ("software", f"hsmwrap {__version__}")
    assert kit["counts"]["failed"] == 0
    assert served(kit)["RSAES_OAEP_SHA_256", "SOFTWARE"] == "host"
    assert served(kit)["RSAES_OAEP_SHA_256", "HSM"] is None
    assert kit["hsm"] is None
    rows = {(r["topic"], r["wrapping_algorithm"], r["key_spec"]): r for r in kit["results"]}
    assert rows["Imports", "SM2PKE", "Aliyun_SM4"]["passed"] == 1
    assert rows["Keys that move to another key set", "-", "Aliyun_AES_256"]["passed"] == 1


def test_what_was_left_out_makes_it_incomplete_and_each_skip_has_a_reason(software):
    kit = software.kit
    assert kit["verdict"] == "incomplete"
    assert re.fullmatch(r"\d+ tests were left out by pytest's options", kit["incomplete"][0])
    skipped = {each["reason"]: each["tests"] for each in kit["skips"]}
    leaks = ["test_an_import_leaves_its_key_and_nothing_else"]
    assert skipped == {"has no objects to count": leaks}
    assert kit["counts"]["skipped"] == sum(each["count"] for each in kit["skips"])
    assert "INCOMPLETE" in software.markdown
    assert "INCOMPLETE" in software.done.stdout


def test_the_order_is_always_the_same(software, tmp_path):
    settings = {"keyring_file": str(tmp_path / "keyring")}
    SoftwareBackend.initialise_keys(settings)
    again = over(tmp_path, "software", settings, "-k", FEW).document
    assert json.dumps(again | {"at": ""}) == json.dumps(software.document | {"at": ""})


def test_over_softhsm_it_names_the_hsm_and_nothing_that_is_of_this_one(softhsm, tmp_path):
    settings = softhsm.bare_settings()
    officer = ("--hsmwrap-so-pin-file", softhsm.environment["HSMWRAP_SO_PIN_FILE"])
    run = over(tmp_path, "pkcs11", settings, *officer, "-k", FEW)
    assert run.kit["counts"]["failed"] == 0, run.done.stdout
    assert run.kit["hsm"]["model"] == "SoftHSM v2"
    assert served(run.kit)["RSAES_OAEP_SHA_1", "HSM"] == "in_hsm"
    assert served(run.kit)["RSAES_OAEP_SHA_256", "HSM"] == "host"
    rows = {(r["topic"], r["wrapping_algorithm"], r["key_spec"]): r for r in run.kit["results"]}
    row = rows["Imports", "RSAES_OAEP_SHA_1", "Aliyun_AES_256"]
    assert (row["passed"], row["skipped"]) == (2, 0)
    for published in (run.text, run.markdown):
        for value in settings.values():
            assert value not in published
        assert not re.search(r"[ \"(|]/\w+/", published)
        assert "serial" not in published.replace("serial number", "")


def test_over_softhsm_key_sets_move_and_nothing_is_left(softhsm, tmp_path, monkeypatch):
    """Two tokens of one module; what the run made goes, on both."""
    first, second = two_slots(tmp_path)
    monkeypatch.setenv("SOFTHSM2_CONF", first.environment["SOFTHSM2_CONF"])
    pins = [each.environment["HSMWRAP_SO_PIN_FILE"] for each in (first, second)]
    options = ("--hsmwrap-so-pin-file", pins[0], "--hsmwrap-clone-so-pin-file", pins[1])
    options += ("--hsmwrap-clone-settings", toml(tmp_path / "clone.toml", second.bare_settings()))
    options += ("-k", "key_set_does_what_it_did or another_transport_key or drill_opens")
    run = over(tmp_path, "pkcs11", first.bare_settings(), *options)
    assert run.kit["counts"] == {"passed": 4, "failed": 0, "skipped": 0}, run.done.stdout
    left = [file.name for file in tmp_path.glob("tokens/*/*.object")]
    assert left == ["token.object"] * 2


# --- the kit as a class of the author's ----------------------------------------------------------

AUTHORS = """
from dataclasses import replace
import pytest
from support.backends.honest_kit import HonestKit
from support.backends.mutants import LeaksOnSuccess
from hsmwrap.backend import Custody
from hsmwrap.testing import MemoryBackend

class TestMemory(HonestKit):
    plugin = MemoryBackend

    @pytest.fixture
    def holder_reads(self):
        return None

class TestLeaky(HonestKit):
    plugin = LeaksOnSuccess
    custody = Custody.HSM_INTERNAL

    def test_contract_version(self):
        pass

    def test_of_its_own(self):
        assert "not the kit's" == "and not in the report"
"""


@pytest.fixture(scope="module")
def authors(tmp_path_factory):
    """A run over a class of the author's."""

    def run(name, tests):
        directory = tmp_path_factory.mktemp(name)
        file = directory / "test_authors.py"
        file.write_text(AUTHORS)
        return Run(directory, f"{file}::{name}", "-k", tests)

    return run


def test_over_the_memory_backend(authors):
    run = authors("TestMemory", f"{FEW} or key_set_does_what_it_did")
    kit = run.kit
    assert (kit["kit"], kit["class"]) == ("TestMemory", "hsmwrap.testing.memory:MemoryBackend")
    assert (kit["plugin"], kit["distribution"], kit["backend"]) == (None, None, "memory")
    assert kit["counts"]["failed"] == 0
    rows = {(r["topic"], r["wrapping_algorithm"], r["key_spec"]): r for r in kit["results"]}
    assert rows["Key sets that move to another HSM", "-", "-"]["passed"] == 2
    assert "It is for development, not for production." in run.markdown


def test_over_a_backend_that_breaks_a_promise_the_failure_is_shown(authors):
    run = authors("TestLeaky", "import_leaves_its_key or contract_version or of_its_own")
    kit = run.kit
    assert kit["verdict"] == "failed"
    assert {each["test"].partition("[")[0] for each in kit["failures"]} == {
        "test_an_import_leaves_its_key_and_nothing_else"
    }
    assert kit["counts"]["failed"] == len(kit["failures"]) == 4
    for each in kit["failures"]:
        assert re.fullmatch(
            r"AssertionError at imports\.py:\d+: assert counted\(\) == before \+ len\(kept\)",
            each["failure"],
        )
        assert each["failure"].replace("|", "\\|") in run.markdown
        assert each["failure"] in run.done.stdout
    assert "FAILED" in run.markdown
    assert "replaced by other tests: test_contract_version" in kit["incomplete"]


# --- what is not published -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("PIN file /etc/acme/pin is old", "PIN file (not shown) is old"),
        ("module=/usr/lib/acme.so.", "module=(not shown)"),
        ("token SN-4711, PIN 123456", "token (not shown), PIN (not shown)"),
        ("AES/GCM and RSA-OAEP/SHA-1", "AES/GCM and RSA-OAEP/SHA-1"),
        ("https://example.com/acme/hsm", "https://example.com/acme/hsm"),
        ("4711 keys, 1234567 calls", "4711 keys, 1234567 calls"),
    ],
)
def test_paths_pins_and_serial_numbers_are_not_published(text, published):
    settings = {"token_serial": "SN-4711", "pin": "123456", "key_prefix": "keys"}
    shown = _publishable({"notes": [text]}, _secrets_in(settings))
    assert shown == {"notes": [published]}
