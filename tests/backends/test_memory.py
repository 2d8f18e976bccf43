"""The backend that ships for tests keeps the whole contract, in both custodies."""

from typing import ClassVar

import pytest

from hsmwrap.testing import MemoryBackend
from hsmwrap.testing.conformance import BackendConformance

CUSTODIES = ("wrapping_custody", "material_custody")


@pytest.mark.slow
class TestSealed(BackendConformance):
    plugin = MemoryBackend
    custody: ClassVar = "HsmEncryptedDatabase"

    @pytest.fixture
    def settings(self, tmp_path):
        return dict.fromkeys(CUSTODIES, self.custody) | {"directory": str(tmp_path)}

    @pytest.fixture
    def other_settings(self, settings, tmp_path):
        return settings | {"directory": f"{tmp_path}-another"}


@pytest.mark.slow
class TestResident(TestSealed):
    custody: ClassVar = "HsmInternal"
