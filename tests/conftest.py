import os
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from support import fast, memory_disk, rsa_pairs, skips
from support.pkcs11 import keys_command
from support.pkcs11.objects import destroy_all

from hsmwrap.testing.softhsm import SoftHsm

# What may name a token or a server outside of the tests.
OUTSIDE = ("SOFTHSM2_", "P11_KIT_", "HSMWRAP_PKCS11_", "HSMWRAP_TOKEN_", "HSMWRAP_PIN_",
           "HSMWRAP_SO_PIN_", "HSMWRAP_SERVER_", "HSMWRAP_KEYRING_", "HSMWRAP_CONFIG")  # fmt: skip


def pytest_addoption(parser):
    fast.add_option(parser)


def pytest_configure(config):
    memory_disk.use()
    for name in [name for name in os.environ if name.startswith(OUTSIDE)]:
        del os.environ[name]
    os.environ["SOFTHSM2_CONF"] = "/nonexistent"  # otherwise SoftHSM reads the machine's
    # Workers are modules of support that run as processes of their own.
    paths = (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    # The time that one example takes says how busy the machine is. scripts/mutate asks for few.
    examples = int(os.environ.get("HSMWRAP_EXAMPLES", "100"))
    hypothesis.settings.register_profile("patient", deadline=None, max_examples=examples)
    hypothesis.settings.load_profile("patient")
    fast.configure(config)
    rsa_pairs.use(preload=not config.option.fast)
    skips.register(config)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    fast.select(config, items)


CLUSTER = pytest.StashKey[Any]()
TOKEN = pytest.StashKey[SoftHsm]()
BACKENDS = pytest.StashKey[Any]()


@pytest.fixture(scope="session")
def softhsm(request):
    """The private token of this process, by the fixture that embedders use."""
    fast.needs_service()
    keys_command.use()
    token = request.getfixturevalue("hsmwrap_softhsm")
    request.config.stash[TOKEN] = token
    return token


@pytest.fixture(scope="session")
def hsmwrap_open_backends(request, hsmwrap_open_backends):
    request.config.stash[BACKENDS] = hsmwrap_open_backends
    return hsmwrap_open_backends


@pytest.fixture(scope="module", autouse=True)
def empty_token(request):
    """A token that is as empty for the last module as for the first."""
    yield
    if backends := request.config.stash.get(BACKENDS, None):
        backends.close()
    if token := request.config.stash.get(TOKEN, None):
        destroy_all(token)


@pytest.fixture(scope="session")
def postgres_cluster(request):
    fast.needs_service()
    pytest.importorskip("psycopg", reason="capability: psycopg is not installed")
    from support.services.postgres import PrivateCluster, binaries

    if binaries() is None:
        pytest.skip("capability: PostgreSQL is not installed")
    with PrivateCluster() as cluster:
        request.config.stash[CLUSTER] = cluster
        yield cluster


@pytest.fixture(autouse=True)
def few_databases(request):
    """No database that this test makes stays in memory; those of a module do."""
    cluster = request.config.stash.get(CLUSTER, None)
    before = cluster.made() if cluster else frozenset()
    yield
    if cluster := request.config.stash.get(CLUSTER, None):
        cluster.drop(cluster.made() - before)
