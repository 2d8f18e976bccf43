import os
import pickle
import signal
import warnings
from datetime import UTC, datetime

import pytest

from hsmwrap.catalog import WrappingAlgorithm
from hsmwrap.customer import encrypt_key_material
from hsmwrap.registry import open_backend
from hsmwrap.software import KeyringFile

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
    with open_backend("software", {}) as opened:
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
    """Encrypt as a client does."""
    return lambda key, material: encrypt_key_material(key.algorithm, key.public_key, material)
