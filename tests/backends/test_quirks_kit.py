"""HSM tokens that differ from SoftHSM2 in many ways at once, under the conformance kit.

With ``HSMWRAP_QUIRKS=each`` in the environment, each token of the table as well, which takes long.
"""

import os

import pytest
from support.backends.kept_open import KeptOpen
from support.faults.shim import fault_shim
from support.pkcs11.holder import Holder
from support.pkcs11.quirks import CARD, NETWORK_HSM, QUIRKS, R

from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.testing.conformance import BackendConformance

# Such a token does not keep the holder of the PIN from reading keys, and the report says so.
READABLE = (
    R.NO_HARDENING
    | R.NO_TRUST
    | R.UNWRAP_TEMPLATE_IGNORED
    | R.UNWRAP_IGNORES_PROTECTION
    | R.ALLOWED_MECHANISMS_IGNORED
)
# The holder of the PIN works with sessions, session objects and a known key of their own.
NO_HOLDER = (
    READABLE | R.NO_SESSION_OBJECTS | R.NO_SECRET_KEY_CREATION | R.ONE_SESSION | R.LOGIN_PER_SESSION
)


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


class _Each(_Quirk):
    @pytest.fixture
    def holder_reads(self, request):
        if self.quirk.restrictions & NO_HOLDER:
            return None
        return request.getfixturevalue("holder_of_the_pin")

    @pytest.fixture
    def holder_of_the_pin(self, backend):
        return Holder(backend).reads


class _OneSession(BackendConformance):
    """No second backend beside the first."""

    plugin = Pkcs11Backend
    quirk = None
    settings = _Quirk.settings

    @pytest.fixture
    def reopen(self):
        return None


if os.environ.get("HSMWRAP_QUIRKS") == "each":
    for number, quirk in enumerate(QUIRKS):
        kit = _OneSession if R.ONE_SESSION in quirk.restrictions else _Each
        name = f"TestQuirk{number:02}"
        globals()[name] = type(name, (kit,), {"quirk": quirk, "__doc__": str(quirk)})
