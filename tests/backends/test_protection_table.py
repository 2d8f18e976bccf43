"""SECURITY.md's table of protections, compared with the report of each token."""

import re
from contextlib import ExitStack

import pytest
from support.documents import ROOT, section_of
from support.faults.shim import fault_shim
from support.pkcs11.vendors import POOR
from support.services.nss import make_nss
from support.services.opencryptoki import opencryptoki
from support.services.p11kit import p11kit_server
from support.services.softhsm import make_softhsm

from hsmwrap import registry
from hsmwrap.catalog import KeySpec
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.pkcs11.binding.host import ModuleHost

OTHER_VERSION = "capability: another version of the module than in SECURITY.md's table"
TOKENS = {
    "softhsm": "SoftHSM2 {}, trusted keys",
    "nss": "NSS {}",
    "nss_in_fips_mode": "NSS {}, FIPS mode",
    "opencryptoki": "opencryptoki {}",
    "p11kit": "SoftHSM2 behind p11-kit {}",
    "vendor": "a simulated vendor on SoftHSM2 {}",
}


def column(name, version):
    """Outcome by protection, of one token in a version, such as 3.87; None if it has no column."""
    table = section_of(ROOT / "SECURITY.md", "What each HSM token honours").splitlines()
    head, *rows = (
        line.strip("| ").split(" | ")
        for line in table
        if line.startswith(("| protection |", "| `CKA_"))
    )
    before, after = map(re.escape, TOKENS[name].split("{}"))
    for number, words in enumerate(head):
        found = re.fullmatch(rf"{before}([\d., and]+){after}", words)
        if found and version in re.findall(r"\d+\.\d+", found[1]):
            return {row[0].strip("`"): row[number] for row in rows}
    return None


def version_of(name, settings, report):
    """p11-kit's client does not tell its version; 0.25 carries AES-GCM."""
    if name == "p11kit":
        return "0.25" if report.key_for(KeySpec.ALIYUN_AES_256).usable else "0.24"
    host = ModuleHost.acquire(settings["module"], settings.get("library_parameters"))
    try:
        with host.inside(5) as (module, _):
            return "{}.{}".format(*module.library_version)
    finally:
        host.release()


@pytest.fixture
def running():
    """Tokens that run until the end of the test."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def settings_of(request, tmp_path, running):
    """Settings of a token by its name."""

    def settings_of(name):
        if name == "softhsm":
            return request.getfixturevalue("softhsm").settings("table")
        if name == "vendor":
            softhsm = request.getfixturevalue("softhsm")
            shim = fault_shim(softhsm.module, tmp_path / "shim")
            settings = POOR.play(shim, tmp_path, softhsm, key_prefix="table-vendor")
            Pkcs11Backend.initialise_keys(settings)
            return settings
        if name == "p11kit":
            token = make_softhsm(tmp_path, label="table")
            server = running.enter_context(p11kit_server(token, tmp_path))
        elif name == "opencryptoki":
            server = running.enter_context(opencryptoki(tmp_path))
        else:
            server = make_nss(tmp_path, fips=name == "nss_in_fips_mode")
        return server.settings_with_keys("hsmwrap")

    return settings_of


@pytest.mark.parametrize("name", TOKENS)
def test_the_table_is_what_the_report_says(settings_of, name):
    settings = settings_of(name)
    with registry.open_backend("pkcs11", settings) as backend:
        report = backend.capabilities()
        expected = column(name, version_of(name, settings, report))
    if expected is None:
        pytest.skip(OTHER_VERSION)
    assert {each.name: str(each.outcome) for each in report.protections} == expected
