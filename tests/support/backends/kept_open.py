"""The conformance kit over one backend that stays open from test to test."""

import pytest

from hsmwrap import registry
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.testing.conformance import BackendConformance
from support.pkcs11.holder import Holder


class KeptOpen(BackendConformance):
    """A PKCS#11 backend, opened once for the class; the tests that close it get their own."""

    plugin = Pkcs11Backend
    keeps_backend_open = True

    @pytest.fixture(scope="class")
    @classmethod
    def settings(cls):
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def kept(cls, settings):
        with registry.open_backend("pkcs11", settings) as backend:
            yield backend

    @pytest.fixture
    def backend(self, request, settings, kept):
        if not request.node.originalname.endswith("_closed_after_close"):
            yield kept
            return
        with registry.open_backend("pkcs11", settings) as backend:
            yield backend

    @pytest.fixture
    def reopen(self, settings):
        return lambda: registry.open_backend("pkcs11", settings)

    @pytest.fixture
    def holder_reads(self, backend):
        return Holder(backend).reads
