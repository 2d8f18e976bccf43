"""Exceptions of the software backend keep no key, no material and no plaintext."""

import base64
import json
import os
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial

import pytest
from support.frames import assert_no_secret, frames_of

from hsmwrap.backend import MESSAGE_VERSION, KeyRef
from hsmwrap.catalog import KeySpec, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import ConfigurationError, HsmwrapError, InvalidKeyMaterial, strip_tracebacks
from hsmwrap.guard import plugin_ref
from hsmwrap.registry import open_backend
from hsmwrap.sm2.engine import open_engine
from hsmwrap.software import SoftwareBackend, cipher
from hsmwrap.software import _backend as backend_module
from hsmwrap.software import _sealing as sealing
from hsmwrap.software._keyring import Keyring
from hsmwrap.software._sealing import Purpose, Sealer

pytestmark = pytest.mark.slow

NOW = datetime(2026, 1, 1, tzinfo=UTC)
AES, SM4 = KeySpec
PKCS1, OAEP1, OAEP256, SM2PKE = WrappingAlgorithm
PLAINTEXT = b"a plaintext that must stay secret"


class Case:
    """One backend with one key of each sort, and every secret in it."""

    def __init__(self, backend, issue, wrap, path):
        self.backend, self.path = backend, path
        self.material = os.urandom(32)
        self.pairs = {algorithm: issue(backend, algorithm) for algorithm in WrappingAlgorithm}
        self.wrap = lambda algorithm, material: wrap(self.pairs[algorithm], material)
        imported = self.unwrap(OAEP256, self.wrap(OAEP256, self.material))
        self.key, self.check_value = imported.key, imported.check_value
        self.message = backend.encrypt(self.key, PLAINTEXT, b"context")
        self.mac = backend.mac(b"claims")
        keyring = backend.ability(SoftwareBackend)._keyring()
        self.secrets = {
            "material": self.material,
            "plaintext": PLAINTEXT,
            "master key": keyring.key(keyring.current),
        }
        for algorithm, pair in self.pairs.items():
            context = (Purpose.WRAPPING_KEY, plugin_ref(pair.private_key).data, "software")
            secret = backend.ability(SoftwareBackend)._sealer.open(*context, pair.spec, algorithm)
            half = 32 if algorithm is SM2PKE else 128
            self.secrets[f"{algorithm}: d or p"] = secret[:half]
            if algorithm is not SM2PKE:
                self.secrets[f"{algorithm}: q"] = secret[half:]

    def generate(self, algorithm):
        self.backend.generate_wrapping_key(self.pairs[algorithm].spec, algorithm, expires_at=NOW)

    def unwrap(self, algorithm, ciphertext, key_spec=AES, private_key=None, **more):
        private_key = private_key or self.pairs[algorithm].private_key
        return self.backend.unwrap_material(
            private_key, algorithm, ciphertext, key_spec=key_spec, **more
        )

    def spoil(self, raw):
        self.path.write_bytes(raw)

    @property
    def settings(self):
        return {"keyring_file": str(self.path)}


@pytest.fixture
def case(keyring_file, issue, wrap):
    path = keyring_file._path
    with open_backend("software", {"keyring_file": str(path)}) as backend:
        yield Case(backend, issue, wrap, path)


def changed(data, at=-1):
    data = bytearray(data)
    data[at] ^= 1
    return bytes(data)


def _failing_inside(case, monkeypatch, *, owner, part, call):
    """An unexpected fault: not one of our errors, and all secrets are in its frames."""

    def fail(*arguments):
        case.secrets |= {f"argument {n}": a for n, a in enumerate(arguments) if type(a) is bytes}
        raise MemoryError

    monkeypatch.setattr(owner, part, fail)
    call(case)


# Each takes the case and monkeypatch, and has to raise.
CALLS = {
    f"unwrap {name} {algorithm}": lambda case, _, algorithm=algorithm, make=make: make(
        case, algorithm
    )
    for algorithm in WrappingAlgorithm
    for name, make in {
        "nothing": lambda case, a: case.unwrap(a, b""),
        "wrong length": lambda case, a: case.unwrap(a, case.wrap(a, case.material[:31])),
        "wrong spec": lambda case, a: case.unwrap(a, case.wrap(a, case.material), SM4),
        "other material": lambda case, a: case.unwrap(
            a, case.wrap(a, case.material), expected_check_value=changed(case.check_value)
        ),
        "changed blob": lambda case, a: case.unwrap(
            a,
            case.wrap(a, case.material),
            private_key=replace(
                case.pairs[a].private_key, data=changed(case.pairs[a].private_key.data)
            ),
        ),
        "of no type": lambda case, a: case.unwrap(a, None),
    }.items()
}
CALLS |= {
    f"unwrap changed {algorithm}": lambda case, _, a=algorithm: case.unwrap(
        a, changed(case.wrap(a, case.material))
    )
    for algorithm in (OAEP1, OAEP256, SM2PKE)
}
FAULTS = (
    (
        "unwrap",
        Sealer,
        "seal",
        lambda case: case.unwrap(OAEP256, case.wrap(OAEP256, case.material)),
    ),
    (
        "unwrap",
        backend_module,
        "check_value",
        lambda case: case.unwrap(SM2PKE, case.wrap(SM2PKE, case.material)),
    ),
    ("generate RSA", Sealer, "seal", lambda case: case.generate(OAEP1)),
    ("generate SM2", Sealer, "seal", lambda case: case.generate(SM2PKE)),
    ("encrypt", cipher, "GCM", lambda case: case.backend.encrypt(case.key, PLAINTEXT)),
    ("decrypt", cipher, "GCM", lambda case: case.backend.decrypt(case.key, case.message)),
    ("mac", sealing.hmac, "digest", lambda case: case.backend.mac(b"claims")),
    (
        "verify_mac",
        sealing.hmac,
        "digest",
        lambda case: case.backend.verify_mac(b"claims", case.mac),
    ),
)
CALLS |= {
    f"{name}, fault in {part}": partial(_failing_inside, owner=owner, part=part, call=call)
    for name, owner, part, call in FAULTS
}
CALLS |= {
    "generate no pair": lambda case, _: case.backend.generate_wrapping_key(
        WrappingKeySpec.RSA_2048, SM2PKE, expires_at=NOW
    ),
    "unwrap by no algorithm": lambda case, _: case.backend.unwrap_material(
        case.pairs[PKCS1].private_key, "RSAES_NONE", b"", key_spec=AES
    ),
    "encrypt under no key": lambda case, _: case.backend.encrypt(
        replace(case.key, data=changed(case.key.data)), PLAINTEXT
    ),
    "encrypt under a key of another": lambda case, _: case.backend.encrypt(
        replace(case.key, backend="pkcs11"), PLAINTEXT
    ),
    "encrypt a text": lambda case, _: case.backend.encrypt(case.key, PLAINTEXT.decode()),
    "encrypt with a text": lambda case, _: case.backend.encrypt(case.key, PLAINTEXT, "context"),
    "decrypt changed": lambda case, _: case.backend.decrypt(
        case.key, changed(case.message), b"context"
    ),
    "decrypt out of context": lambda case, _: case.backend.decrypt(case.key, case.message),
    "decrypt short": lambda case, _: case.backend.decrypt(case.key, bytes([MESSAGE_VERSION])),
    "decrypt under no key": lambda case, _: case.backend.decrypt(
        replace(case.key, data=b""), case.message
    ),
    "mac of nothing": lambda case, _: case.backend.mac(None),
    "verify the mac of nothing": lambda case, _: case.backend.verify_mac(
        None, case.backend.mac(b"claims")
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_no_failing_call_leaves_a_secret(case, monkeypatch, call):
    with pytest.raises(BaseException) as caught:
        call(case, monkeypatch)
    assert not isinstance(caught.value, pytest.fail.Exception)
    assert_no_secret(caught.value, case.secrets)


SPOILED = {
    "cut": lambda text: text[: len(text) // 2 + 20],
    "no base64": lambda text: text.replace('=",', '!",').replace('="', '!"'),
    "short key": lambda text: json.dumps(_with_keys(text, lambda key: key[:30])),
    "other version": lambda text: text.replace('"version": 1', '"version": 9'),
    "no current key": lambda text: json.dumps({**json.loads(text), "current": "00000000"}),
    "bad id": lambda text: json.dumps(_with_ids(text, str.upper)),
    "key for an id": lambda text: json.dumps(
        _with_ids(text, lambda i: json.loads(text)["keys"][i])
    ),
    "no text": lambda text: "\udcff" + text,
}


def _with_keys(text, change):
    document = json.loads(text)
    keys = {
        i: base64.b64encode(change(base64.b64decode(key))).decode()
        for i, key in document["keys"].items()
    }
    return {**document, "keys": keys}


def _with_ids(text, change):
    document = json.loads(text)
    return {**document, "keys": {change(i): key for i, key in document["keys"].items()}}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED.keys())
def test_a_malformed_keyring_file_stays_out_of_errors(case, spoil):
    # Two keys with letters in their ids, so that each way of spoiling spoils something.
    keys = {"aaaaaaaa": os.urandom(32), "bbbbbbbb": os.urandom(32)}
    case.secrets |= keys | {f"a piece of {i}": key[:30] for i, key in keys.items()}
    text = Keyring("aaaaaaaa", keys).to_json().decode()
    case.spoil(spoil(text).encode(errors="surrogateescape"))
    settings = case.settings
    for call in (
        lambda: case.backend.mac(b"claims"),
        lambda: case.backend.encrypt(case.key, PLAINTEXT),
        lambda: open_backend("software", settings),
        lambda: SoftwareBackend.list_keys(settings),
        lambda: SoftwareBackend.initialise_keys(settings),
        lambda: SoftwareBackend.rotate_keys(settings),
        lambda: SoftwareBackend.retire_keys(settings, "bbbbbbbb"),
        lambda: Keyring.from_json(case.path.read_bytes()),
    ):
        with pytest.raises(ConfigurationError) as caught:
            call()
        assert_no_secret(caught.value, case.secrets)
    assert not case.backend.health().ready


def test_a_keyring_of_wrong_parts_stays_out_of_errors():
    key = os.urandom(31)
    for parts in (("aaaaaaaa", {"aaaaaaaa": key}), ("aaaaaaaa", {"A": key}), ("a", {})):
        with pytest.raises(ConfigurationError) as caught:
            Keyring(*parts)
        assert_no_secret(caught.value, {"key": key})


@pytest.mark.parametrize("engine", ["libcrypto"])
def test_no_engine_leaves_a_secret(engine):
    opened = open_engine(engine)
    pair = opened.generate()
    ciphertext = opened.encrypt(pair.public, PLAINTEXT)
    for call in (
        lambda: opened.decrypt(pair.private, pair.public, replace(ciphertext, c3=bytes(32))),
        lambda: opened.decrypt(pair.private, opened.generate().public, ciphertext),
        lambda: opened.decrypt(pair.private, b"", ciphertext),
        lambda: opened.encrypt(b"", PLAINTEXT),
    ):
        with pytest.raises((InvalidKeyMaterial, ValueError)) as caught:
            call()
        assert_no_secret(caught.value, {"scalar": pair.private, "plaintext": PLAINTEXT})


# --- the tools ----------------------------------------------------------------------------------


def test_the_walker_finds_what_is_there():
    """A search that finds nothing anywhere would pass every test above."""
    secret = os.urandom(32)
    namespace = {"__name__": "elsewhere"}
    source = """
def leave(value):
    raise ValueError("nothing to see")

def hide(value):
    try:
        leave(value)
    except ValueError:
        del value
        raise KeyError("no") from None
"""
    exec(compile(source, "elsewhere.py", "exec"), namespace)
    for value in (
        secret,
        bytearray(secret),
        {"a": [secret]},
        f"hex {secret.hex()}",
        int.from_bytes(secret),
        KeyRef("b", AES, "c", b"x" + secret),
    ):
        for call in (namespace["leave"], namespace["hide"]):
            with pytest.raises((ValueError, KeyError)) as caught:
                call(value)
            with pytest.raises(AssertionError, match="secret in leave: value"):
                assert_no_secret(caught.value, {"secret": secret})
    with pytest.raises(AssertionError, match="secret in ValueError"):
        assert_no_secret(ValueError(secret), {"secret": secret})


def test_an_error_strip_tracebacks_is_the_same_error_alone():
    expected = HsmwrapError("the text")

    @strip_tracebacks
    def fails(secret):
        """Say what it does."""
        try:
            {}[secret]
        except KeyError as error:
            raise expected from error

    with pytest.raises(HsmwrapError) as caught:
        fails(PLAINTEXT)
    assert caught.value is expected
    assert (expected.__cause__, expected.__context__) == (None, None)
    assert [frame.f_code.co_name for frame in frames_of(expected)] == ["guarded"]
    assert not hasattr(expected, "__notes__")
    assert (fails.__name__, fails.__doc__) == ("fails", "Say what it does.")


def test_an_error_that_nobody_raised_on_purpose_says_where_it_was():
    @strip_tracebacks
    def fails(secret):
        return int(b"\xff" + secret)

    with pytest.raises(ValueError) as caught:
        fails(b"")
    (note,) = caught.value.__notes__
    assert note.startswith(f"at {__file__}:")
    assert note.endswith("in fails")
