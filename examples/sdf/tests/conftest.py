import pytest
import simulated

from hsmwrap.guard import guarded
from hsmwrap_sdf import SdfBackend


def pytest_configure(config):
    # Run alone, these tests have no tests/conftest.py above them.
    config.addinivalue_line("markers", "slow: needs the simulated device; not in a fast run")


@pytest.fixture(scope="session")
def sdf_library(tmp_path_factory):
    return simulated.build(tmp_path_factory.mktemp("sdf"))


@pytest.fixture(scope="session")
def device(sdf_library, tmp_path_factory):
    """One for all tests: none changes its keys but those that make new pairs."""
    return simulated.Device(sdf_library, tmp_path_factory.mktemp("sdf") / "device")


@pytest.fixture
def sdf_settings(device, tmp_path, monkeypatch):
    """Settings on the device, with a key set and an empty file of leases."""
    monkeypatch.setenv("SDF_SIMULATOR", str(device.directory))
    made = simulated.settings_in(tmp_path, device)
    SdfBackend.initialise_keys(made)
    return made


@pytest.fixture
def sdf(sdf_settings):
    with guarded(SdfBackend.from_settings(sdf_settings)) as backend:
        yield backend
