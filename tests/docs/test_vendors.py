"""docs/vendors.md and docs/doctor.md: their commands run, their tables are those of the code."""

import ast
import re
from itertools import pairwise

import pytest
from support import console
from support.documents import ROOT, anchors_of, section_of, text_of
from support.pkcs11.quirks import QUIRKS, SOFTHSM
from support.services.spy import NO_SPY, find_spy

from hsmwrap.backend import Custody, Exposure
from hsmwrap.pkcs11.binding.profiles import PARTS, names
from hsmwrap.pkcs11.binding.returncodes import Remedy
from hsmwrap.sm2.formats import Layout
from hsmwrap.testing.faults import Restriction

VENDORS, DOCTOR = ROOT / "docs" / "vendors.md", ROOT / "docs" / "doctor.md"
NEEDS = section_of(VENDORS, "What a token needs")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in NEEDS.splitlines()
    if line.startswith("| ") and "played by" not in line
]


def test_the_way_of_a_vendor_is_as_it_is_written(softhsm, tmp_path):
    if find_spy() is None:
        pytest.skip(NO_SPY)
    console.run(console.commands_of(VENDORS), tmp_path)


def test_the_report_is_as_it_is_explained(softhsm, tmp_path):
    """And each section and each fact of it is explained."""
    console.run(console.commands_of(DOCTOR), tmp_path)
    lines = (tmp_path / "report.txt").read_text().splitlines()
    titles = [line for line, after in pairwise(lines) if line and not after]
    titles = [each for each in titles if re.fullmatch(r"[A-Z]\S*( \S+)*", each)]
    assert len(titles) > 10
    anchors = {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in titles}
    assert anchors <= anchors_of(DOCTOR)
    report = "\n".join(lines)
    for title in ("Backend", "PKCS#11 module", "HSM token", "Vendor profile", "Sessions"):
        (table,) = re.findall(rf"^{title}\n\nfact .*\n-.*\n((?:.+\n)+)", report, re.MULTILINE)
        facts = [re.split(r"\s{2,}", line)[0] for line in table.splitlines()]
        assert facts
        assert [fact for fact in facts if f"`{fact}`" not in section_of(DOCTOR, title)] == []


@pytest.mark.parametrize("name", ["PLUGINS.md", "docs/vendors.md", "examples/sdf/README.md"])
def test_commands_of_the_kit_are_complete(name):
    """The kit needs settings beside a backend; pip finds nothing that was not released."""
    text = text_of(ROOT / name)
    commands = re.findall(r"--hsmwrap-backend [a-z]\w+\W+(\S+)", text)
    assert commands
    assert set(commands) == {"hsmwrap-settings"}
    assert not re.search(r"pip install hsmwrap\b", text)
    assert re.search(r"extra `testing`|'\.\[testing\]'", text)


def test_each_layout_is_named_where_a_wrong_one_is_seen():
    (line,) = [each for each in text_of(VENDORS).splitlines() if "WRAPPED_KEY_INVALID" in each]
    assert set(re.findall(r"C1C\w+|DER", line)) == {each.name for each in Layout}


def test_a_vendor_without_an_hsm_finds_the_simulated_one():
    (command,) = re.findall(r"^module=.*\n.*$", text_of(VENDORS), re.MULTILINE)
    assert command in text_of(ROOT / "docs" / "testing.md")
    assert re.search(r"faults play sansec .* hsmwrap demo --profile sansec$", command, re.DOTALL)


def _named(kind):
    """Members of this enumeration of python-pkcs11 that the backend's code names."""
    found = set()
    for path in (ROOT / "hsmwrap" / "pkcs11").rglob("*.py"):
        for node in ast.walk(ast.parse(text_of(path))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                found |= {node.attr} if node.value.id == kind and node.attr.isupper() else set()
    return found


def test_the_table_names_each_mechanism_that_is_used():
    hashes = {"SHA_1", "SHA256"}  # parameters of OAEP
    rsa = {"RSA_PKCS_KEY_PAIR_GEN"}  # python-pkcs11's own for RSA keys
    documented = set(re.findall(r"`CKM_([A-Z0-9_]+)`", NEEDS))
    assert documented == (_named("Mechanism") - hashes) | rsa


def test_the_table_names_each_attribute_that_hardens():
    documented = set(re.findall(r"`CKA_([A-Z0-9_]+)`", NEEDS))
    assert documented == {
        *("UNWRAP_TEMPLATE", "WRAP_TEMPLATE", "ALLOWED_MECHANISMS", "COPYABLE", "MODIFIABLE"),
        *("TRUSTED", "WRAP_WITH_TRUSTED"),
    }
    assert documented <= _named("Attribute")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_what_is_lost_is_what_the_token_that_plays_it_loses(row):
    """tests/pkcs11/test_quirks.py runs these tokens."""
    _, _, lost, played = row
    restrictions = Restriction(0)
    for name in re.findall(r"`(\w+)`", played):
        restrictions |= Restriction[name]
    (quirk,) = [each for each in QUIRKS if each.restrictions == restrictions]
    missing = {str(a) for a in SOFTHSM if a not in quirk.rows}
    kept = {algorithm: SOFTHSM[algorithm] for algorithm in quirk.rows}
    assert missing == set(re.findall(r"no ((?:RSAES|SM2)\w+)", lost))
    changed = {
        str(after)
        for algorithm, before in kept.items()
        for was, after in zip(before, quirk.rows[algorithm], strict=True)
        if was != after and after in (Exposure.HOST, Custody.HSM_INTERNAL)
    }
    assert changed == {each for each in ("host", "HsmInternal") if f"`{each}`" in lost}
    assert quirk.usable is ("cannot be used" not in lost)


def test_what_is_written_of_profiles_exists():
    section = section_of(VENDORS, "A vendor profile")
    assert set(re.findall(r"\[(\w+)\]`", section)) <= {*PARTS, "settings", "return_codes"}
    remedies = {each.name.lower().replace("_", " ") for each in Remedy}
    assert {"restart", "new session", "log in", "stop"} <= remedies
    assert {"luna", "sansec", "tass", "ibm-ep11"} <= set(names())
