"""The conformance kit over the honest backend, and how it is opened."""

import pytest

from hsmwrap.backend import Custody
from hsmwrap.software import SoftwareBackend
from hsmwrap.testing.conformance import BackendConformance
from support.backends.honest import HonestBackend


class HonestKit(BackendConformance):
    opens = HonestBackend
    custody = Custody.HSM_ENCRYPTED_DATABASE

    @pytest.fixture
    def settings(self, tmp_path):
        SoftwareBackend.initialise_keys({"keyring_file": f"{tmp_path}/keyring"})
        return {"directory": str(tmp_path), "custody": str(self.custody)}

    @pytest.fixture
    def backend(self, settings):
        with self.opens.from_settings(settings) as backend:
            yield backend

    @pytest.fixture
    def reopen(self, settings):
        return lambda: self.opens.from_settings(settings)

    @pytest.fixture
    def count_objects(self, backend):
        return lambda: len(backend.objects())

    @pytest.fixture
    def cannot_count(self):
        return None
