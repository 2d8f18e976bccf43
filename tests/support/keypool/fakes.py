"""A backend that counts its calls, a pool without threads, and a forked child with a result."""

import itertools
import os
import pickle
import signal
import threading
import warnings
from datetime import UTC, datetime, timedelta

from hsmwrap.backend import (
    Custody,
    HasKeySets,
    Health,
    KeyRef,
    Mac,
    PrivateKeyRef,
    ReapsWrappingKeys,
)
from hsmwrap.catalog import KeySpec, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.composition import Composition
from hsmwrap.keypool import KeyPool
from hsmwrap.testing.memory import MemoryBackend, MemorySettings
from support.backends.scripted import Scripted

NOW = datetime(2030, 1, 1, 12, 0, 0, 250_000, tzinfo=UTC)
DAY = timedelta(hours=24)
OAEP = (WrappingKeySpec.RSA_2048, WrappingAlgorithm.RSAES_OAEP_SHA_256)
PKCS1 = (WrappingKeySpec.RSA_2048, WrappingAlgorithm.RSAES_PKCS1_V1_5)
SM2 = (WrappingKeySpec.EC_SM2, WrappingAlgorithm.SM2PKE)


class _Numbered(MemoryBackend):
    """Numbers its pairs: the public key is ``public 0``, the private one ``0``."""

    def __init__(self, settings):
        super().__init__(settings)
        self.numbers = itertools.count()

    def make_pair(self, _algorithm):
        number = b"%d" % next(self.numbers)
        return b"public " + number, number


class FakeBackend(Scripted):
    """A memory backend with numbered pairs.

    ``fail`` raises next where pairs are generated and discarded, ``permits`` holds generation back.
    """

    opens = _Numbered

    def __init__(self, name="fake", custody=Custody.HSM_INTERNAL):
        super().__init__(name=name, wrapping_custody=custody)
        self.asked = []
        self.fail = None
        self.ready = True
        self.permits = None
        self.entered = threading.Event()
        self.facts = {}

    @property
    def alive(self):
        """The resident private keys."""
        return {each[8:] for name, each in self.store.items() if name.startswith("wrapping-")}

    @property
    def discards(self):
        return self.calls.count("discard_wrapping_key")

    def generate_wrapping_key(self, spec, algorithm, *, expires_at):
        self.asked.append((spec, algorithm, expires_at))
        self.entered.set()
        if self.permits is not None:
            self.permits.acquire()
        if self.fail is not None:
            raise self.fail
        return super().generate_wrapping_key(spec, algorithm, expires_at=expires_at)

    def discard_wrapping_key(self, private_key):
        if self.fail is not None:
            self.failing["discard_wrapping_key"] = self.fail
        else:
            self.failing.clear()
        super().discard_wrapping_key(private_key)

    def rotate(self):
        MemoryBackend.rotate_keys({"store": self.store})

    def health(self):
        return Health(self.ready, "fake", self.facts)

    def close(self):
        self.ready = False
        super().close()


class Echo(Composition):
    """Answers by what it was asked, and keeps that."""

    def __init__(self):
        super().__init__(MemoryBackend(MemorySettings(name="fake")))
        self.asked = []

    def _forward(self, _asked, declared, *arguments, **named):
        self.asked.append((declared.__name__, arguments, named))
        return self.asked[-1]


class ManualClock:
    """A wall clock and a timer that stand still until they are set."""

    def __init__(self):
        self.now = NOW
        self.tick = 1000.0

    def move(self, delta):
        self.now += delta
        self.tick += delta.total_seconds()


class ManualPool(KeyPool):
    """A pool whose background work runs only when the test calls :meth:`work`."""

    def __init__(self, settings=None):
        self.time = ManualClock()
        super().__init__(settings, clock=lambda: self.time.now, timer=lambda: self.time.tick)

    def _start_threads(self):
        """No threads."""

    def work(self):
        """Run all jobs that are due now; returns their number."""
        done = 0
        while (job := self._pick(self.time.now, self.time.tick)) is not None:
            job()
            done += 1
        return done

    def take(self, backend, pair=OAEP, lasts=DAY):
        return self(backend, *pair, self.time.now.replace(microsecond=0) + lasts)

    def fact(self, pair=OAEP):
        return next(f for f in self.facts() if (f.spec, f.algorithm) == pair)


def wait_for(pool, condition):
    """Wait until a pool's numbers satisfy a condition."""
    with pool._changed:
        assert pool._changed.wait_for(lambda: condition(pool), 60), pool


class Child:
    """A forked child that runs a function; :meth:`result` waits for it."""

    def __init__(self, function):
        self._reading, writing = os.pipe()
        with warnings.catch_warnings():
            # Python 3.12 warns of a fork in a process with threads; that is tested here.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
        if not self._pid:
            os.close(self._reading)
            _answer(function, writing)
        os.close(writing)

    def result(self):
        with os.fdopen(self._reading, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(self._pid, 0)
        assert status == 0, f"the child died: {status}"
        outcome, result = pickle.loads(answer)
        assert outcome == "returned", result
        return result


def _answer(function, writing):
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


EVERY_CALL = {
    "capabilities": lambda b: b.capabilities(),
    "generate_wrapping_key": lambda b: b.generate_wrapping_key(*OAEP, expires_at=NOW),
    "discard_wrapping_key": lambda b: b.discard_wrapping_key(_PRIVATE),
    "unwrap_material": lambda b: b.unwrap_material(
        _PRIVATE,
        OAEP[1],
        b"secret ciphertext",
        key_spec=KeySpec.ALIYUN_SM4,
        expected_check_value=b"expected",
        object_id=b"o" * 16,
    ),
    "encrypt": lambda b: b.encrypt(_KEY, b"secret plaintext", b"aad"),
    "decrypt": lambda b: b.decrypt(_KEY, b"aadsecret ciphertext", b"aad"),
    "destroy_key": lambda b: b.destroy_key(_KEY),
    "mac": lambda b: b.mac(b"d" * 40),
    "verify_mac": lambda b: b.verify_mac(b"d" * 40, Mac("1", b"d" * 32)),
    "reap": lambda b: ReapsWrappingKeys.of(b).reap(NOW),
    "current_key_set": lambda b: HasKeySets.of(b).current_key_set(),
    "close": lambda b: b.close(),
}
"""Each observed call of the contract, with arguments that equal their names."""

_PRIVATE = PrivateKeyRef(Custody.HSM_INTERNAL, b"secret private")
_KEY = KeyRef("fake", KeySpec.ALIYUN_AES_256, Custody.HSM_INTERNAL, b"secret key")
