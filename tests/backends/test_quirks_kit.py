"""HSM tokens that differ from SoftHSM2 in many ways at once, under the conformance kit."""

import pytest
from support.backends.kept_open import KeptOpen
from support.faults.shim import fault_shim
from support.pkcs11.quirks import CARD, NETWORK_HSM

from hsmwrap.pkcs11 import Pkcs11Backend


class _Quirk(KeptOpen):
    quirk = None

    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls, softhsm, tmp_path_factory):
        shim = fault_shim(softhsm.module, tmp_path_factory.mktemp("quirk"))
        settings = cls.quirk.play(shim, softhsm, key_prefix=cls.__name__)
        Pkcs11Backend.initialise_keys(settings)
        return settings


class TestNetworkHsm(_Quirk):
    quirk = NETWORK_HSM


class TestCard(_Quirk):
    quirk = CARD

    @pytest.fixture
    def holder_reads(self):
        """The holder of the PIN makes session objects, of which this token has none."""
