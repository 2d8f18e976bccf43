import os
from pathlib import Path

import pytest
from support import skips
from support.services.softhsm import make_softhsm


def pytest_configure(config):
    # Workers are modules of support that run as processes of their own.
    paths = (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    skips.register(config)


@pytest.fixture(scope="session")
def softhsm(tmp_path_factory):
    """The private token of this session; SoftHSM reads its configuration once per process."""
    token = make_softhsm(tmp_path_factory.mktemp("softhsm"))
    os.environ.update(token.environment)
    return token


@pytest.fixture(scope="session")
def postgres_cluster():
    pytest.importorskip("psycopg", reason="capability: psycopg is not installed")
    from support.services.postgres import PrivateCluster, binaries

    if binaries() is None:
        pytest.skip("capability: PostgreSQL is not installed")
    with PrivateCluster() as cluster:
        yield cluster
