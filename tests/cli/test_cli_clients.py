import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hsmwrap import registry
from hsmwrap.catalog import KeySpec, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import ConfigurationError
from hsmwrap.testing import clients
from hsmwrap.testing.clients import GMSSL, OPENSSL, ClientFailed, clients_of

SM2 = (WrappingKeySpec.EC_SM2, WrappingAlgorithm.SM2PKE)
MATERIAL = bytes(range(32))


@pytest.fixture
def backend():
    with registry.open_backend("software", {}) as opened:
        yield opened


def wrapping_key(backend, spec, algorithm):
    expires_at = datetime.now(UTC) + timedelta(hours=1)
    return backend.generate_wrapping_key(spec, algorithm, expires_at=expires_at)


def arrives(backend, key, encrypted):
    """Whether ``encrypted`` becomes the key ``MATERIAL``."""
    imported = backend.unwrap_material(
        key.private_key, key.algorithm, encrypted, key_spec=KeySpec.ALIYUN_AES_256
    )
    message = backend.encrypt(imported.key, b"hello", b"aad")
    return AESGCM(MATERIAL).decrypt(message[1:13], message[13:], b"aad") == b"hello"


@pytest.mark.parametrize("algorithm", WrappingAlgorithm)
def test_what_openssl_encrypts_arrives(backend, algorithm):
    sm2 = algorithm is WrappingAlgorithm.SM2PKE
    spec = WrappingKeySpec.EC_SM2 if sm2 else WrappingKeySpec.RSA_2048
    key = wrapping_key(backend, spec, algorithm)
    assert arrives(backend, key, OPENSSL.encrypt(algorithm, key.public_key, MATERIAL))


def test_openssl_writes_sm2_in_der_form_and_gmssl_raw_without_the_04(backend):
    key = wrapping_key(backend, *SM2)
    der = OPENSSL.encrypt(SM2[1], key.public_key, MATERIAL)
    assert der[0] == 0x30
    assert der[1:3] == bytes([0x81, len(der) - 3])
    assert len(GMSSL.encrypt(SM2[1], key.public_key, MATERIAL)) == 64 + 32 + 32


def test_gmssl_takes_public_keys_that_its_constructor_would_corrupt(backend):
    keys = (wrapping_key(backend, *SM2) for _ in range(1000))
    key = next(key for key in keys if key.public_key[-64:].hex()[0] in "04")
    assert arrives(backend, key, GMSSL.encrypt(SM2[1], key.public_key, MATERIAL))


def test_key_material_is_on_no_command_line_and_in_no_file(backend, monkeypatch, tmp_path):
    seen = []

    def run(command, **options):
        files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
        seen.append((command, files, options["input"]))
        return real(command, **options)

    real = subprocess.run
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", run)
    key = wrapping_key(backend, *SM2)
    OPENSSL.encrypt(SM2[1], key.public_key, MATERIAL)
    [(command, files, given)] = seen
    assert given == MATERIAL
    assert files == [key.public_key]
    assert MATERIAL.hex() not in " ".join(command)
    assert not list(tmp_path.iterdir())


def test_openssl_says_what_it_refused():
    with pytest.raises(ClientFailed, match=r"openssl: .*public key"):
        OPENSSL.encrypt(SM2[1], b"no key", MATERIAL)


def test_gmssl_is_for_sm2_only(backend):
    assert clients_of(WrappingAlgorithm.SM2PKE) == (OPENSSL, GMSSL)
    assert clients_of(WrappingAlgorithm.RSAES_OAEP_SHA_256) == (OPENSSL,)
    with pytest.raises(ClientFailed):
        GMSSL.encrypt(WrappingAlgorithm.RSAES_OAEP_SHA_256, b"", MATERIAL)


def test_a_missing_client_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ConfigurationError, match="apt-get install openssl"):
        OPENSSL.require()
    monkeypatch.setitem(sys.modules, "gmssl.sm2", None)
    with pytest.raises(ConfigurationError, match=r"'\.\[gmssl\]' in a clone of hsmwrap"):
        GMSSL.require()


@pytest.mark.parametrize("spec", KeySpec)
def test_messages_go_and_come(spec):
    key = MATERIAL[: spec.material_length]
    message = clients.encrypt_message(spec, key, b"hello", b"aad")
    assert message[0] == 1
    assert len(message) == 1 + 12 + 5 + 16
    assert clients.decrypt_message(spec, key, message, b"aad") == b"hello"


@pytest.mark.parametrize("position", [0, 1, 13, -1])
def test_a_changed_message_is_the_clients_failure(position):
    spec = KeySpec.ALIYUN_AES_256
    message = bytearray(clients.encrypt_message(spec, MATERIAL, b"hello", b"aad"))
    message[position] ^= 1
    with pytest.raises(ClientFailed):
        clients.decrypt_message(spec, MATERIAL, bytes(message), b"aad")


def test_other_additional_data_is_the_clients_failure():
    spec = KeySpec.ALIYUN_AES_256
    message = clients.encrypt_message(spec, MATERIAL, b"hello", b"aad")
    with pytest.raises(ClientFailed):
        clients.decrypt_message(spec, MATERIAL, message, b"other")
