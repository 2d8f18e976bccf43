"""Trace hooks and metrics: all calls are observed and unchanged, and no secret leaks."""

import os
import secrets
import subprocess
import sys
import threading
import time
from abc import abstractmethod
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from prometheus_client import CollectorRegistry
from support.keypool.fakes import EVERY_CALL, NOW, OAEP, Child, Echo, FakeBackend, ManualPool

from hsmwrap import metrics, registry
from hsmwrap.backend import Ability, Backend, HasKeySets, ReapsWrappingKeys
from hsmwrap.catalog import KeySpec, ProtectionLevel
from hsmwrap.composition import Composition
from hsmwrap.errors import ConfigurationError, HsmUnavailable, InvalidKeyMaterial
from hsmwrap.imports import Cmk, ImportService
from hsmwrap.observe import OK, Operation, observed
from hsmwrap.policy import Deployment
from hsmwrap.testing import MemoryBackend
from hsmwrap.testing.clients import openssl_encrypt

QUIET = {"name", "health", "from_settings", "contract_version", "ability"}


@pytest.fixture
def told():
    return []


@pytest.fixture
def backend():
    with registry.open_backend("software", {"serve_hsm_level": True}) as backend:
        yield backend


def test_every_method_of_the_contract_is_passed_on():
    contract = {name for name in vars(Backend) if not name.startswith("_")}
    assert contract - {"contract_version"} - set(vars(Composition)) == set()


@pytest.mark.parametrize("name", EVERY_CALL)
def test_every_call_is_passed_on_unchanged_and_told(name, told):
    call = EVERY_CALL[name]
    direct, watched = Echo(), Echo()
    assert call(observed(watched, told.append)) == call(direct)
    assert watched.asked == direct.asked
    assert direct.asked[0][0] == name
    (operation,) = told
    assert (operation.name, operation.backend, operation.outcome) == (name, "fake", OK)
    assert "secret" not in repr(operation)


def test_every_observed_call_is_among_those():
    contract = {name for name in vars(Backend) if not name.startswith("_")}
    abilities = ReapsWrappingKeys.__abstractmethods__ | HasKeySets.__abstractmethods__
    assert (contract - QUIET) | abilities == set(EVERY_CALL)


def test_an_ability_that_is_new_to_compositions_goes_through_them(told):
    class Sings(Ability):
        @abstractmethod
        def sing(self, song, *, times) -> str: ...

    class Singer(MemoryBackend, Sings):
        def sing(self, song, *, times) -> str:
            return song * times

    watched = observed(observed(Singer(), told.append), told.append)
    assert Sings.of(watched).sing("la", times=2) == "lala"
    assert [operation.name for operation in told] == ["sing", "sing"]
    assert Sings.of(observed(MemoryBackend(), told.append)) is None


def test_an_observed_backend_is_no_plug_in(backend):
    wrapper = observed(backend, print)
    with pytest.raises(TypeError, match="open the backend itself"):
        type(wrapper).from_settings({})
    assert repr(wrapper).startswith("<observed <guarded <SoftwareBackend")


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
    expected = ["generate_wrapping_key", "mac", "verify_mac", "unwrap_material"]
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


def test_a_report_is_told_until_it_is_the_one_of_before(told):
    class Reporting(FakeBackend):
        answers = iter(["first", "first", HsmUnavailable("lost"), "first", "other", "other"])

        def capabilities(self):
            answer = next(self.answers)
            if isinstance(answer, Exception):
                raise answer
            return answer

    watched = observed(Reporting(), told.append)
    answers = []
    for _ in range(6):
        with suppress(HsmUnavailable):
            answers.append(watched.capabilities())
    assert answers == ["first", "first", "first", "other", "other"]
    assert [each.outcome for each in told] == ["ok", "HsmUnavailable", "ok"]


def test_seconds_are_those_of_the_timer(told):
    ticks = iter([10.0, 12.5])
    observed(FakeBackend(), told.append, timer=lambda: next(ticks)).mac(b"data")
    assert told[0].seconds == 2.5


def test_an_observer_that_raises_changes_nothing_and_is_logged_once(caplog):
    def broken(_operation):
        raise ZeroDivisionError("0123456789abcdef")

    watched = observed(FakeBackend(), broken)
    for _ in range(3):
        assert watched.mac(b"data").key_set == "1"
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
    watched.generate_wrapping_key(*OAEP, expires_at=NOW)
    fake.fail = HsmUnavailable("unavailable")
    with pytest.raises(HsmUnavailable):
        watched.generate_wrapping_key(*OAEP, expires_at=NOW)
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


@pytest.mark.parametrize("name", ["unwrap_material", "mac"])
def test_the_page_of_metrics_is_no_clock(name):
    """Two scrapes show the bucket of a call between them; the finest of imports ends at 10 ms."""
    finest = 0.01 if name == "unwrap_material" else 0.0001
    counted = CollectorRegistry()
    observer = metrics.PrometheusObserver(counted)
    where = {"backend": "b", "operation": name}
    buckets = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30]
    for seconds in (0.00001, 0.00009, 0.0012, 0.0029, 0.0031, 0.0099, 0.0101, 0.5, 29, 31, 1000):
        before = counted.get_sample_value("hsmwrap_backend_operation_seconds_sum", where) or 0
        observer(Operation(name, "b", OK, seconds))
        shown = counted.get_sample_value("hsmwrap_backend_operation_seconds_sum", where) - before
        end = next((end for end in buckets if end >= max(seconds, finest)), 60)
        assert shown == pytest.approx(end)


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


def test_the_pkcs11_backend_s_facts_are_all_exported(hsmwrap_pkcs11_backend):
    hsmwrap_pkcs11_backend.mac(b"data")
    text = metrics.render(metrics.FactsCollector([hsmwrap_pkcs11_backend])).decode()
    for fact in set(hsmwrap_pkcs11_backend.health().facts) - {"recoveries"}:
        assert f'hsmwrap_backend_{fact}{{backend="pkcs11"' in text


def test_two_backends_of_one_name_are_refused():
    with pytest.raises(ConfigurationError, match="told apart"):
        metrics.FactsCollector([FakeBackend(), FakeBackend()])


def test_a_fork_waits_for_the_update_of_another_thread():
    """A child that inherited one of prometheus_client's locks would hang in its first update."""
    counted = CollectorRegistry()
    observer = metrics.PrometheusObserver(counted)
    watched = observed(FakeBackend(), observer)
    inside, finished = threading.Event(), threading.Event()

    def update(_seconds):
        inside.set()
        time.sleep(0.05)  # time for a fork that does not wait
        finished.set()

    def count():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(observer._instruments.seconds.labels("fake", "mac"), "observe", update)
            watched.mac(b"data")

    def child():
        ReapsWrappingKeys.of(watched).reap(NOW)
        return finished.is_set()

    with ThreadPoolExecutor(1) as other:
        other.submit(count)
        assert inside.wait(60)
        assert Child(child).result()


def test_processes_are_added_up(tmp_path):
    lines = run_alone(MULTIPROCESS, PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
    labels = 'algorithm="",backend="fake",key_spec="",operation="mac",outcome="ok",spec=""'
    assert f"hsmwrap_backend_operations_total{{{labels}}} 3.0" in lines
    assert 'hsmwrap_backend_ready{backend="fake"} 1.0' in lines
    assert "hsmwrap_processes 1.0" in lines
    # The children had a slot one after the other.
    assert {path.name for path in tmp_path.glob("slot-*")} == {"slot-0.lock", "slot-1.lock"}


MULTIPROCESS = """
from support.keypool.fakes import Child, FakeBackend
from hsmwrap import metrics
from hsmwrap.observe import observed
fake = FakeBackend()
watched = observed(fake, metrics.PrometheusObserver())
watched.mac(b"parent")
for _ in range(2):
    Child(lambda: watched.mac(b"child")).result()
print(metrics.render(metrics.FactsCollector([fake])).decode())
"""


def test_without_the_library_the_error_names_the_extra():
    (line,) = run_alone(WITHOUT_THE_LIBRARY)
    assert "pip install '.[metrics]' in a clone of hsmwrap" in line


WITHOUT_THE_LIBRARY = """
import sys
sys.modules["prometheus_client"] = None
from hsmwrap.errors import ConfigurationError
try:
    import hsmwrap.metrics
except ConfigurationError as error:
    print(error)
"""


def run_alone(script, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
