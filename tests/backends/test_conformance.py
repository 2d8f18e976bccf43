"""One suite over every backend that is registered, in each way that it keeps keys."""

import pytest

from hsmwrap import registry
from hsmwrap.testing.conformance import BackendConformance


class TestSoftware(BackendConformance):
    @pytest.fixture
    def backend(self):
        with registry.open_backend("software", {}) as backend:
            yield backend


class TestSoftwareWithGmssl(BackendConformance):
    @pytest.fixture
    def backend(self):
        with registry.open_backend("software", {"sm2_engine": "gmssl"}) as backend:
            yield backend


class _Pkcs11(BackendConformance):
    @pytest.fixture
    def count_objects(self, backend, count_token_objects):
        backend.capabilities()  # the probe makes session objects of its own
        return count_token_objects


class TestSoftHsmSealed(_Pkcs11):
    @pytest.fixture
    def backend(self, open_pkcs11):
        return open_pkcs11("sealed")


class TestSoftHsmResident(_Pkcs11):
    @pytest.fixture
    def backend(self, open_pkcs11):
        return open_pkcs11("resident", wrapping_custody="resident", material_custody="HsmInternal")


class TestSoftHsmWithoutTrust(_Pkcs11):
    @pytest.fixture
    def backend(self, open_pkcs11):
        return open_pkcs11("untrusted", trusted=False)


def test_every_registered_backend_is_under_test():
    assert {entry.name for entry in registry.available()} == {"software", "pkcs11"}
