import shutil

import pytest
from support.kms.fakes import Client, Clock, DirectoryBackend, build_kms

from hsmwrap.kms.database import Database


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database_url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/kms.db"
    return request.getfixturevalue("postgres_cluster").new_database()


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory):
    file = tmp_path_factory.mktemp("migrated") / "kms.db"
    database = Database(f"sqlite:///{file}")
    database.migrate()
    database.close()
    return file


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, tmp_path):
    """A database with the schema, copied: the migrations take longer than most tests."""
    if request.param == "sqlite":
        return f"sqlite:///{shutil.copy(request.getfixturevalue('migrated_sqlite'), tmp_path)}"
    return request.getfixturevalue("postgres_cluster").new_database(migrated=True)


@pytest.fixture
def sqlite_url(tmp_path):
    return f"sqlite:///{tmp_path}/kms.db"


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def open_backend(tmp_path):
    """Opens a backend of either custody on the same keys, like another process."""

    def opened(custody="HsmInternal", **more):
        return DirectoryBackend(tmp_path / "objects", custody, **more)

    return opened


@pytest.fixture(params=["HsmInternal", "HsmEncryptedDatabase"])
def custody(request):
    return request.param


@pytest.fixture
def open_kms(database_url, open_backend, tmp_path, clock):
    """Opens a KMS on the test's database; several of them act like several processes."""
    opened = []

    def opens(custody="HsmInternal", wrapping="HsmEncryptedDatabase", **more):
        more = {"clock": clock} | more
        backend = open_backend(custody, wrapping=wrapping)
        kms = build_kms(database_url, backend, tmp_path / "audit.log", **more)
        opened.append(kms)
        return kms

    yield opens
    for kms in opened:
        kms.close()


@pytest.fixture
def kms(open_kms):
    return open_kms()


@pytest.fixture
def client(kms):
    return Client(kms)


@pytest.fixture
def objects(open_backend):
    """Counts the backend's objects."""
    backend = open_backend()
    yield lambda: len(backend.objects())
    backend.close()
