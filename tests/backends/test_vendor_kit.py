"""HSMs with SM2 of their vendor's, played by the fault shim, under the conformance kit."""

import pytest
from support.backends.kept_open import KeptOpen
from support.faults.shim import fault_shim
from support.pkcs11.vendors import POOR, PROTECTING, SM_ONLY, by_officer, with_keys


class _Vendor(KeptOpen):
    simulated = None
    trusted = False

    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls, softhsm, tmp_path_factory):
        directory = tmp_path_factory.mktemp("vendor")
        shim = fault_shim(softhsm.module, directory / "shim")
        settings = cls.simulated.play(shim, directory, softhsm, key_prefix=cls.__name__)
        return with_keys(settings, softhsm, trusted=cls.trusted)


class TestPoor(_Vendor):
    simulated = POOR

    @pytest.fixture
    def holder_reads(self):
        """They do, and the report says so (tests/pkcs11/test_simulated_vendor.py)."""


class TestProtecting(_Vendor):
    simulated = PROTECTING


class TestSmOnly(_Vendor):
    """Key sets are trusted, so that keys move from one to the next."""

    simulated = SM_ONLY
    trusted = True

    @pytest.fixture
    def rotate_keys(self, softhsm, settings):
        return lambda: by_officer("rotate", settings, softhsm)
