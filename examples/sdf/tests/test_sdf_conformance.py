"""The conformance kit over the plug-in, with the simulated device."""

import pytest

from hsmwrap.testing.conformance import PAIRS, BackendConformance
from hsmwrap_sdf import SdfBackend
from hsmwrap_sdf.leases import Leases
from hsmwrap_sdf.settings import SdfSettings

pytestmark = pytest.mark.slow


class TestSdf(BackendConformance):
    plugin = SdfBackend

    @pytest.fixture(params=PAIRS[3:], ids=["SM2PKE"])
    def pair(self, request):
        """The one that the plug-in serves: for the others each test would open it to be skipped."""
        return request.param

    @pytest.fixture
    def settings(self, sdf_settings):
        return sdf_settings

    @pytest.fixture
    def count_objects(self, device, settings):
        """Leased pairs, and handles of keys."""
        read = SdfSettings.from_mapping(settings)
        leases = Leases(read.state() / "leases.sqlite", read.pool, reuse=read.reuse_pairs)
        return lambda: leases.counts().leased + device.keys
