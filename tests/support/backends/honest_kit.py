"""The conformance kit over the honest backend, and how it is opened."""

import pytest

from hsmwrap.backend import Custody
from hsmwrap.testing.conformance import BackendConformance
from support.backends.honest import HonestBackend


class HonestKit(BackendConformance):
    plugin = HonestBackend
    custody = Custody.HSM_ENCRYPTED_DATABASE

    @pytest.fixture
    def settings(self, tmp_path):
        custody = str(self.custody)
        return {
            "directory": str(tmp_path),
            "wrapping_custody": custody,
            "material_custody": custody,
        }

    @pytest.fixture
    def other_settings(self, settings, tmp_path):
        return settings | {"directory": f"{tmp_path}-another"}

    @pytest.fixture
    def holder_reads(self, backend):
        backend = backend.ability(self.plugin) or backend
        return lambda key: backend.readable.get(key.data)

    @pytest.fixture
    def cannot_count(self):
        return None


class BareKit(HonestKit):
    """The same without the guard, for what the guard repairs."""

    @pytest.fixture
    def backend(self, settings):
        with self.plugin.from_settings(settings) as backend:
            yield backend

    @pytest.fixture
    def reopen(self, settings):
        return lambda: self.plugin.from_settings(settings)
