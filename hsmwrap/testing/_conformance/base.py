"""What every part of the kit uses: fixtures, a client, and what a caller sees of a call."""

# A test kit: asserts do it.
# ruff: noqa: S101

from __future__ import annotations

import multiprocessing
import pickle
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from typing import Any, ClassVar

import pytest

from hsmwrap.backend import (
    Backend,
    CountsObjects,
    Custody,
    ImportedKey,
    KeyRef,
    WrappingCapability,
    WrappingKey,
)
from hsmwrap.catalog import KeySpec, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import HsmError, HsmwrapError, InvalidKeyMaterial
from hsmwrap.guard import guarded
from hsmwrap.testing.clients import openssl_encrypt, pyca_encrypt

Pair = tuple[WrappingKeySpec, WrappingAlgorithm]

PAIRS: tuple[Pair, ...] = (
    (WrappingKeySpec.RSA_2048, WrappingAlgorithm.RSAES_PKCS1_V1_5),
    (WrappingKeySpec.RSA_2048, WrappingAlgorithm.RSAES_OAEP_SHA_1),
    (WrappingKeySpec.RSA_2048, WrappingAlgorithm.RSAES_OAEP_SHA_256),
    (WrappingKeySpec.EC_SM2, WrappingAlgorithm.SM2PKE),
)
FORK_TIMEOUT = 60

CountObjects = Callable[[], int]
Reopen = Callable[[], Backend]
Apart = Callable[[Callable[[], Any]], Any]
HolderReads = Callable[[KeyRef], bytes | None]
UsableKey = tuple[ImportedKey, bytes]
"""An imported key that can encrypt, and its material."""
Outcome = tuple[object, ...]
"""All that a caller can see of a call."""

DONE: Outcome = ("no error",)


def seen(error: HsmwrapError) -> Outcome:
    """What a caller sees of an error: type, text, attributes, notes, cause and context.

    A context hidden by ``raise … from None`` does not count: no log shows it.
    """
    context = None if error.__suppress_context__ else error.__context__
    return type(error), error.args, str(error), repr(vars(error)), error.__cause__, context


def outcome(call: Callable[[], object]) -> Outcome:
    """What a caller sees of this call."""
    try:
        call()
    except HsmwrapError as error:
        return seen(error)
    return DONE


REFUSED = seen(InvalidKeyMaterial())
"""The outcome of every import of a ciphertext that does not become the key."""


def flip(data: bytes, bit: int) -> bytes:
    """``data`` with one bit changed."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)


def tomorrow() -> datetime:
    """When an import token expires."""
    return datetime.now(UTC) + timedelta(hours=24)


@dataclass(frozen=True)
class Conversation:
    """A wrapping key, and a client that encrypts under it."""

    backend: Backend
    key: WrappingKey
    imported: list[ImportedKey] = field(default_factory=list, repr=False)

    @property
    def capability(self) -> WrappingCapability:
        """What the backend reports for this pair."""
        found = self.backend.capabilities().wrapping_for(self.key.spec, self.key.algorithm)
        assert found is not None
        return found

    def encrypt(self, material: bytes) -> bytes:
        """Encrypt key material as the client, with the openssl command."""
        return openssl_encrypt(self.key.algorithm, self.key.public_key, material)

    def encrypt_in_process(self, material: bytes) -> bytes:
        """The same, but by pyca in this process where pyca has the algorithm."""
        if self.key.spec is WrappingKeySpec.RSA_2048:
            return pyca_encrypt(self.key.algorithm, self.key.public_key, material)
        return self.encrypt(material)

    def import_material(
        self, ciphertext: bytes, key_spec: KeySpec, expected: bytes | None = None
    ) -> ImportedKey:
        """Have the backend import it."""
        imported = self.backend.unwrap_material(
            self.key.private_key,
            self.key.algorithm,
            ciphertext,
            key_spec=key_spec,
            expected_check_value=expected,
        )
        self.imported.append(imported)
        return imported

    def attempt(
        self, ciphertext: bytes, key_spec: KeySpec, expected: bytes | None = None
    ) -> Outcome:
        """The outcome of an import, as a client sees it; an imported key is destroyed."""
        return outcome(
            lambda: self.backend.destroy_key(
                self.import_material(ciphertext, key_spec, expected).key
            )
        )

    def clean_up(self) -> None:
        """Remove all keys from the HSM: each object makes its searches slower."""
        self.destroy_imported()
        with suppress(HsmwrapError):
            self.backend.discard_wrapping_key(self.key.private_key)

    def destroy_imported(self) -> None:
        """Remove the imported keys from the HSM."""
        for imported in self.imported:
            with suppress(HsmwrapError):
                self.backend.destroy_key(imported.key)
        self.imported.clear()


class Conversations:
    """The conversations that the tests of a class share: key pairs of RSA take long to make."""

    def __init__(self) -> None:
        self._open: dict[tuple[int, Pair], Conversation] = {}

    def get(self, backend: Backend, pair: Pair) -> Conversation:
        """The conversation of this backend and pair; a new one at first."""
        # Its conversation keeps a backend alive, so no other one has this id.
        key = id(backend), pair
        if key not in self._open:
            self._open[key] = new_conversation(backend, *pair)
        return self._open[key]

    def clean_up(self) -> None:
        """Remove all their keys from the HSM."""
        while self._open:
            self._open.popitem()[1].clean_up()


def new_conversation(
    backend: Backend, spec: WrappingKeySpec, algorithm: WrappingAlgorithm
) -> Conversation:
    """A conversation under a fresh wrapping key; skips if the backend does not serve the pair."""
    if backend.capabilities().wrapping_for(spec, algorithm) is None:
        pytest.skip(f"capability: does not serve {algorithm}")
    return Conversation(
        backend, backend.generate_wrapping_key(spec, algorithm, expires_at=tomorrow())
    )


def any_conversation(backend: Backend) -> Conversation:
    """A conversation under the pair that the backend lists last."""
    last = backend.capabilities().wrapping[-1]
    return new_conversation(backend, last.spec, last.algorithm)


def import_one(backend: Backend, key_spec: KeySpec) -> UsableKey:
    """Import fresh material."""
    conversation = any_conversation(backend)
    material = secrets.token_bytes(key_spec.material_length)
    return conversation.import_material(conversation.encrypt(material), key_spec), material


def any_key_spec(backend: Backend) -> KeySpec:
    """Any key spec that the backend imports."""
    return backend.capabilities().keys[0].key_spec


def in_child(call: Callable[[], Any]) -> Callable[[], Any]:
    """Start ``call`` in a forked child; the returned function waits for its result."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_report, args=(call, theirs))
    child.start()
    theirs.close()

    def wait() -> Any:
        answer = ours.recv() if ours.poll(FORK_TIMEOUT) else None
        child.join(FORK_TIMEOUT)
        assert child.exitcode == 0, "the forked child failed or hangs"
        return answer

    return wait


def _report(call: Callable[[], Any], to: Connection) -> None:
    to.send(call())


def in_another_process(call: Callable[[], Any]) -> Any:
    """Call it in a forked child, which has no backend open; returns and raises what it does."""

    def answer() -> tuple[Any, HsmwrapError | None]:
        try:
            return call(), None
        except HsmwrapError as error:
            try:
                pickle.loads(pickle.dumps(error))  # noqa: S301  # our own
            except Exception:  # noqa: BLE001  # a plug-in's own class
                error = HsmError(f"{type(error).__name__}: {error}")
            return None, error

    answered, error = in_child(answer)()
    if error is not None:
        raise error
    return answered


class ConformanceFixtures:
    """The fixtures that a plug-in author overrides, and those that the tests use."""

    topic: ClassVar[str]
    """What a part of the kit is about, for the report; a subclass of an author has none."""

    plugin: ClassVar[type[Backend]]
    """The plug-in's class."""

    keeps_backend_open: ClassVar[bool] = False
    """True if an overridden fixture ``backend`` gives the tests of a class the same backend. Then
    most of them share a wrapping key as well: the kit takes half of the time on SoftHSM2."""

    @pytest.fixture
    def plugin_class(self) -> type[Backend]:
        """The plug-in's class, where :attr:`plugin` does not say it."""
        return self.plugin

    @pytest.fixture
    def settings(self) -> Mapping[str, Any]:
        """Settings that ``from_settings`` takes."""
        return {}

    @pytest.fixture
    def backend(
        self, plugin_class: type[Backend], settings: Mapping[str, Any]
    ) -> Iterator[Backend]:
        """An open backend behind its guard, as an application has it."""
        with guarded(plugin_class.from_settings(settings)) as backend:
            yield backend

    @pytest.fixture
    def reopen(self, plugin_class: type[Backend], settings: Mapping[str, Any]) -> Reopen | None:
        """Opens the backend a second time, on the same keys; None where that is impossible."""
        return lambda: guarded(plugin_class.from_settings(settings))

    @pytest.fixture
    def so_pin_file(self) -> str | None:
        """File with the security officer's PIN, for what key sets need it for."""
        return None

    @pytest.fixture
    def apart(self) -> Apart:
        """Calls a function while no backend is open, as key sets are made and moved."""
        return in_another_process if self.keeps_backend_open else lambda call: call()

    @pytest.fixture
    def count_objects(self, backend: Backend) -> CountObjects | None:
        """Counts the objects in the HSM, session objects too; None where there are none."""
        counts = CountsObjects.of(backend)
        if counts is None:
            return None
        backend.capabilities()  # to measure them may make objects that stay
        return counts.count_objects

    @pytest.fixture
    def holder_reads(self) -> HolderReads | None:
        """Tries to read an imported key as the holder of the HSM's PIN, by every call that it has.

        The function returns the bytes that it could read, or None. None instead of a function where
        a backend has no such holder.
        """
        return None

    @pytest.fixture
    def counted(self, backend: Backend, count_objects: CountObjects | None) -> CountObjects:
        """Counts the objects in the HSM; needed from backends that keep objects."""
        if count_objects is None:
            report = backend.capabilities()
            custodies = {w.custody for w in report.wrapping} | {k.custody for k in report.keys}
            resident = Custody.HSM_INTERNAL in custodies
            assert not resident, "custody is HsmInternal, and nothing counts objects: CountsObjects"
            pytest.skip("capability: has no objects to count")
        return count_objects

    @pytest.fixture
    def another(self, backend: Backend, reopen: Reopen | None) -> Iterator[Backend]:
        """A second instance on the same keys, as another process or machine has it."""
        if reopen is None:
            pytest.skip("capability: is not opened twice")
        with reopen() as second:
            assert second is not backend
            yield second

    @pytest.fixture(params=PAIRS, ids=[str(algorithm) for _, algorithm in PAIRS])
    def pair(self, request: pytest.FixtureRequest) -> Pair:
        """Each pair of the catalogue."""
        chosen: Pair = request.param
        return chosen

    @pytest.fixture(scope="class")
    @classmethod
    def conversations(cls) -> Iterator[Conversations]:
        """The conversations that are shared where :attr:`keeps_backend_open`."""
        shared = Conversations()
        yield shared
        shared.clean_up()

    @pytest.fixture
    def fresh_conversation(self, backend: Backend, pair: Pair) -> Iterator[Conversation]:
        """A conversation under a wrapping key of its own, for each pair that the backend serves."""
        conversation = new_conversation(backend, *pair)
        yield conversation
        conversation.clean_up()

    @pytest.fixture
    def conversation(
        self, backend: Backend, pair: Pair, request: pytest.FixtureRequest
    ) -> Iterator[Conversation]:
        """A conversation for each pair that the backend serves; other tests may have had it."""
        if self.keeps_backend_open:
            conversation = request.getfixturevalue("conversations").get(backend, pair)
            yield conversation
            conversation.destroy_imported()
        else:
            yield request.getfixturevalue("fresh_conversation")

    @pytest.fixture(params=list(KeySpec), ids=[str(spec) for spec in KeySpec])
    def key_spec(self, backend: Backend, request: pytest.FixtureRequest) -> KeySpec:
        """Each key spec that the backend can import."""
        spec: KeySpec = request.param
        if backend.capabilities().key_for(spec) is None:
            pytest.skip(f"capability: does not import {spec}")
        return spec

    @pytest.fixture
    def usable_key(self, backend: Backend, key_spec: KeySpec) -> Iterator[UsableKey]:
        """An imported key that can encrypt, and its material."""
        capability = backend.capabilities().key_for(key_spec)
        if capability is None or not capability.usable:
            pytest.skip(f"capability: keeps {key_spec} keys but cannot use them")
        conversation = any_conversation(backend)
        material = secrets.token_bytes(key_spec.material_length)
        yield conversation.import_material(conversation.encrypt(material), key_spec), material
        conversation.clean_up()
