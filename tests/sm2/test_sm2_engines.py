import copy
import ctypes
import logging
import os
import pickle
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from hsmwrap.errors import ConfigurationError, HsmwrapError, InvalidKeyMaterial, SelfTestFailed
from hsmwrap.locks import LIBCRYPTO
from hsmwrap.sm2 import (
    Sm2Ciphertext,
    Sm2KeyPair,
    decode_point,
    known_answer,
    open_engine,
    openssl,
)
from hsmwrap.sm2 import engine as engine_module
from hsmwrap.sm2.curve import GX, GY, N, P, encode_point
from hsmwrap.sm2.gmssl_engine import GmsslEngine
from hsmwrap.sm2.libcrypto import LibcryptoEngine

MATERIAL = bytes(range(32))
G = encode_point(GX, GY)


def scalar(number):
    return number.to_bytes(32)


# --- every engine -----------------------------------------------------------------------------


def test_known_answer(engine):
    plaintext = engine.decrypt(known_answer.PRIVATE, known_answer.PUBLIC, known_answer.CIPHERTEXT)
    assert plaintext == known_answer.MESSAGE


def test_key_pairs_are_fresh_and_right(engine, reference):
    pairs = [engine.generate() for _ in range(5)]
    assert len({pair.private for pair in pairs}) == len({pair.public for pair in pairs}) == 5
    for pair in pairs:
        number = int.from_bytes(pair.private)
        assert len(pair.private) == 32
        assert 1 <= number <= N - 2
        assert decode_point(pair.public) == reference.multiply(number, reference.G)


@pytest.mark.parametrize("length", [16, 19, 32, 33, 255, 4096])
def test_round_trip(engine, length):
    pair, message = engine.generate(), bytes(length - 1) + b"\x01"
    ciphertext = engine.encrypt(pair.public, message)
    assert len(ciphertext.c2) == length
    assert engine.decrypt(pair.private, pair.public, ciphertext) == message
    assert engine.encrypt(pair.public, message) != ciphertext


def test_engines_understand_each_other(engine, libcrypto):
    for sender, receiver in ((engine, libcrypto), (libcrypto, engine)):
        pair = receiver.generate()
        ciphertext = sender.encrypt(pair.public, MATERIAL)
        assert receiver.decrypt(pair.private, pair.public, ciphertext) == MATERIAL


@pytest.mark.parametrize("part", ["c2", "c3"])
def test_changed_bits_are_refused(engine, part):
    genuine = getattr(known_answer.CIPHERTEXT, part)
    # gmssl is forty times slower, and its C3 check is tested bit by bit in test_sm2_decrypt.
    for bit in range(0, 8 * len(genuine), 1 if engine.production else 9):
        changed = (int.from_bytes(genuine) ^ 1 << bit).to_bytes(len(genuine))
        refused(engine, replace(known_answer.CIPHERTEXT, **{part: changed}))


def test_other_c1_is_refused(engine):
    genuine = known_answer.CIPHERTEXT
    refused(engine, replace(genuine, y=P - genuine.y))
    refused(engine, replace(genuine, x=GX, y=GY))


def test_shorter_and_longer_c2_is_refused(engine):
    genuine = known_answer.CIPHERTEXT
    refused(engine, replace(genuine, c2=genuine.c2[:-1]))
    refused(engine, replace(genuine, c2=genuine.c2 + b"\x00"))


def refused(
    engine,
    ciphertext,
    private=known_answer.PRIVATE,
    public=known_answer.PUBLIC,
    method="decrypt",
):
    with pytest.raises(InvalidKeyMaterial) as caught:
        getattr(engine, method)(private, public, ciphertext)
    assert str(caught.value) == "key material is invalid."
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__


NO_PAIRS = {
    "zero": (scalar(0), known_answer.PUBLIC),
    "zero-with-infinity": (scalar(0), b"\x00"),
    "n-minus-1": (scalar(N - 1), encode_point(GX, P - GY)),
    "n": (scalar(N), known_answer.PUBLIC),
    "n-plus-1": (scalar(N + 1), G),
    "all-ones": (b"\xff" * 32, known_answer.PUBLIC),
    "empty": (b"", known_answer.PUBLIC),
    "other-private": (scalar(2), known_answer.PUBLIC),
    "other-public": (known_answer.PRIVATE, G),
    "negated-public": (scalar(1), encode_point(GX, P - GY)),
    "public-off-curve": (known_answer.PRIVATE, known_answer.PUBLIC[:-1] + b"\x00"),
    "public-compressed": (scalar(1), b"\x02" + G[1:33]),
    "public-hybrid": (scalar(1), b"\x06" + G[1:]),
    "public-empty": (known_answer.PRIVATE, b""),
}


@pytest.mark.parametrize(("private", "public"), NO_PAIRS.values(), ids=NO_PAIRS.keys())
def test_no_key_pair(engine, private, public):
    refused(engine, known_answer.CIPHERTEXT, private, public)
    with suppress(ValueError):  # not all of these are points to encrypt to
        refused(engine, engine.encrypt(public, MATERIAL), private, public)


SEALED = [name for name in NO_PAIRS if not name.startswith(("other-", "negated-"))]


@pytest.mark.parametrize("name", SEALED)
def test_no_sealed_key_pair(engine, name):
    """Range and curve are checked again; 'n-plus-1' would decrypt, as n + 1 is 1 modulo n."""
    private, public = NO_PAIRS[name]
    refused(engine, known_answer.CIPHERTEXT, private, public, method="decrypt_sealed")
    refused(engine, engine.encrypt(G, MATERIAL), private, public, method="decrypt_sealed")


def test_sealed_key_pairs_decrypt(engine):
    pair = engine.generate()
    ciphertext = engine.encrypt(pair.public, MATERIAL)
    assert engine.decrypt_sealed(pair.private, pair.public, ciphertext) == MATERIAL
    for bad in (replace(ciphertext, c3=bytes(32)), replace(ciphertext, y=P - ciphertext.y)):
        refused(engine, bad, pair.private, pair.public, method="decrypt_sealed")


def test_smallest_and_largest_scalar(engine, reference):
    for number in (1, 2, N - 2):
        public = encode_point(*reference.multiply(number, reference.G))
        ciphertext = engine.encrypt(public, MATERIAL)
        assert engine.decrypt(scalar(number), public, ciphertext) == MATERIAL


def test_encrypt_refuses_empty_messages_and_bad_points(engine):
    with pytest.raises(ValueError):
        engine.encrypt(G, b"")
    for public in (b"", b"\x00", G[:-1], G[:-1] + b"\x00", b"\x02" + G[1:33]):
        with pytest.raises(ValueError):
            engine.encrypt(public, MATERIAL)


def test_private_key_is_not_in_the_repr(engine):
    pair = engine.generate()
    assert "private" not in repr(pair)
    assert repr(pair.private) not in repr(pair)
    assert pair.private.hex() not in repr(engine.__dict__)


@pytest.mark.parametrize("leak", [pickle.dumps, copy.copy, copy.deepcopy])
def test_key_pairs_do_not_pickle_or_copy(leak):
    pair = Sm2KeyPair(scalar(2), G)
    assert replace(pair, private=scalar(3)).public == G
    with pytest.raises(TypeError, match="private key"):
        leak(pair)


@pytest.mark.slow
def test_threads(engine):
    def work(_):
        pair = engine.generate()
        ciphertext = engine.encrypt(pair.public, MATERIAL)
        bad = replace(ciphertext, c3=bytes(32))
        for _ in range(20 if engine.production else 1):
            refused(engine, bad, pair.private, pair.public)
            assert engine.decrypt(pair.private, pair.public, ciphertext) == MATERIAL
        return pair.public

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(work, range(32)))) == 32


# --- opening ----------------------------------------------------------------------------------


def test_unknown_engine():
    with pytest.raises(ConfigurationError, match="libcrypto, gmssl"):
        open_engine("openssl")


def test_gmssl_announces_itself(caplog):
    with caplog.at_level(logging.WARNING):
        assert not open_engine("gmssl").production
    assert ["NOT FOR PRODUCTION" in record.getMessage() for record in caplog.records] == [True]


def test_libcrypto_is_for_production_and_silent(caplog):
    with caplog.at_level(logging.DEBUG):
        assert open_engine("libcrypto").production
    assert caplog.records == []


def test_gmssl_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "gmssl.sm2", None)
    with pytest.raises(ConfigurationError, match=r"\[gmssl\]"):
        open_engine("gmssl")


def test_libcrypto_missing(monkeypatch):
    monkeypatch.setattr(openssl, "SONAME", "libcrypto.so.none")
    monkeypatch.setattr(GmsslEngine, "__init__", lambda self: pytest.fail("fell back to gmssl"))
    with pytest.raises(ConfigurationError, match="gmssl can be configured by name"):
        open_engine("libcrypto")


def test_libcrypto_too_old(monkeypatch):
    monkeypatch.setattr(openssl, "_PROTOTYPES", {"EVP_PKEY_no_such_function": (ctypes.c_int,)})
    with pytest.raises(ConfigurationError, match="no_such_function"):
        open_engine("libcrypto")


def test_libcrypto_without_sm2(tmp_path):
    """A real one: libcrypto with nothing but its null provider."""
    configuration = tmp_path / "openssl.cnf"
    configuration.write_text(
        "openssl_conf = init\n[init]\nproviders = list\n[list]\nnull = null\n[null]\nactivate = 1\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", "from hsmwrap.sm2 import open_engine; open_engine('libcrypto')"],
        env={
            **os.environ,
            "OPENSSL_CONF": str(configuration),
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("hsmwrap.errors.ConfigurationError: libcrypto.so.3 (OpenSSL 3.")
    assert "has no SM2" in last


class Broken(LibcryptoEngine):
    name = "broken"


def garble(self, private, public, ciphertext):
    return LibcryptoEngine.decrypt(self, private, public, ciphertext)[::-1]


def encrypt_another(self, public, plaintext):
    return LibcryptoEngine.encrypt(self, public, plaintext[::-1])


def ignore_c3(self, private, public, ciphertext):
    try:
        return LibcryptoEngine.decrypt(self, private, public, ciphertext)
    except InvalidKeyMaterial:
        return known_answer.MESSAGE


def refuse(self, private, public, ciphertext):
    raise InvalidKeyMaterial


@pytest.mark.parametrize(
    ("method", "replacement"),
    [
        pytest.param("decrypt", garble, id="decrypts-to-something-else"),
        pytest.param("encrypt", encrypt_another, id="encrypts-something-else"),
        pytest.param("decrypt", ignore_c3, id="ignores-c3"),
        pytest.param("decrypt", refuse, id="refuses"),
        pytest.param("decrypt_sealed", garble, id="decrypts-sealed-pairs-to-something-else"),
        pytest.param("generate", lambda self: Sm2KeyPair(scalar(2), G), id="wrong-pairs"),
        pytest.param("generate", lambda self: Sm2KeyPair(scalar(2), b""), id="no-pairs"),
    ],
)
def test_self_test_catches(monkeypatch, method, replacement):
    monkeypatch.setattr(Broken, method, replacement)
    monkeypatch.setattr(engine_module, "ENGINES", {"broken": (__name__, "Broken")})
    with pytest.raises(SelfTestFailed, match="broken"):
        open_engine("broken")


# --- libcrypto, inside ------------------------------------------------------------------------

MAKERS = ("CTX_new_from_name", "CTX_new_from_pkey")
FAILING = {
    "good": (known_answer.PRIVATE, known_answer.CIPHERTEXT),
    "changed-c3": (known_answer.PRIVATE, replace(known_answer.CIPHERTEXT, c3=bytes(32))),
    "other-private": (scalar(2), known_answer.CIPHERTEXT),
    "no-private": (b"", known_answer.CIPHERTEXT),
}


class Spy:
    """Stands before the library: counts the objects that are made and freed."""

    def __init__(self, lib):
        self._lib = lib
        self.alive = Counter()

    def __getattr__(self, name):
        function = getattr(self._lib, name)

        def call(*arguments):
            if name.endswith("_free") and getattr(arguments[0], "value", arguments[0]):
                self.alive[name] -= 1
            result = function(*arguments)
            self._count(name, arguments)
            return result

        return call

    def _count(self, name, arguments):
        if name.startswith("EVP_PKEY_CTX_new"):
            self.alive["EVP_PKEY_CTX_free"] += 1
        if name in ("EVP_PKEY_fromdata", "EVP_PKEY_generate"):
            self.alive["EVP_PKEY_free"] += 1
        if name == "EVP_PKEY_get_bn_param":
            self.alive["BN_clear_free"] += 1


@pytest.fixture
def spied(monkeypatch):
    engine = LibcryptoEngine()
    engine._lib = Spy(engine._lib)
    engine.buffers = []
    genuine = openssl.Scope.buffer

    def buffer(self, *arguments):
        engine.buffers.append(genuine(self, *arguments))
        return engine.buffers[-1]

    monkeypatch.setattr(openssl.Scope, "buffer", buffer)
    return engine


def use(engine, private, ciphertext):
    pair = engine.generate()
    engine.encrypt(pair.public, MATERIAL)
    with suppress(InvalidKeyMaterial):
        engine.decrypt(private, known_answer.PUBLIC, ciphertext)


@pytest.mark.parametrize(("private", "ciphertext"), FAILING.values(), ids=FAILING.keys())
def test_nothing_is_left_behind(spied, private, ciphertext):
    use(spied, private, ciphertext)
    assert set(spied._lib.alive) == {"EVP_PKEY_CTX_free", "EVP_PKEY_free", "BN_clear_free"}
    assert set(spied._lib.alive.values()) == {0}
    assert spied.buffers
    assert not any(any(buffer.raw) for buffer in spied.buffers)
    assert ctypes.CDLL("libcrypto.so.3").ERR_peek_error() == 0


def test_a_pair_that_is_none_is_found_where_it_is_made(spied, monkeypatch):
    """Not at the import, where it would look like the client's fault."""
    library = spied._lib._lib
    failing = SimpleNamespace(__name__="EVP_PKEY_pairwise_check")
    answer = partial(openssl._raise_on_failure, 0, failing, ())
    proofs = []
    proved = library.EVP_PKEY_pairwise_check
    monkeypatch.setattr(
        spied._lib, "EVP_PKEY_pairwise_check", lambda c: proofs.append(proved(c)), raising=False
    )
    spied.generate()
    assert proofs == [1]
    monkeypatch.setattr(spied._lib, "EVP_PKEY_pairwise_check", lambda _: answer())
    with pytest.raises(HsmwrapError, match="pairwise_check"):
        spied.generate()
    assert set(spied._lib.alive.values()) == {0}


def test_what_a_signal_handler_interrupts_is_freed_all_the_same(libcrypto):
    freed = []

    def interrupted(_):
        raise KeyboardInterrupt

    scope = libcrypto._scope().__enter__()
    buffer = scope.buffer(4, b"abcd")
    for end in (freed.append, interrupted, freed.append):
        scope.own(len(scope._ends), end)
    with pytest.raises(KeyboardInterrupt):
        scope.__exit__()
    assert freed == [3, 1]
    assert buffer.raw == bytes(4)
    assert LIBCRYPTO.reads == 0


def test_plaintext_buffer_is_as_long_as_the_ciphertext(spied):
    spied.decrypt(known_answer.PRIVATE, known_answer.PUBLIC, known_answer.CIPHERTEXT)
    assert len(spied.buffers[-1]) == len(known_answer.CIPHERTEXT.to_der())


def test_every_function_is_declared():
    lib = openssl.load()
    assert isinstance(lib, ctypes.CDLL)  # not PyDLL: the GIL is released
    for name in openssl._PROTOTYPES:
        assert getattr(lib, name).argtypes is not None


def test_plaintext_of_another_length_is_refused(libcrypto, monkeypatch):
    monkeypatch.setattr(LibcryptoEngine, "_run", staticmethod(lambda *arguments: b"short"))
    refused(libcrypto, known_answer.CIPHERTEXT)


def test_large_and_tiny_points(libcrypto, reference):
    """C1 with short coordinates: DER with short INTEGERs reaches libcrypto and is refused by C3."""
    x, y = reference.point_from(1)
    refused(libcrypto, Sm2Ciphertext(x, y, bytes(32), MATERIAL))
