"""SECURITY.md's table of protections, compared with the report of each token."""

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
COLUMNS = ("softhsm", "nss", "nss_in_fips_mode", "opencryptoki", "p11kit", "vendor")
VERSIONS = {
    "softhsm": (2, 6),
    "nss": (3, 87),
    "nss_in_fips_mode": (3, 87),
    "opencryptoki": (3, 8),
    "vendor": (2, 6),
}


def column(name):
    """Outcome by protection, of one token."""
    table = section_of(ROOT / "SECURITY.md", "What each HSM token honours").splitlines()
    rows = [line.strip("| ").split(" | ") for line in table if line.startswith("| `CKA_")]
    return {row[0].strip("`"): row[1 + COLUMNS.index(name)] for row in rows}


def is_of_the_table(name, settings, report):
    """p11-kit's client does not tell its version; 0.25 carries AES-GCM."""
    if name == "p11kit":
        return not report.key_for(KeySpec.ALIYUN_AES_256).usable
    host = ModuleHost.acquire(settings["module"], settings.get("library_parameters"))
    try:
        with host.inside(5) as (module, _):
            return module.library_version == VERSIONS[name]
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


@pytest.mark.parametrize("name", COLUMNS)
def test_the_table_is_what_the_report_says(settings_of, name):
    settings = settings_of(name)
    with registry.open_backend("pkcs11", settings) as backend:
        report = backend.capabilities()
        if not is_of_the_table(name, settings, report):
            pytest.skip(OTHER_VERSION)
    assert {each.name: str(each.outcome) for each in report.protections} == column(name)
