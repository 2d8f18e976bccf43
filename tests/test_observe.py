"""Trace hooks and metrics: everything is told, nothing is changed, nothing secret leaks."""

import secrets

import pytest
from keypool_fakes import OAEP, FakeBackend, ManualPool
from prometheus_client import CollectorRegistry

from hsmwrap import metrics, registry
from hsmwrap.backend import Backend
from hsmwrap.catalog import KeySpec, ProtectionLevel
from hsmwrap.errors import ConfigurationError, HsmUnavailable, InvalidKeyMaterial
from hsmwrap.imports import Cmk, ImportService
from hsmwrap.observe import OK, Operation, observed
from hsmwrap.policy import Deployment
from hsmwrap.testing.clients import openssl_encrypt

QUIET = {"name", "health", "from_settings", "list_keys"} | {
    f"{verb}_keys" for verb in ("initialise", "rotate", "retire")
}


@pytest.fixture
def told():
    return []


@pytest.fixture
def backend():
    with registry.open_backend("software", {"serve_hsm_level": True}) as backend:
        yield backend


def test_every_method_of_the_contract_is_passed_on():
    contract = {name for name in vars(Backend) if not name.startswith("_")}
    wrapper = type(observed(FakeBackend(), print))
    missing = contract - QUIET - {"contract_version"} - set(vars(wrapper))
    assert missing == set()


def test_a_whole_import_is_told_in_order(backend, told):
    watched = observed(backend, told.append)
    service = ImportService({ProtectionLevel.HSM: watched}, Deployment())
    cmk = Cmk("key-1", KeySpec.ALIYUN_AES_256, ProtectionLevel.HSM)
    told.clear()
    parameters = service.get_parameters_for_import(cmk, *OAEP)
    ciphertext = openssl_encrypt(OAEP[1], parameters.public_key, secrets.token_bytes(32))
    key = service.import_key_material(cmk, ciphertext, parameters.import_token).imported.key
    assert watched.decrypt(key, watched.encrypt(key, b"m")) == b"m"
    names = [operation.name for operation in told if operation.name != "capabilities"]
    expected = ["generate_wrapping_key", "seal", "check_seal", "unwrap_material"]
    assert names == [*expected, "encrypt", "decrypt"]
    assert {operation.outcome for operation in told} == {OK}
    assert {operation.backend for operation in told} == {"software"}


def test_failures_are_told_by_name_and_raised_unchanged(backend, told):
    key = backend.generate_wrapping_key(*OAEP, expires_at=None)
    watched = observed(backend, told.append)
    with pytest.raises(InvalidKeyMaterial):
        watched.unwrap_material(
            key.private_key, OAEP[1], bytes(256), key_spec=KeySpec.ALIYUN_AES_256
        )
    (operation,) = told
    assert (operation.name, operation.outcome) == ("unwrap_material", "InvalidKeyMaterial")
    assert (operation.algorithm, operation.key_spec) == (OAEP[1], KeySpec.ALIYUN_AES_256)


def test_seconds_are_those_of_the_timer(told):
    ticks = iter([10.0, 12.5])
    observed(FakeBackend(), told.append, timer=lambda: next(ticks)).seal(b"data")
    assert told[0].seconds == 2.5


def test_an_observer_that_raises_changes_nothing_and_is_logged_once(caplog):
    def broken(_operation):
        raise ZeroDivisionError("0123456789abcdef")

    watched = observed(FakeBackend(), broken)
    for _ in range(3):
        assert watched.seal(b"data").key_id == "1"
    (record,) = caplog.records
    assert record.error == "ZeroDivisionError"
    assert "0123456789abcdef" not in str(vars(record))


def test_an_operation_has_no_room_for_a_secret():
    fields = set(Operation.__dataclass_fields__)
    assert fields == {"name", "backend", "outcome", "seconds", "spec", "algorithm", "key_spec"}


# --- Prometheus


def test_operations_are_counted_by_outcome():
    counted = CollectorRegistry()
    fake = FakeBackend()
    watched = observed(fake, metrics.PrometheusObserver(counted))
    watched.generate_wrapping_key(*OAEP, expires_at=None)
    fake.fail = HsmUnavailable("away")
    with pytest.raises(HsmUnavailable):
        watched.generate_wrapping_key(*OAEP, expires_at=None)
    labels = {
        "backend": "fake",
        "operation": "generate_wrapping_key",
        "spec": OAEP[0],
        "algorithm": OAEP[1],
        "key_spec": "",
    }
    for outcome in (OK, "HsmUnavailable"):
        name = "hsmwrap_backend_operations_total"
        assert counted.get_sample_value(name, labels | {"outcome": outcome}) == 1
    where = {"backend": "fake", "operation": "generate_wrapping_key"}
    assert counted.get_sample_value("hsmwrap_backend_operation_seconds_count", where) == 2


def test_facts_are_read_when_somebody_scrapes():
    fake, pool = FakeBackend(), ManualPool()
    fake.facts = {"breaker": "open", "recoveries": {"DEVICE_ERROR": 3}, "sessions_in_use": 2}
    pool.prepare(fake, [OAEP])
    pool.work()
    text = metrics.render(metrics.FactsCollector([fake], [pool])).decode()
    kind = f'{{algorithm="{OAEP[1]}",backend="fake",spec="{OAEP[0]}"}}'
    level = pool.fact().level
    for line in (
        'hsmwrap_backend_breaker{backend="fake",state="open"} 1.0',
        'hsmwrap_backend_breaker{backend="fake",state="closed"} 0.0',
        'hsmwrap_backend_recoveries_total{backend="fake",ckr="DEVICE_ERROR"} 3.0',
        'hsmwrap_backend_sessions_in_use{backend="fake"} 2.0',
        'hsmwrap_backend_ready{backend="fake"} 1.0',
        f"hsmwrap_keypool_level{kind} {float(level)}",
    ):
        assert line in text.splitlines(), text
    assert level > 0


def test_the_pkcs11_backend_s_facts_are_all_exported(softhsm):
    with registry.open_backend("pkcs11", softhsm.settings("observe")) as backend:
        backend.seal(b"data")
        text = metrics.render(metrics.FactsCollector([backend])).decode()
        facts = set(backend.health().facts) - {"recoveries"}
    for fact in facts:
        assert f'hsmwrap_backend_{fact}{{backend="pkcs11"' in text


def test_two_backends_of_one_name_are_refused():
    with pytest.raises(ConfigurationError, match="told apart"):
        metrics.FactsCollector([FakeBackend(), FakeBackend()])
