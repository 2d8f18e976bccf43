"""The RSA pairs of a test run: made of listed primes, and different in all its processes."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.serialization import load_der_public_key
from support.rsa_pairs import PRIMES

from hsmwrap import registry
from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec

_ISSUE = """
import json, sys
from test_rsa_pairs import moduli
print(json.dumps(moduli(json.loads(sys.argv[1]), 20)))
"""


def moduli(settings, count):
    with registry.open_backend("pkcs11", settings) as backend:
        keys = [
            backend.generate_wrapping_key(
                WrappingKeySpec.RSA_2048,
                WrappingAlgorithm.RSAES_OAEP_SHA_1,
                expires_at=datetime.now(UTC) + timedelta(hours=1),
            )
            for _ in range(count)
        ]
    return [load_der_public_key(key.public_key).public_numbers().n for key in keys]


@pytest.fixture(scope="module")
def settings(softhsm):
    return softhsm.settings("pairs")


@pytest.fixture(scope="module")
def found(settings):
    command = [sys.executable, "-c", _ISSUE, json.dumps(settings)]
    run = {"cwd": __file__.rpartition("/")[0], "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **run) as child:
        ours = moduli(settings, 20)
        theirs = json.loads(child.stdout.read())
    return ours + theirs


def test_no_two_processes_make_the_same_pair(found):
    assert len(set(found)) == 40


def test_they_take_no_search_for_primes(found):
    """What makes the tests fast is there: else they would pass, and take half an hour."""
    assert all(any(modulus % prime == 0 for prime in PRIMES) for modulus in found)
