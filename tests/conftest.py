import os
from pathlib import Path

import pytest
from support import skips


def pytest_configure(config):
    # Workers are modules of support that run as processes of their own.
    paths = (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    skips.register(config)


@pytest.fixture(scope="session")
def softhsm(hsmwrap_softhsm):
    """The private token of this session, by the fixture that embedders use."""
    return hsmwrap_softhsm


@pytest.fixture(scope="session")
def postgres_cluster():
    pytest.importorskip("psycopg", reason="capability: psycopg is not installed")
    from support.services.postgres import PrivateCluster, binaries

    if binaries() is None:
        pytest.skip("capability: PostgreSQL is not installed")
    with PrivateCluster() as cluster:
        yield cluster
