"""opencryptoki's soft token under the conformance kit: it ignores what keeps keys from being read.

Its C_UnwrapKey makes every key readable, whatever the template says (field notes 82 and 105);
C_CopyObject heeds one. It has no AES key wrap and no curve of SM2; 3.8.1 (Debian 12) no AES-GCM.
"""

import json
import os
from contextlib import suppress

import pytest
from support.backends.kept_open import KeptOpen
from support.pkcs11.pins import low_counts
from support.services.opencryptoki import opencryptoki

from hsmwrap import registry
from hsmwrap.backend import Custody, Exposure
from hsmwrap.catalog import WrappingAlgorithm
from hsmwrap.cli import main
from hsmwrap.pkcs11.binding import profiles


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with opencryptoki(tmp_path_factory.mktemp("opencryptoki")) as token:
        yield token


def test_the_doctor_says_what_it_honours(server, tmp_path, capsys):
    file = tmp_path / "doctor.toml"
    settings = server.settings("unused")
    file.write_text("".join(f'{name} = "{value}"\n' for name, value in settings.items()))
    required = "RSA_2048:RSAES_OAEP_SHA_256:in_hsm"
    status = main(["doctor", "--json", "--settings", str(file), "--require", required])
    document = json.loads(capsys.readouterr().out)
    assert (status, document["verdict"]["broken"]) == (0, [])
    assert document["objects"]["left"] == []
    assert document["profile"]["fits"] == "opencryptoki"
    outcomes = {each["name"]: each["outcome"] for each in document["examination"]["protections"]}
    assert outcomes["CKA_SENSITIVE"] == "honoured"
    used = {k["outcome"] for k in document["examination"]["keys"]}
    if document["module"]["version"] == "3.8":
        assert (outcomes["CKA_COPYABLE"], used) == ("not honoured", {"stored"})
    else:
        assert (outcomes["CKA_COPYABLE"], used) == ("honoured", {"used", "stored"})


def test_a_wrong_pin_is_told_as_its_profile_says(server):
    assert low_counts(server.settings("unused")) == [False, True, False]
    assert profiles.load("opencryptoki").login.tells_wrong_pins


def test_it_closes_no_file_that_is_not_its_own(server):
    """C_Finalize closes one number each time, whatever has it (field note 106)."""
    settings = server.settings_with_keys("files", profile="opencryptoki")
    for _ in range(2):  # before the second C_Finalize it has nothing to close twice
        pipes = [end for _ in range(5) for end in os.pipe()]  # the lowest free numbers
        there = [os.fstat(each) for each in pipes]
        try:
            with registry.open_backend("pkcs11", settings) as backend:
                backend.mac(b"data")
            for each, stat in zip(pipes, there, strict=True):
                assert os.path.samestat(os.fstat(each), stat)
        finally:
            for each in pipes:
                with suppress(OSError):
                    os.close(each)


class TestOpencryptoki(KeptOpen):
    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls, server):
        return server.settings_with_keys("hsmwrap", profile="opencryptoki")

    def test_material_never_leaves_the_token(self, backend):
        report = backend.capabilities()
        rsa = [a for a in WrappingAlgorithm if a is not WrappingAlgorithm.SM2PKE]
        assert [(w.algorithm, w.exposure) for w in report.wrapping] == [
            (algorithm, Exposure.IN_HSM) for algorithm in rsa
        ]

    def test_what_cannot_be_wrapped_stays_in_the_token(self, backend):
        report = backend.capabilities()
        assert {w.custody for w in report.wrapping} == {Custody.HSM_INTERNAL}
        assert {k.custody for k in report.keys} == {Custody.HSM_INTERNAL}
