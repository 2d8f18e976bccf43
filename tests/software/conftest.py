import os
import pickle
import signal
import warnings
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.serialization import load_der_public_key

from hsmwrap.catalog import WrappingAlgorithm
from hsmwrap.sm2.engine import open_engine
from hsmwrap.sm2.spki import decode_spki
from hsmwrap.software import KeyringFile, SoftwareBackend

EXPIRES = datetime(2100, 1, 1, tzinfo=UTC)


@pytest.fixture
def in_child():
    """Run a function in a forked child; return its result or raise its exception."""

    def run(function):
        reading, writing = os.pipe()
        with warnings.catch_warnings():
            # Python 3.12 warns of a fork in a process with threads; that is tested here.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            os.close(reading)
            _report(function, writing)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(child, 0)
        assert status == 0, f"the child died: {status}"
        outcome, result = pickle.loads(answer)
        if outcome == "raised":
            raise AssertionError(result)
        return result

    return run


def _report(function, writing):
    signal.alarm(60)  # a deadlocked child dies and fails the test
    try:
        answer = ("returned", function())
    except BaseException as error:  # told to the parent
        answer = ("raised", repr(error))
    try:
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(pickle.dumps(answer))
    finally:
        os._exit(0)


@pytest.fixture
def keyring_file(tmp_path):
    file = KeyringFile(tmp_path / "keyring.json")
    file.create()
    return file


@pytest.fixture
def backend():
    with SoftwareBackend() as opened:
        yield opened


@pytest.fixture
def issue():
    def generate(backend, algorithm):
        spec = "EC_SM2" if algorithm is WrappingAlgorithm.SM2PKE else "RSA_2048"
        served = backend.capabilities().wrapping
        pair = next(w for w in served if (w.spec, w.algorithm) == (spec, algorithm))
        return backend.generate_wrapping_key(pair.spec, pair.algorithm, expires_at=EXPIRES)

    return generate


@pytest.fixture
def wrap():
    """Encrypt as a client does: RSA by pyca, SM2 by an engine of its own."""

    def encrypt(wrapping_key, material):
        if wrapping_key.algorithm is WrappingAlgorithm.SM2PKE:
            point = decode_spki(wrapping_key.public_key)
            return open_engine("libcrypto").encrypt(point, material).to_c1c3c2()
        public_key = load_der_public_key(wrapping_key.public_key)
        return public_key.encrypt(material, _PADDINGS[wrapping_key.algorithm])

    return encrypt


def _oaep(algorithm):
    return padding.OAEP(mgf=padding.MGF1(algorithm), algorithm=algorithm, label=None)


_PADDINGS = {
    WrappingAlgorithm.RSAES_PKCS1_V1_5: padding.PKCS1v15(),
    WrappingAlgorithm.RSAES_OAEP_SHA_1: _oaep(hashes.SHA1()),
    WrappingAlgorithm.RSAES_OAEP_SHA_256: _oaep(hashes.SHA256()),
}
