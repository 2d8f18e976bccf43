"""Two processes on one database and one SoftHSM token, with keys in either custody."""

import signal

import pytest
from pkcs11 import Attribute
from support.kms.crasher import run_elsewhere
from support.kms.fakes import AES_MATERIAL, Client, build_kms, import_request

from hsmwrap.kms.objects import LEASE
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.registry import open_backend


@pytest.fixture(params=["HsmInternal", "HsmEncryptedDatabase"])
def settings(request, softhsm):
    return softhsm.settings("kms", material_custody=request.param)


@pytest.fixture
def backend(settings):
    backend = open_backend("pkcs11", settings)
    yield backend
    backend.close()


@pytest.fixture
def client(backend, database_url, tmp_path, clock):
    with build_kms(database_url, backend, tmp_path / "audit.log", clock) as kms:
        yield Client(kms)


@pytest.fixture
def elsewhere(settings, database_url, tmp_path):
    def run(action, parameters, die_at=None):
        return run_elsewhere(
            {
                "url": database_url,
                "backend": ("pkcs11", settings),
                "audit_file": str(tmp_path / "audit.log"),
                "die_at": die_at,
                "sweep_days": 0,
                "action": action,
                "parameters": parameters,
            }
        )

    return run


def objects(backend):
    """The number of imported keys that are objects in the token."""
    template = {Attribute.LABEL: "kms:material:Aliyun_AES_256"}
    connection = backend.ability(Pkcs11Backend)._connection
    return connection.run(lambda pooled: len(list(pooled.session.get_objects(template))))


def test_parameters_of_one_process_are_honoured_by_another(client, backend, elsewhere):
    before = objects(backend)
    key_id = client.create()
    request = import_request(client.parameters(key_id), AES_MATERIAL)
    done = elsewhere("ImportKeyMaterial", request)
    assert done.returncode == 0, done.stderr
    client.usable(key_id)
    client.import_material(key_id)
    client.usable(key_id)
    done = elsewhere("DeleteKeyMaterial", {"KeyId": key_id})
    assert done.returncode == 0, done.stderr
    assert (client.state(key_id), objects(backend)) == ("PendingImport", before)


@pytest.mark.parametrize("die_at", ["destruction scheduled", "material imported", "row committed"])
def test_process_killed_while_importing(client, backend, elsewhere, clock, die_at):
    before = objects(backend)
    key_id = client.create()
    request = import_request(client.parameters(key_id), AES_MATERIAL)
    died = elsewhere("ImportKeyMaterial", request, die_at)
    assert died.returncode == -signal.SIGKILL, died.stderr
    happened = die_at == "row committed"
    assert client.state(key_id) == ("Enabled" if happened else "PendingImport")
    client("ImportKeyMaterial", **request)
    client.usable(key_id)
    clock.advance(seconds=LEASE.total_seconds())
    client.kms.sweep()
    client("DeleteKeyMaterial", KeyId=key_id)
    assert objects(backend) == before
