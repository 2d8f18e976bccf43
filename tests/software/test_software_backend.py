import copy
import os
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from hsmwrap.backend import (
    CONTRACT_VERSION,
    Custody,
    Exposure,
    HasKeySets,
    KeyRef,
    PrivateKeyRef,
    ReapsWrappingKeys,
)
from hsmwrap.catalog import KeySpec, ProtectionLevel, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.checkvalue import METHOD_AES_ECB
from hsmwrap.errors import (
    BackendClosed,
    ConfigurationError,
    InvalidCiphertext,
    InvalidImportToken,
    InvalidKeyMaterial,
    InvalidMac,
    KeyNotFound,
    SelfTestFailed,
    UnsupportedOperation,
)
from hsmwrap.guard import plugin_ref
from hsmwrap.registry import open_backend
from hsmwrap.software import SoftwareBackend, cipher, rsa, schemes
from hsmwrap.software import _backend as backend_module

NOW = datetime(2026, 1, 1, tzinfo=UTC)
OAEP = WrappingAlgorithm.RSAES_OAEP_SHA_256
each_algorithm = pytest.mark.parametrize("algorithm", WrappingAlgorithm)
each_spec = pytest.mark.parametrize("key_spec", KeySpec)


def material_for(key_spec):
    return os.urandom(key_spec.material_length)


@pytest.fixture
def imported(backend, issue, wrap):
    """Import fresh material by OAEP-SHA-256: the wrapping key, the material, the outcome."""

    def run(key_spec=KeySpec.ALIYUN_AES_256, material=None):
        material = material or material_for(key_spec)
        pair = issue(backend, OAEP)
        ciphertext = wrap(pair, material)
        outcome = backend.unwrap_material(pair.private_key, OAEP, ciphertext, key_spec=key_spec)
        return pair, material, outcome

    return run


# --- import and use -----------------------------------------------------------------------------


@each_algorithm
@each_spec
def test_import_and_use(backend, issue, wrap, algorithm, key_spec):
    material, pair = material_for(key_spec), issue(backend, algorithm)
    ciphertext = wrap(pair, material)
    key = backend.unwrap_material(pair.private_key, algorithm, ciphertext, key_spec=key_spec)
    assert (key.exposure, key.key.custody) == (Exposure.HOST, Custody.HSM_ENCRYPTED_DATABASE)
    message = backend.encrypt(key.key, b"plaintext", b"aad")
    assert cipher.decrypt(key_spec, material, message, b"aad") == b"plaintext"
    stored = KeyRef.from_bytes(key.key.to_bytes())
    assert backend.decrypt(stored, message, b"aad") == b"plaintext"
    with pytest.raises(InvalidCiphertext):
        backend.decrypt(stored, message)


@each_algorithm
def test_pairs_have_the_documented_form(backend, issue, algorithm):
    pair = issue(backend, algorithm)
    is_sm2 = algorithm is WrappingAlgorithm.SM2PKE
    assert pair.spec is (WrappingKeySpec.EC_SM2 if is_sm2 else WrappingKeySpec.RSA_2048)
    assert len(pair.public_key) == (91 if is_sm2 else 294)
    assert pair.private_key.custody is Custody.HSM_ENCRYPTED_DATABASE
    assert len(plugin_ref(pair.private_key).data) == 33 + (97 if is_sm2 else 384)
    assert issue(backend, algorithm).public_key != pair.public_key


def test_pairs_of_no_sense_are_refused(backend):
    for spec, algorithm in (
        (WrappingKeySpec.EC_SM2, OAEP),
        (WrappingKeySpec.RSA_2048, WrappingAlgorithm.SM2PKE),
    ):
        with pytest.raises(UnsupportedOperation):
            backend.generate_wrapping_key(spec, algorithm, expires_at=NOW)


@each_algorithm
@each_spec
def test_length_is_exact(backend, issue, wrap, algorithm, key_spec):
    pair = issue(backend, algorithm)
    right = key_spec.material_length
    for length in {1, 15, 16, 17, 24, 31, 32, 33, 48, 64} - {right}:
        ciphertext = wrap(pair, os.urandom(length))
        with pytest.raises(InvalidKeyMaterial):
            backend.unwrap_material(pair.private_key, algorithm, ciphertext, key_spec=key_spec)


@pytest.mark.parametrize("algorithm", sorted(set(WrappingAlgorithm) - {WrappingAlgorithm.SM2PKE}))
def test_empty_material_is_refused(backend, issue, wrap, algorithm):
    pair = issue(backend, algorithm)
    ciphertext = wrap(pair, b"")
    for key_spec in KeySpec:
        with pytest.raises(InvalidKeyMaterial):
            backend.unwrap_material(pair.private_key, algorithm, ciphertext, key_spec=key_spec)


@pytest.mark.parametrize(
    "algorithm", sorted(set(WrappingAlgorithm) - {WrappingAlgorithm.RSAES_PKCS1_V1_5})
)
def test_changed_ciphertexts_are_refused_alike(backend, issue, wrap, algorithm):
    key_spec = KeySpec.ALIYUN_AES_256
    pair = issue(backend, algorithm)
    ciphertext = wrap(pair, material_for(key_spec))
    for position in range(len(ciphertext)):
        changed = bytearray(ciphertext)
        changed[position] ^= 1
        with pytest.raises(InvalidKeyMaterial) as caught:
            backend.unwrap_material(pair.private_key, algorithm, bytes(changed), key_spec=key_spec)
        assert str(caught.value) == "key material is invalid."
        assert caught.value.__suppress_context__ or not caught.value.__context__


@each_spec
def test_reimport_takes_the_same_material_only(backend, imported, issue, wrap, key_spec):
    _, material, first = imported(key_spec)
    pair = issue(backend, OAEP)

    def reimport(given):
        return backend.unwrap_material(
            pair.private_key,
            OAEP,
            wrap(pair, given),
            key_spec=key_spec,
            expected_check_value=first.check_value,
        )

    assert reimport(material).check_value == first.check_value
    with pytest.raises(InvalidKeyMaterial):
        reimport(material_for(key_spec))


def test_check_values_name_their_method(imported):
    for key_spec in KeySpec:
        value = imported(key_spec)[2].check_value
        assert (value[0], len(value)) == (METHOD_AES_ECB, 17)


# --- blobs --------------------------------------------------------------------------------------


def test_changed_wrapping_key_is_an_invalid_token(backend, issue, wrap):
    pair = issue(backend, OAEP)
    ciphertext, blob = wrap(pair, bytes(32)), pair.private_key.data
    for position in range(len(blob)):
        changed = blob[:position] + bytes([blob[position] ^ 1]) + blob[position + 1 :]
        with pytest.raises(InvalidImportToken):
            backend.unwrap_material(
                replace(pair.private_key, data=changed),
                OAEP,
                ciphertext,
                key_spec=KeySpec.ALIYUN_AES_256,
            )


def test_changed_key_blob_is_no_key(backend, imported):
    key = imported()[2].key
    for position in range(len(key.data)):
        data = key.data[:position] + bytes([key.data[position] ^ 1]) + key.data[position + 1 :]
        with pytest.raises(KeyNotFound):
            backend.encrypt(replace(key, data=data), b"")


@each_algorithm
def test_wrapping_key_serves_its_own_algorithm_only(backend, issue, algorithm):
    pair = issue(backend, algorithm)
    for other in set(WrappingAlgorithm) - {algorithm}:
        with pytest.raises(InvalidImportToken):
            backend.unwrap_material(
                pair.private_key, other, bytes(256), key_spec=KeySpec.ALIYUN_AES_256
            )


def test_blobs_do_not_change_purpose(backend, imported):
    """By themselves: without what the guard binds and checks."""
    pair, _, outcome = imported()
    backend = backend.ability(SoftwareBackend)
    material_as_wrapping_key = PrivateKeyRef(Custody.HSM_ENCRYPTED_DATABASE, outcome.key.data)
    for algorithm in WrappingAlgorithm:
        with pytest.raises(InvalidImportToken):
            backend.unwrap_material(
                material_as_wrapping_key, algorithm, b"", key_spec=KeySpec.ALIYUN_AES_256
            )
    for key_spec in KeySpec:
        wrapping_key_as_material = replace(
            outcome.key, key_spec=key_spec, data=plugin_ref(pair.private_key).data
        )
        with pytest.raises(KeyNotFound):
            backend.encrypt(wrapping_key_as_material, b"")


def test_key_does_not_change_spec_or_backend(backend, imported):
    key = imported()[2].key
    for other in (replace(key, key_spec=KeySpec.ALIYUN_SM4), replace(key, backend="pkcs11")):
        with pytest.raises(KeyNotFound):
            backend.encrypt(other, b"")


def test_another_process_keyring_opens_nothing(imported):
    key = imported()[2].key
    with open_backend("software", {}) as other, pytest.raises(KeyNotFound):
        other.encrypt(key, b"")


# --- master keys --------------------------------------------------------------------------------


@pytest.fixture
def durable(keyring_file):
    with open_backend("software", {"keyring_file": str(keyring_file._path)}) as opened:
        yield opened


def test_keys_outlive_the_backend(durable, keyring_file, issue, wrap):
    pair = issue(durable, OAEP)
    mac = durable.mac(b"claims")
    durable.close()
    with open_backend("software", {"keyring_file": str(keyring_file._path)}) as again:
        again.verify_mac(b"claims", mac)
        again.unwrap_material(
            pair.private_key, OAEP, wrap(pair, bytes(32)), key_spec=KeySpec.ALIYUN_AES_256
        )


def test_rotation_and_retirement_reach_a_running_backend(durable, keyring_file, issue, wrap):
    pair, mac = issue(durable, OAEP), durable.mac(b"claims")
    ciphertext = wrap(pair, bytes(32))

    def use():
        return durable.unwrap_material(
            pair.private_key, OAEP, ciphertext, key_spec=KeySpec.ALIYUN_AES_256
        )

    stays = use().key
    keyring_file.rotate()
    durable.verify_mac(b"claims", mac)
    assert durable.mac(b"claims").key_set != mac.key_set
    resealed = use().key
    keyring_file.retire(mac.key_set)
    with pytest.raises(InvalidMac):
        durable.verify_mac(b"claims", mac)
    with pytest.raises(InvalidImportToken):
        use()
    with pytest.raises(KeyNotFound, match=f"key set {mac.key_set}, which sealed this key, was ret"):
        durable.encrypt(stays, b"")
    assert durable.encrypt(resealed, b"")


def test_exposed_keyring_stops_the_backend(durable, keyring_file):
    assert durable.health().ready
    keyring_file._path.chmod(0o644)
    assert not durable.health().ready
    assert "chmod 0400" in durable.health().detail
    with pytest.raises(ConfigurationError):
        durable.mac(b"claims")
    keyring_file._path.chmod(0o600)
    assert durable.health().ready
    durable.mac(b"claims")


# --- capabilities -------------------------------------------------------------------------------


def test_contract(backend):
    assert SoftwareBackend.contract_version == CONTRACT_VERSION == 2
    assert backend.name == backend.capabilities().backend == "software"
    assert HasKeySets.of(backend).current_key_set() == backend.mac(b"").key_set
    assert ReapsWrappingKeys.of(backend) is None


def test_ephemeral_keyring_is_announced(backend, durable):
    told = backend.capabilities()
    assert not told.production
    assert told.protection_levels == {ProtectionLevel.SOFTWARE}
    assert any("EPHEMERAL" in note for note in told.notes)
    told = durable.capabilities()
    assert told.production
    assert not any("EPHEMERAL" in note for note in told.notes)
    assert any("RSAES_PKCS1_V1_5 has no integrity" in note for note in told.notes)


def test_implicit_rejection_is_tried_and_said(monkeypatch):
    def note():
        with open_backend("software", {}) as opened:
            notes = opened.capabilities().notes
        (said,) = (each for each in notes if each.startswith("RSAES_PKCS1_V1_5"))
        assert "refused_algorithms" in said
        return said

    there = rsa.rejects_implicitly()
    assert ("OpenSSL rejects implicitly" in note()) == there
    assert ("DOES NOT REJECT IMPLICITLY" in note()) == (not there)
    for answer, words in ((True, "OpenSSL rejects implicitly"), (False, "DOES NOT REJECT")):
        monkeypatch.setattr(rsa, "rejects_implicitly", lambda answer=answer: answer)
        assert words in note()


@pytest.mark.parametrize("there", [True, False])
def test_pkcs1_can_be_refused_where_implicit_rejection_is_missing(monkeypatch, there):
    monkeypatch.setattr(rsa, "rejects_implicitly", lambda: there)
    with open_backend("software", {"require_implicit_rejection": True}) as opened:
        report = opened.capabilities()
        assert opened.health().facts["implicit_rejection"] is there
    served = {each.algorithm for each in report.wrapping}
    assert served == set(WrappingAlgorithm) - (
        set() if there else {WrappingAlgorithm.RSAES_PKCS1_V1_5}
    )
    assert any("refused by require_implicit_rejection" in note for note in report.notes) != there


def test_serving_hsm_level_is_announced(keyring_file):
    settings = {"keyring_file": str(keyring_file._path), "serve_hsm_level": True}
    with open_backend("software", settings) as opened:
        told = opened.capabilities()
    assert told.protection_levels == set(ProtectionLevel)
    assert not told.production
    assert any("serve_hsm_level" in note for note in told.notes)


def test_development_engine_is_announced(keyring_file):
    pytest.importorskip("gmssl")
    settings = {"keyring_file": str(keyring_file._path), "sm2_engine": "gmssl"}
    with open_backend("software", settings) as opened:
        told = opened.capabilities()
    assert not told.production
    assert any("SM2 by gmssl leaks by timing" in note for note in told.notes)


def test_everything_is_served_in_the_host(backend):
    told = backend.capabilities()
    assert {w.algorithm for w in told.wrapping} == set(WrappingAlgorithm)
    assert {w.exposure for w in told.wrapping} == {Exposure.HOST}
    assert {k.key_spec for k in told.keys} == set(KeySpec)


def test_libcrypto_without_sm2_leaves_out_sm2_alone(monkeypatch):
    def no_sm2(_name):
        raise ConfigurationError("libcrypto was built without SM2")

    monkeypatch.setattr(schemes, "open_engine", no_sm2)
    with open_backend("software", {}) as opened:
        told = opened.capabilities()
        assert {w.spec for w in told.wrapping} == {WrappingKeySpec.RSA_2048}
        assert any("SM2PKE is not served" in note for note in told.notes)
        spec, sm2 = WrappingKeySpec.EC_SM2, WrappingAlgorithm.SM2PKE
        with pytest.raises(UnsupportedOperation):
            opened.generate_wrapping_key(spec, sm2, expires_at=NOW)
    with pytest.raises(ConfigurationError, match="without SM2"):
        open_backend("software", {"sm2_engine": "libcrypto"})


def test_an_engine_that_computes_wrongly_stops_the_backend(monkeypatch):
    def broken(_name):
        raise SelfTestFailed("SM2 engine libcrypto: cannot decrypt")

    monkeypatch.setattr(schemes, "open_engine", broken)
    with pytest.raises(SelfTestFailed):
        open_backend("software", {})


def test_missing_cipher_is_said_and_typed(backend, imported, monkeypatch):
    key = imported(KeySpec.ALIYUN_SM4)[2].key
    monkeypatch.setattr(cipher, "is_usable", lambda spec: spec is not KeySpec.ALIYUN_SM4)
    with open_backend("software", {}) as opened:
        assert not opened.capabilities().key_for(KeySpec.ALIYUN_SM4).usable
        with pytest.raises(UnsupportedOperation, match="Aliyun_SM4"):
            opened.encrypt(key, b"")


# --- life ---------------------------------------------------------------------------------------


def test_closed_backend_answers_nothing_but_health(backend, imported):
    pair, _, outcome = imported()
    calls = {
        "capabilities": backend.capabilities,
        "generate": lambda: backend.generate_wrapping_key(pair.spec, OAEP, expires_at=NOW),
        "discard": lambda: backend.discard_wrapping_key(pair.private_key),
        "unwrap": lambda: backend.unwrap_material(
            pair.private_key, OAEP, b"", key_spec=KeySpec.ALIYUN_AES_256
        ),
        "encrypt": lambda: backend.encrypt(outcome.key, b""),
        "decrypt": lambda: backend.decrypt(outcome.key, b""),
        "destroy": lambda: backend.destroy_key(outcome.key),
        "mac": lambda: backend.mac(b""),
        "verify_mac": lambda: backend.verify_mac(b"", mac),
        "current_key_set": HasKeySets.of(backend).current_key_set,
    }
    mac = backend.mac(b"")
    backend.destroy_key(outcome.key)
    backend.discard_wrapping_key(pair.private_key)
    assert backend.health().ready
    backend.close()
    backend.close()
    assert (backend.health().ready, backend.health().detail) == (False, "closed")
    for name, call in calls.items():
        with pytest.raises(BackendClosed):
            pytest.fail(f"{name} answered {call()}")


def test_close_lets_go_of_the_keys(backend):
    backend.close()
    with pytest.raises(BackendClosed):
        backend.ability(SoftwareBackend)._sealer.mac(b"")


def test_health_beside_close_says_closed(backend, monkeypatch):
    bare = backend.ability(SoftwareBackend)
    health = bare.health

    def closed_now():
        answer = health()
        backend.close()
        return answer

    monkeypatch.setattr(bare, "health", closed_now)
    for _ in range(2):
        assert (backend.health().ready, backend.health().detail) == (False, "closed")


def test_close_waits_for_a_running_call(backend, imported, monkeypatch):
    key = imported()[2].key
    running, go_on, closed = threading.Event(), threading.Event(), threading.Event()
    encrypt = cipher.encrypt

    def slow(*arguments):
        running.set()
        go_on.wait(60)
        return encrypt(*arguments)

    def close():
        backend.close()
        closed.set()

    monkeypatch.setattr(backend_module.cipher, "encrypt", slow)
    with ThreadPoolExecutor(2) as pool:
        message = pool.submit(backend.encrypt, key, b"plaintext")
        assert running.wait(60)
        pool.submit(close)
        assert not backend._gate.close(timeout=0.05)
        assert not closed.is_set()
        go_on.set()
        assert len(message.result(60)) == 29 + len(b"plaintext")
        assert closed.wait(60)


def test_threads(backend, issue, wrap):
    pairs = [issue(backend, algorithm) for algorithm in WrappingAlgorithm]

    def work(number):
        pair, key_spec = pairs[number % len(pairs)], list(KeySpec)[number % 2]
        material = material_for(key_spec)
        key = backend.unwrap_material(
            pair.private_key, pair.algorithm, wrap(pair, material), key_spec=key_spec
        )
        message = backend.encrypt(key.key, material)
        return cipher.decrypt(key_spec, material, message, b"") == material

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(160)))


def test_children_share_the_keyring_and_nothing_else(backend, imported, issue, wrap, in_child):
    pair, _, outcome = imported()
    message = backend.encrypt(outcome.key, b"plaintext")
    mac = backend.mac(b"claims")
    ciphertext = wrap(pair, bytes(32))

    def child():
        assert backend.decrypt(outcome.key, message) == b"plaintext"
        backend.verify_mac(b"claims", mac)
        made = backend.unwrap_material(
            pair.private_key, OAEP, ciphertext, key_spec=KeySpec.ALIYUN_AES_256
        )
        public_keys = [issue(backend, algorithm).public_key for algorithm in WrappingAlgorithm]
        nonce = backend.encrypt(outcome.key, b"")[1:13]
        backend.close()
        return made, public_keys, nonce

    answers = [in_child(child) for _ in range(3)]
    assert backend.health().ready
    assert all(backend.encrypt(made.key, b"") for made, _, _ in answers)
    assert len({key for _, public_keys, _ in answers for key in public_keys}) == 12
    assert len({nonce for _, _, nonce in answers}) == 3


@pytest.mark.slow
def test_fork_under_load(backend, imported, in_child):
    key = imported()[2].key
    stop = threading.Event()

    def load():
        while not stop.is_set():
            backend.decrypt(key, backend.encrypt(key, b"plaintext"))

    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(load) for _ in range(4)]
        try:
            for _ in range(10):
                message = backend.encrypt(key, b"plaintext")
                assert in_child(lambda m=message: backend.decrypt(key, m)) == b"plaintext"
                assert in_child(backend.close) is None
        finally:
            stop.set()
        assert [load.result(60) for load in loads] == [None] * 4


# --- secrets ------------------------------------------------------------------------------------


def test_nothing_secret_shows(backend, imported):
    pair, material, outcome = imported()
    keyring = backend.ability(SoftwareBackend)._keyring()
    secrets = [keyring.key(keyring.current), material, outcome.key.data, pair.private_key.data]
    shown = "".join(
        str(thing) + repr(thing)
        for thing in (backend, vars(backend), pair, outcome, backend.capabilities(), keyring)
    )
    for secret in secrets:
        assert repr(secret)[2:-1] not in shown
        assert secret.hex() not in shown


@pytest.mark.parametrize("leak", [pickle.dumps, copy.copy, copy.deepcopy])
def test_backends_do_not_pickle_or_copy(backend, leak):
    with pytest.raises(TypeError, match="holds keys"):
        leak(backend)


def test_forks_wait_for_calls_into_libcrypto(backend, monkeypatch):
    from hsmwrap.locks import LIBCRYPTO

    seen = []
    bare = backend.ability(SoftwareBackend)
    monkeypatch.setattr(bare._sealer, "mac", lambda data: seen.append(len(LIBCRYPTO.readers)))
    bare.mac(b"data")
    assert seen == [1]
    assert not LIBCRYPTO.readers
