"""One suite over every backend that is registered, in each way that it keeps keys."""

import pytest
from support.backends.kept_open import KeptOpen

from hsmwrap import registry
from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec
from hsmwrap.software import SoftwareBackend
from hsmwrap.testing.conformance import BackendConformance

SM2 = (WrappingKeySpec.EC_SM2, WrappingAlgorithm.SM2PKE)


@pytest.mark.slow
class TestSoftware(BackendConformance):
    plugin = SoftwareBackend
    engine = "libcrypto"

    @pytest.fixture
    def settings(self, tmp_path):
        settings = {"keyring_file": str(tmp_path / "keyring"), "sm2_engine": self.engine}
        SoftwareBackend.initialise_keys(settings)
        return settings


class TestSoftwareWithGmssl(TestSoftware):
    engine = "gmssl"

    @pytest.fixture(params=[SM2], ids=["SM2PKE"])
    def pair(self, request):
        """RSA has nothing to do with the engine."""
        return request.param


class _SoftHsm(KeptOpen):
    trusted = True

    @pytest.fixture
    def rotate_keys(self, softhsm, settings):
        prefix = settings["key_prefix"]
        return lambda: softhsm.run_keys("rotate", prefix, trusted=self.trusted)


class TestSoftHsmSealed(_SoftHsm):
    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls, softhsm):
        return softhsm.settings("sealed")


class TestSoftHsmResident(_SoftHsm):
    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls, softhsm):
        return softhsm.settings(
            "resident", wrapping_custody="HsmInternal", material_custody="HsmInternal"
        )


class TestSoftHsmWithoutTrust(_SoftHsm):
    trusted = False

    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls, softhsm):
        return softhsm.settings("untrusted", trusted=False)


def test_every_registered_backend_is_under_test():
    # The kit runs over sdf in examples/sdf/tests.
    assert {entry.name for entry in registry.available()} == {"software", "pkcs11", "sdf"}
