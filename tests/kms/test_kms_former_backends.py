"""Several backends: a key is used by that of its reference, new ones go to the level's."""

import json
from datetime import UTC, datetime

import pytest
from sqlalchemy import select
from support.kms.fakes import AES_MATERIAL, OTHER_MATERIAL, Client, Clock, DirectoryBackend

from hsmwrap.catalog import ProtectionLevel
from hsmwrap.cli import main
from hsmwrap.errors import (
    ConfigurationError,
    HsmUnavailable,
    InvalidImportToken,
    InvalidKeyMaterial,
)
from hsmwrap.kms import Kms, StaticAccessKeys, load_config
from hsmwrap.kms.audit import AuditLog
from hsmwrap.kms.checking import check, try_to_open
from hsmwrap.kms.database import Database
from hsmwrap.kms.errors import KeyUnusable
from hsmwrap.kms.keysets import usage_of_backends
from hsmwrap.kms.schema import Key, ScheduledDestruction
from hsmwrap.policy import Deployment
from hsmwrap.registry import open_backend
from hsmwrap.testing import MemoryBackend

HSM = ProtectionLevel.HSM


class Site:
    """A KMS that is opened on one database with one backend, or with an old one beside it."""

    def __init__(self, url, directory, custody):
        self.url, self.directory, self.custody = url, directory, custody
        self.clock = Clock()
        self.opened = []

    def backend(self, name):
        return DirectoryBackend(self.directory / name, self.custody, name=name)

    def open(self, name, *former):
        backends = {each: self.backend(each) for each in (name, *former)}
        kms = Kms(
            Database(self.url, sync=False),
            {HSM: backends[name]},
            Deployment(),
            former_backends=[backends[each] for each in former],
            access_keys=StaticAccessKeys(()),
            audit_log=AuditLog(self.directory / "audit.log", self.clock),
            clock=self.clock,
        )
        self.opened.append(kms)
        return Client(kms), backends

    def backend_of(self, client, key_id):
        with client.kms._database.read() as transaction:
            return transaction.scalar(select(Key.backend).where(Key.key_id == key_id))


@pytest.fixture
def site(database_url, tmp_path, custody):
    site = Site(database_url, tmp_path, custody)
    yield site
    for kms in site.opened:
        kms.close()


def test_one_moves_to_another_hsm_side_by_side(site):
    before, _ = site.open("old")
    stays, moves = before.create(), before.create()
    for key_id in (stays, moves):
        before.import_material(key_id)
    blobs = {key_id: before.usable(key_id) for key_id in (stays, moves)}

    client, backends = site.open("new", "old")
    # What is there is used where it is.
    for key_id, blob in blobs.items():
        assert client("Decrypt", CiphertextBlob=blob)["Plaintext"] == "aGVsbG8="
        assert site.backend_of(client, key_id) == "old"
    # What is imported goes to the new one: again, and for the first time. It is the same key.
    with pytest.raises(InvalidKeyMaterial):
        client.import_material(moves, OTHER_MATERIAL)
    client.import_material(moves)
    created = client.create()
    client.import_material(created)
    assert client("Decrypt", CiphertextBlob=blobs[moves])["Plaintext"] == "aGVsbG8="
    made = client("CreateKey", ProtectionLevel="HSM")["KeyMetadata"]["KeyId"]
    for key_id in (moves, created, made):
        assert site.backend_of(client, key_id) == "new"
        client.usable(key_id)
    counted = {(u.backend, u.keys) for u in usage_of_backends(client.kms._database)}
    assert counted == {("old", 1), ("new", 3)}
    if site.custody == "HsmInternal":  # the object of the key that moved was destroyed
        assert [len(backends[name].objects()) for name in ("old", "new")] == [1, 3]


def test_an_import_token_of_the_old_backend_is_honoured_by_it(site):
    before, _ = site.open("old")
    key_id = before.create()
    parameters = before.parameters(key_id)
    client, backends = site.open("new", "old")
    client.import_material(key_id, AES_MATERIAL, parameters)
    assert site.backend_of(client, key_id) == "old"
    client.usable(key_id)
    with client.kms._database.read() as transaction:
        assert transaction.scalars(select(ScheduledDestruction)).all() == []
    # Still bound to its key, and to its time.
    with pytest.raises(InvalidImportToken):
        client.import_material(
            client.create(), AES_MATERIAL, parameters | {"KeyId": client.create()}
        )
    backends["old"].unavailable = True
    assert client.import_material(key_id)
    assert site.backend_of(client, key_id) == "new"


def test_a_token_is_not_called_invalid_while_its_backend_cannot_say(site, monkeypatch):
    before, _ = site.open("old")
    key_id = before.create()
    parameters = before.parameters(key_id)
    client, backends = site.open("new", "old")

    def unavailable(*_):
        raise HsmUnavailable("unavailable")

    monkeypatch.setattr(backends["old"], "verify_mac", unavailable)
    with pytest.raises(HsmUnavailable):
        client.import_material(key_id, AES_MATERIAL, parameters)
    client.import_material(key_id)
    assert site.backend_of(client, key_id) == "new"


def test_a_token_without_its_backend_is_refused(site):
    before, _ = site.open("old")
    key_id = before.create()
    parameters = before.parameters(key_id)
    client, _ = site.open("new")
    with pytest.raises(InvalidImportToken):
        client.import_material(key_id, AES_MATERIAL, parameters)


def test_keys_of_a_backend_that_is_not_configured(site, caplog):
    before, _ = site.open("old")
    key_id = before.create()
    before.import_material(key_id)
    blob = before.usable(key_id)
    client, _ = site.open("new")
    # Before a client uses one, and once.
    client.kms.sweep()
    (counted,) = (r for r in caplog.records if "backend that is not configured" in r.getMessage())
    assert (counted.backend, counted.keys) == ("old", 1)
    assert counted.why == "add [former_backends.old]"
    for _ in range(2):
        with pytest.raises(KeyUnusable, match=r"is in backend old, .* add \[former_backends.old\]"):
            client("Decrypt", CiphertextBlob=blob)
    logged = [r for r in caplog.records if r.getMessage() == "a key cannot be used"]
    assert [(r.key_id, r.backend) for r in logged] == [(key_id, "old")]
    health = client.kms.health()
    said = "ready, but 1 keys cannot be used: 1 of backend old, which is not configured"
    assert (health.ready, health.facts["keys"]) == (True, said)
    assert client.kms.gauges()["keys_unusable"] == 1
    client.import_material(key_id)
    client.kms.sweep()
    assert client.kms.health().facts["keys"] == "ready"
    assert client("Decrypt", CiphertextBlob=blob)["Plaintext"] == "aGVsbG8="


def test_a_key_that_its_backend_lost(site, caplog):
    client, backends = site.open("hsm")
    lost, other = client.create(), client.create()
    for key_id in (lost, other):
        client.import_material(key_id)
    blob = client.usable(lost)
    if site.custody == "HsmInternal":
        for object_id in backends["hsm"].objects():
            backends["hsm"].remove_object(object_id)
    else:
        store = {"store": backends["hsm"].ability(MemoryBackend).store}
        MemoryBackend.rotate_keys(store)
        MemoryBackend.retire_keys(store, "1")
    with pytest.raises(KeyUnusable, match=f"backend hsm does not have the material of key {lost}"):
        client("Decrypt", CiphertextBlob=blob)
    assert KeyUnusable.code == "Rejected.Unavailable"
    assert "a key cannot be used" in caplog.text
    said = "ready, but 1 keys cannot be used: 1 that their backend does not have (the log names"
    assert client.kms.health().facts["keys"].startswith(said)
    # Another process deletes it: the next sweep forgets it.
    elsewhere, _ = site.open("hsm")
    for key_id in (lost, other):
        elsewhere("DeleteKeyMaterial", KeyId=key_id)
    client.kms.sweep()
    assert client.kms.gauges()["keys_unusable"] == 0


def test_keys_of_a_key_set_that_their_backend_lost(site, caplog):
    """Before a client uses one; a restored key set ends it. Objects need no key set."""
    lost = 2 * (site.custody != "HsmInternal")
    client, backends = site.open("hsm")
    for _ in range(2):
        client.import_material(client.create())
    store = backends["hsm"].ability(MemoryBackend).store
    before = {name: value for name, value in store.items() if name.startswith("key-set-")}
    MemoryBackend.rotate_keys({"store": store})
    MemoryBackend.retire_keys({"store": store}, "1")
    client.kms.sweep()
    client.kms.sweep()
    logged = [r for r in caplog.records if "their backend does not have" in r.getMessage()]
    assert [(r.backend, r.key_set, r.keys) for r in logged] == [("hsm", "1", 2)] * bool(lost)
    said = "ready, but 2 keys cannot be used: 2 of key set 1, which backend hsm does not have"
    assert client.kms.health().facts["keys"] == (said if lost else "ready")
    assert client.kms.gauges()["keys_unusable"] == lost
    assert {key_set for _, key_set, _ in client.kms.gauges()["key_set"]} == {"2"}
    for name, value in before.items():
        store[name] = value
    client.kms.sweep()
    assert client.kms.health().facts["keys"] == "ready"
    assert {key_set for _, key_set, _ in client.kms.gauges()["key_set"]} == {"1", "2"}


def test_an_hsm_that_does_not_answer_has_lost_no_key_set(site, monkeypatch):
    client, backends = site.open("hsm")
    client.import_material(client.create())
    plugin = backends["hsm"].ability(MemoryBackend)

    def fail():
        raise HsmUnavailable("unreachable")

    monkeypatch.setattr(plugin, "key_set_ids", fail)
    client.kms.sweep()
    assert client.kms.health().facts["keys"] == "ready"
    assert client.kms.gauges()["keys_unusable"] == 0


def test_a_level_is_served_by_no_backend_that_may_not(site, monkeypatch):
    """Whatever a row says: design invariant 2."""
    client, _ = site.open("hsm")
    key_id = client.create()
    client.import_material(key_id)
    capabilities = client.kms._backends[HSM].capabilities()
    software = frozenset({ProtectionLevel.SOFTWARE})
    only = type(capabilities)(**{
        **{name: getattr(capabilities, name) for name in capabilities.__slots__},
        "protection_levels": software,
    })  # fmt: skip
    monkeypatch.setattr(type(client.kms._backends[HSM]), "capabilities", lambda _self: only)
    with pytest.raises(KeyUnusable, match="has level HSM, which backend hsm does not serve"):
        client("Encrypt", KeyId=key_id, Plaintext="aGVsbG8=")


def test_health_and_metrics_have_former_backends(site):
    client, _ = site.open("new", "old")
    assert client.kms.health().facts["former backend old"]
    names = [backend.name for backend in client.kms.watched()[0]]
    assert names == ["new", "old"]


# --- the configuration


@pytest.fixture
def file(tmp_path):
    access = tmp_path / "access.toml"
    access.write_text('[[access_key]]\nid = "me"\nsecret = "x"\n')
    access.chmod(0o400)
    (tmp_path / "module.so").touch()
    file = tmp_path / "server.toml"
    file.write_text(
        f'database_url = "sqlite:///{tmp_path}/kms.db"\naccess_key_file = "{access}"\n'
        f'audit_file = "{tmp_path}/audit.log"\nmetrics_address = ""\n'
        f'[backends.HSM]\nplugin = "pkcs11"\n'
        f'settings = {{ module = "{tmp_path}/module.so", name = "new" }}\n'
        f'[former_backends.pkcs11]\nplugin = "pkcs11"\n'
        f'settings = {{ module = "{tmp_path}/module.so", token_label = "old" }}\n'
    )
    return file


def test_configured(file):
    config = load_config(file)
    check(config)
    assert list(config.former_backends) == ["pkcs11"]


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("[former_backends.pkcs11]", "[former_backends.old]", "the backend's name is 'pkcs11'"),
        (', name = "new"', "", "two backends are named 'pkcs11'"),
        ("token_label", "tokn_label", "former_backends.pkcs11] PKCS#11 backend: unknown setting"),
    ],
)
def test_wrongly_configured(file, right, wrong, said):
    file.write_text(file.read_text().replace(right, wrong))
    with pytest.raises(ConfigurationError) as caught:
        check(load_config(file))
    assert said in str(caught.value)


def test_usage_is_printed_without_any_hsm(file, capsys, tmp_path):
    database = Database(f"sqlite:///{tmp_path}/kms.db")
    database.migrate()
    with database.write() as transaction:
        for number, (backend, key_set) in enumerate(
            [("new", "1"), ("pkcs11", "3"), ("pkcs11", None)]
        ):
            transaction.add(_row(number, backend, key_set))
    usage = ["keys", "usage", "--config", str(file)]
    assert main([*usage, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["usage"]
    assert [(u["backend"], u["use"], u["key_set"], u["keys"]) for u in printed] == [
        ("new", "new keys of HSM", "1", 1),
        ("pkcs11", "former", "", 1),
        ("pkcs11", "former", "3", 1),
    ]
    with database.write() as transaction:
        transaction.add(_row(9, "gone", "1"))
    assert main(usage) == 1
    assert "gone     NOT CONFIGURED" in capsys.readouterr().out
    tried = {each.part: each for each in try_to_open(load_config(file))}
    assert not tried["stored keys"].ok
    assert "not configured: gone;" in tried["stored keys"].detail
    database.close()


def _row(number, backend, key_set):
    words = {"key_spec": "Aliyun_AES_256", "origin": "EXTERNAL", "state": "Enabled"}
    return Key(
        key_id=str(number), version_id="v", arn="a", protection_level=HSM, description="",
        creator="me", created_at=datetime.now(UTC), backend=backend, key_set=key_set,
        reference=b"r", **words,
    )  # fmt: skip


def test_two_backends_on_a_real_module(hsmwrap_softhsm, database_url, tmp_path):
    """In one process, with key sets of their own, as two HSMs have them."""
    opened = {
        name: open_backend("pkcs11", hsmwrap_softhsm.settings(f"former-{name}") | {"name": name})
        for name in ("old", "new")
    }
    clock = Clock()

    def kms(name, *former):
        return Kms(
            Database(database_url, sync=False), {HSM: opened[name]}, Deployment(),
            former_backends=[opened[each] for each in former],
            access_keys=StaticAccessKeys(()),
            audit_log=AuditLog(tmp_path / "audit.log", clock), clock=clock,
        )  # fmt: skip

    before = Client(kms("old"))
    key_id, pending = before.create(), before.create()
    before.import_material(key_id)
    blob, token = before.usable(key_id), before.parameters(pending)
    with kms("new", "old") as both:
        client = Client(both)
        assert client("Decrypt", CiphertextBlob=blob)["Plaintext"] == "aGVsbG8="
        client.import_material(pending, AES_MATERIAL, token)
        client.import_material(key_id)
        counted = {(u.backend, u.keys) for u in usage_of_backends(both._database)}
        assert counted == {("old", 1), ("new", 1)}
        assert client("Decrypt", CiphertextBlob=blob)["Plaintext"] == "aGVsbG8="
        client.usable(pending)
    before.kms.close()
