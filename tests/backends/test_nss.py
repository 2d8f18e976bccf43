"""NSS softokn under the conformance kit: a token that differs from SoftHSM where it can.

It unwraps OAEP with SHA-256 itself and knows the length of what it unwrapped; it has no SM2 and
no officer who could make trusted keys, pads key wrap by PKCS#7, ignores CKA_UNWRAP_TEMPLATE, and
wraps keys that are not extractable.
"""

import json
import os
import secrets
import subprocess
import sys

import pytest
from support.backends.kept_open import KeptOpen
from support.pkcs11.holder import Holder
from support.pkcs11.pins import low_counts
from support.services.nss import LABEL, make_nss

from hsmwrap import registry
from hsmwrap.backend import Custody, Exposure, Outcome
from hsmwrap.catalog import KeySpec, WrappingAlgorithm
from hsmwrap.pkcs11.binding import profiles
from hsmwrap.testing._conformance.base import any_conversation


@pytest.fixture(scope="module")
def nss(tmp_path_factory):
    return make_nss(tmp_path_factory.mktemp("nss"))


def test_a_wrong_pin_is_not_told(nss):
    """So its profile must not say that it is."""
    assert low_counts(nss.settings("unused")) == [False, False, False]
    assert not profiles.load("nss").login.tells_wrong_pins


class _Nss(KeptOpen):
    @pytest.fixture
    def holder_reads(self):
        """For the kit: it would be red. See below."""
        return

    def test_the_holder_of_the_pin_reads_keys_and_the_report_says_how(self, backend):
        """By wrapping them, which softokn does with EXTRACTABLE false (field note 84)."""
        material = secrets.token_bytes(32)
        conversation = any_conversation(backend)
        ciphertext = conversation.encrypt(material)
        imported = conversation.import_material(ciphertext, KeySpec.ALIYUN_AES_256)
        assert material in Holder(backend).reads(imported.key)
        conversation.clean_up()
        told = {each.name: each for each in backend.capabilities().protections}
        assert told["CKA_EXTRACTABLE"].outcome is Outcome.NOT_HONOURED
        assert "wrapping a key out" in told["CKA_EXTRACTABLE"].control

    def check_report(self, backend, custody):
        report = backend.capabilities()
        rsa = [a for a in WrappingAlgorithm if a is not WrappingAlgorithm.SM2PKE]
        assert [(w.algorithm, w.exposure, w.custody) for w in report.wrapping] == [
            (algorithm, Exposure.IN_HSM, custody) for algorithm in rsa
        ]
        assert {k.custody for k in report.keys} == {custody}
        assert report.key_for(KeySpec.ALIYUN_AES_256).usable


class TestNssSealed(_Nss):
    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls, nss):
        return nss.settings_with_keys("sealed")

    def test_material_never_leaves_the_token(self, backend):
        self.check_report(backend, Custody.HSM_ENCRYPTED_DATABASE)

    def test_the_report_says_what_is_weaker(self, backend):
        notes = " ".join(backend.capabilities().notes)
        weaker = ("EXTRACTABLE", "UNWRAP_TEMPLATE", "ALLOWED_MECHANISMS", "COPYABLE", "TRUSTED")
        assert [name for name in weaker if f"CKA_{name}" not in notes] == []
        assert "CKA_MODIFIABLE" not in notes


class TestNssResident(_Nss):
    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls, nss):
        return nss.settings_with_keys(
            "resident", wrapping_custody="HsmInternal", material_custody="HsmInternal"
        )

    def test_material_never_leaves_the_token(self, backend):
        self.check_report(backend, Custody.HSM_INTERNAL)


def test_the_command_makes_keys(nss):
    """In another process, on a database that this one may have open."""
    options = {
        "--module": nss.module,
        "--library-parameters": nss.parameters,
        "--token-label": LABEL,
        "--pin-file": nss.pin_file,
        "--key-prefix": "command",
    }
    words = [word for option in options.items() for word in option]
    done = subprocess.run(
        [sys.executable, "-m", "hsmwrap.cli", "keys", "init", *words, "--json"],
        # Not SoftHSM's officer, whom another test may have put into the environment.
        env={k: v for k, v in os.environ.items() if not k.startswith("HSMWRAP_")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (made,) = json.loads(done.stdout)["key_sets"]
    assert made["current"]
    with registry.open_backend("pkcs11", nss.settings("command")) as backend:
        backend.verify_mac(b"data", backend.mac(b"data"))
