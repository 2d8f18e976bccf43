"""SoftHSM behind p11-kit's server: few mechanisms (p11-kit 0.24), in another process."""

import pytest
from support.backends.kept_open import KeptOpen
from support.services.p11kit import p11kit_server
from support.services.softhsm import make_softhsm

from hsmwrap.backend import Custody, Exposure


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    token = make_softhsm(tmp_path_factory.mktemp("remote"), label="remote")
    with p11kit_server(token, tmp_path_factory.mktemp("p11kit")) as running:
        yield running


class TestP11Kit(KeptOpen):
    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls, server):
        return server.settings_with_keys("hsmwrap")

    def test_what_cannot_be_wrapped_stays_in_the_token(self, backend):
        report = backend.capabilities()
        assert {w.custody for w in report.wrapping} == {Custody.HSM_INTERNAL}
        assert {k.custody for k in report.keys} == {Custody.HSM_INTERNAL}

    def test_without_key_wrap_nor_value_length_material_is_decrypted(self, backend):
        assert {w.exposure for w in backend.capabilities().wrapping} == {Exposure.HOST}

    def test_the_report_says_what_is_weaker(self, backend):
        notes = " ".join(backend.capabilities().notes)
        assert "no working AES key wrap" in notes
        assert "CKA_UNWRAP_TEMPLATE" in notes
        assert "CKA_COPYABLE" not in notes
