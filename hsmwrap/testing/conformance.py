"""The conformance kit: what every backend has to do, as a pytest class.

A plug-in author subclasses it in a test module and says how to open the backend::

    class TestMyBackend(BackendConformance):
        @pytest.fixture
        def backend(self):
            with MyBackend.from_settings({...}) as backend:
                yield backend

        @pytest.fixture
        def count_objects(self, backend):
            return lambda: ...  # objects in the HSM, to see that nothing is left behind

Tests of what the backend's capability report does not promise are skipped, and say so: the reason
of every skip starts with ``capability:``. Clients are the openssl command and pyca/cryptography.
"""

from __future__ import annotations

import multiprocessing
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.serialization import load_der_public_key

from hsmwrap.backend import (
    CONTRACT_VERSION,
    Backend,
    Custody,
    ImportedKey,
    KeyRef,
    Seal,
    WrappingKey,
)
from hsmwrap.catalog import KeySpec, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import (
    BackendClosed,
    HsmwrapError,
    InvalidCiphertext,
    InvalidKeyMaterial,
    KeyNotFound,
    UnsupportedOperation,
)
from hsmwrap.testing.clients import decrypt_message, encrypt_message, openssl_encrypt

PAIRS = (
    (WrappingKeySpec.RSA_2048, WrappingAlgorithm.RSAES_PKCS1_V1_5),
    (WrappingKeySpec.RSA_2048, WrappingAlgorithm.RSAES_OAEP_SHA_1),
    (WrappingKeySpec.RSA_2048, WrappingAlgorithm.RSAES_OAEP_SHA_256),
    (WrappingKeySpec.EC_SM2, WrappingAlgorithm.SM2PKE),
)
SPKI_LENGTH = {WrappingKeySpec.RSA_2048: 294, WrappingKeySpec.EC_SM2: 91}
WRONG_LENGTHS = frozenset({1, 8, 15, 16, 17, 24, 25, 31, 32, 33, 40, 64})
FORK_TIMEOUT = 60
F4 = 65537

UsableKey = tuple[ImportedKey, bytes]
"""An imported key that can encrypt, and its material."""


@dataclass(frozen=True)
class Conversation:
    """A wrapping key, and a client that encrypts under it."""

    backend: Backend
    key: WrappingKey

    def encrypt(self, material: bytes) -> bytes:
        """The client's part."""
        return openssl_encrypt(self.key.algorithm, self.key.public_key, material)

    def bring_in(
        self, ciphertext: bytes, key_spec: KeySpec, expected: bytes | None = None
    ) -> ImportedKey:
        """The backend's part."""
        return self.backend.unwrap_material(
            self.key.private_key,
            self.key.algorithm,
            ciphertext,
            key_spec=key_spec,
            expected_check_value=expected,
        )


@pytest.mark.usefixtures("backend")
class BackendConformance:
    """Subclass it and override :meth:`backend`."""

    @pytest.fixture
    def backend(self) -> Backend:
        """An open backend."""
        raise NotImplementedError

    @pytest.fixture
    def count_objects(self) -> Callable[[], int] | None:
        """Counts the objects in the HSM; None where that cannot be told."""
        return None

    @pytest.fixture(params=PAIRS, ids=[str(algorithm) for _, algorithm in PAIRS])
    def pair(self, request: pytest.FixtureRequest) -> tuple[WrappingKeySpec, WrappingAlgorithm]:
        """Each pair of the catalogue."""
        chosen: tuple[WrappingKeySpec, WrappingAlgorithm] = request.param
        return chosen

    @pytest.fixture
    def conversation(
        self, backend: Backend, pair: tuple[WrappingKeySpec, WrappingAlgorithm]
    ) -> Conversation:
        """One conversation for each pair that the backend serves."""
        return self._converse(backend, *pair)

    @pytest.fixture(params=list(KeySpec), ids=[str(spec) for spec in KeySpec])
    def key_spec(self, backend: Backend, request: pytest.FixtureRequest) -> KeySpec:
        """Each key spec that the backend can import."""
        spec: KeySpec = request.param
        if backend.capabilities().key_for(spec) is None:
            pytest.skip(f"capability: does not import {spec}")
        return spec

    @pytest.fixture
    def usable_key(self, backend: Backend, key_spec: KeySpec) -> UsableKey:
        """An imported key that can encrypt, and its material."""
        capability = backend.capabilities().key_for(key_spec)
        if capability is None or not capability.usable:
            pytest.skip(f"capability: keeps {key_spec} keys but cannot use them")
        return self._import_one(backend, key_spec)

    def _converse(
        self, backend: Backend, spec: WrappingKeySpec, algorithm: WrappingAlgorithm
    ) -> Conversation:
        if backend.capabilities().wrapping_for(spec, algorithm) is None:
            pytest.skip(f"capability: does not serve {algorithm}")
        expires_at = datetime.now(UTC) + timedelta(hours=24)
        key = backend.generate_wrapping_key(spec, algorithm, expires_at=expires_at)
        return Conversation(backend, key)

    def _import_one(self, backend: Backend, key_spec: KeySpec) -> UsableKey:
        best = backend.capabilities().wrapping[-1]
        conversation = self._converse(backend, best.spec, best.algorithm)
        material = secrets.token_bytes(key_spec.material_length)
        return conversation.bring_in(conversation.encrypt(material), key_spec), material

    # --- what it says of itself --------------------------------------------------------------

    def test_contract_version(self, backend: Backend) -> None:
        assert type(backend).contract_version == CONTRACT_VERSION

    def test_name_fits_import_tokens(self, backend: Backend) -> None:
        assert backend.name.isascii()
        assert 0 < len(backend.name) <= 32  # noqa: PLR2004
        assert backend.capabilities().backend == backend.name

    def test_capabilities_are_within_the_catalogue(self, backend: Backend) -> None:
        report = backend.capabilities()
        assert report.protection_levels
        assert report.wrapping
        assert report.keys
        assert {(w.spec, w.algorithm) for w in report.wrapping} <= set(PAIRS)

    def test_health_of_an_open_backend(self, backend: Backend) -> None:
        backend.capabilities()
        assert backend.health().ready

    # --- wrapping keys -----------------------------------------------------------------------

    def test_public_key_has_the_api_s_form(self, conversation: Conversation) -> None:
        der = conversation.key.public_key
        assert len(der) == SPKI_LENGTH[conversation.key.spec]
        if conversation.key.spec is WrappingKeySpec.RSA_2048:
            assert load_der_public_key(der).public_numbers().e == F4  # type: ignore[union-attr]

    def test_no_two_wrapping_keys_are_the_same(self, conversation: Conversation) -> None:
        key = conversation.key
        again = self._converse(conversation.backend, key.spec, key.algorithm).key
        assert again.public_key != key.public_key
        assert again.private_key.data != key.private_key.data

    def test_discarding_a_wrapping_key_twice_does_nothing_more(
        self, conversation: Conversation
    ) -> None:
        for _ in range(2):
            conversation.backend.discard_wrapping_key(conversation.key.private_key)

    def test_what_is_not_served_is_refused(self, backend: Backend) -> None:
        expires_at = datetime.now(UTC) + timedelta(hours=24)
        with pytest.raises(UnsupportedOperation):
            backend.generate_wrapping_key(
                WrappingKeySpec.RSA_2048, WrappingAlgorithm.SM2PKE, expires_at=expires_at
            )

    # --- import ------------------------------------------------------------------------------

    def test_material_becomes_a_key(self, conversation: Conversation, key_spec: KeySpec) -> None:
        material = secrets.token_bytes(key_spec.material_length)
        imported = conversation.bring_in(conversation.encrypt(material), key_spec)
        capability = conversation.backend.capabilities().wrapping_for(
            conversation.key.spec, conversation.key.algorithm
        )
        assert capability is not None
        assert imported.exposure is capability.exposure
        assert imported.key.key_spec is key_spec
        assert material not in imported.key.to_bytes()

    def test_the_same_token_imports_again(
        self, conversation: Conversation, key_spec: KeySpec
    ) -> None:
        material = secrets.token_bytes(key_spec.material_length)
        first = conversation.bring_in(conversation.encrypt(material), key_spec)
        second = conversation.bring_in(conversation.encrypt(material), key_spec, first.check_value)
        assert first.check_value == second.check_value

    def test_other_material_is_refused_on_re_import(
        self, conversation: Conversation, key_spec: KeySpec
    ) -> None:
        length = key_spec.material_length
        first = conversation.bring_in(conversation.encrypt(secrets.token_bytes(length)), key_spec)
        other = conversation.encrypt(secrets.token_bytes(length))
        with pytest.raises(InvalidKeyMaterial):
            conversation.bring_in(other, key_spec, first.check_value)

    def test_only_the_exact_length_is_accepted(
        self, conversation: Conversation, key_spec: KeySpec
    ) -> None:
        for length in WRONG_LENGTHS - {key_spec.material_length}:
            ciphertext = conversation.encrypt(secrets.token_bytes(length))
            with pytest.raises(InvalidKeyMaterial):
                conversation.bring_in(ciphertext, key_spec)

    def test_every_bad_ciphertext_is_the_same_error(
        self, conversation: Conversation, key_spec: KeySpec
    ) -> None:
        good = conversation.encrypt(secrets.token_bytes(key_spec.material_length))
        expected = b"\x01" + bytes(16)  # so that implicit rejection cannot pass for a key
        seen = {_outcome(conversation, bad, key_spec, expected) for bad in _bad_ciphertexts(good)}
        assert seen == {("InvalidKeyMaterial", ("key material is invalid.",))}

    def test_failed_imports_leave_no_object(
        self,
        conversation: Conversation,
        key_spec: KeySpec,
        count_objects: Callable[[], int] | None,
    ) -> None:
        if count_objects is None:
            pytest.skip("capability: has no objects to count")
        before = count_objects()
        good = conversation.encrypt(secrets.token_bytes(key_spec.material_length))
        wrong = conversation.encrypt(secrets.token_bytes(key_spec.material_length + 1))
        for bad in (*_bad_ciphertexts(good), wrong, good):
            with pytest.raises(InvalidKeyMaterial):
                conversation.bring_in(bad, key_spec, b"\x01" + bytes(16))
        assert count_objects() == before

    def test_a_key_under_its_chosen_object_id_goes_when_destroyed(
        self, backend: Backend, count_objects: Callable[[], int] | None
    ) -> None:
        if count_objects is None:
            pytest.skip("capability: has no objects to count")
        served = backend.capabilities().wrapping[-1]
        conversation = self._converse(backend, served.spec, served.algorithm)
        before, object_id = count_objects(), secrets.token_bytes(16)
        imported = backend.unwrap_material(
            conversation.key.private_key,
            conversation.key.algorithm,
            conversation.encrypt(secrets.token_bytes(32)),
            key_spec=KeySpec.ALIYUN_AES_256,
            object_id=object_id,
        )
        if imported.key.custody is Custody.HSM_INTERNAL:
            assert imported.key.data == object_id
        for _ in range(2):
            backend.destroy_key(imported.key)
        assert count_objects() == before

    # --- use ---------------------------------------------------------------------------------

    @pytest.mark.parametrize("plaintext", [b"", b"x", b"0123456789abcdef", bytes(6000)])
    def test_round_trip(self, backend: Backend, usable_key: UsableKey, plaintext: bytes) -> None:
        key = usable_key[0].key
        sealed = backend.encrypt(key, plaintext, b"context")
        assert backend.decrypt(key, sealed, b"context") == plaintext

    def test_pyca_reads_and_writes_the_same_messages(
        self, backend: Backend, usable_key: UsableKey
    ) -> None:
        imported, material = usable_key
        spec = imported.key.key_spec
        sealed = backend.encrypt(imported.key, b"from the backend", b"context")
        assert decrypt_message(spec, material, sealed, b"context") == b"from the backend"
        sealed = encrypt_message(spec, material, b"from pyca", b"context")
        assert backend.decrypt(imported.key, sealed, b"context") == b"from pyca"

    def test_no_nonce_twice(self, backend: Backend, usable_key: UsableKey) -> None:
        key = usable_key[0].key
        assert len({backend.encrypt(key, b"same")[:13] for _ in range(20)}) == 20  # noqa: PLR2004

    def test_damage_and_other_context_are_one_error(
        self, backend: Backend, usable_key: UsableKey
    ) -> None:
        key = usable_key[0].key
        sealed = backend.encrypt(key, b"message", b"context")
        damaged = [_flip(sealed, 8 * at) for at in range(len(sealed))]
        for bad in (*damaged, sealed[:-1], sealed + b"\0", b"", sealed[:13]):
            with pytest.raises(InvalidCiphertext):
                backend.decrypt(key, bad, b"context")
        with pytest.raises(InvalidCiphertext):
            backend.decrypt(key, sealed, b"other")

    def test_references_survive_storage(self, backend: Backend, usable_key: UsableKey) -> None:
        stored = KeyRef.from_bytes(usable_key[0].key.to_bytes())
        assert backend.decrypt(stored, backend.encrypt(stored, b"m")) == b"m"

    def test_a_reference_to_nothing_is_not_found(
        self, backend: Backend, usable_key: UsableKey
    ) -> None:
        key = usable_key[0].key
        damaged = KeyRef(key.backend, key.key_spec, key.custody, _flip(key.data, 80))
        with pytest.raises(KeyNotFound):
            backend.encrypt(damaged, b"m")

    def test_a_key_that_cannot_be_used_says_so(self, backend: Backend, key_spec: KeySpec) -> None:
        capability = backend.capabilities().key_for(key_spec)
        if capability is None or capability.usable:
            return
        imported, _ = self._import_one(backend, key_spec)
        with pytest.raises(UnsupportedOperation):
            backend.encrypt(imported.key, b"m")

    # --- import tokens -----------------------------------------------------------------------

    def test_a_seal_holds_for_its_data_only(self, backend: Backend) -> None:
        data = secrets.token_bytes(100)
        seal = backend.seal(data)
        assert backend.check_seal(data, seal)
        assert not backend.check_seal(_flip(data, 99), seal)
        for bit in range(0, 256, 7):
            assert not backend.check_seal(data, Seal(seal.key_id, _flip(seal.tag, bit)))

    @pytest.mark.parametrize("key_id", ["", "0", "01", "unknown", "-1", "9" * 32])
    def test_an_unknown_seal_key_is_no_error(self, backend: Backend, key_id: str) -> None:
        assert not backend.check_seal(b"data", Seal(key_id, bytes(32)))

    # --- a server's life ---------------------------------------------------------------------

    def test_threads_do_not_mix_up_their_keys(
        self, conversation: Conversation, key_spec: KeySpec
    ) -> None:
        def one(material: bytes) -> bytes:
            return conversation.bring_in(conversation.encrypt(material), key_spec).check_value

        materials = [secrets.token_bytes(key_spec.material_length) for _ in range(12)]
        expected = [one(material) for material in materials]
        with ThreadPoolExecutor(6) as threads:
            assert list(threads.map(one, materials)) == expected

    def test_a_forked_child_works_and_the_parent_goes_on(
        self, backend: Backend, key_spec: KeySpec
    ) -> None:
        imported, material = self._import_one(backend, key_spec)

        def again() -> None:
            served = backend.capabilities().wrapping[-1]
            conversation = self._converse(backend, served.spec, served.algorithm)
            key = conversation.bring_in(conversation.encrypt(material), key_spec)
            assert key.check_value == imported.check_value

        child = multiprocessing.get_context("fork").Process(target=again)
        child.start()
        again()
        child.join(FORK_TIMEOUT)
        assert child.exitcode == 0
        again()

    def test_everything_is_closed_after_close(self, backend: Backend) -> None:
        imported, _ = self._import_one(backend, KeySpec.ALIYUN_AES_256)
        served = backend.capabilities().wrapping[-1]
        key = self._converse(backend, served.spec, served.algorithm).key
        seal = backend.seal(b"data")
        backend.close()
        backend.close()
        calls: list[Callable[[], object]] = [
            backend.capabilities,
            lambda: self._converse(backend, served.spec, served.algorithm),
            lambda: Conversation(backend, key).bring_in(bytes(256), KeySpec.ALIYUN_AES_256),
            lambda: backend.encrypt(imported.key, b""),
            lambda: backend.decrypt(imported.key, bytes(40)),
            lambda: backend.destroy_key(imported.key),
            lambda: backend.seal(b"data"),
            lambda: backend.check_seal(b"data", seal),
            lambda: backend.reap(datetime.now(UTC)),
        ]
        for call in calls:
            with pytest.raises(BackendClosed):
                call()
        assert not backend.health().ready

    def test_reaping_spares_what_has_not_expired(self, conversation: Conversation) -> None:
        conversation.backend.reap(datetime.now(UTC))
        material = conversation.encrypt(secrets.token_bytes(32))
        conversation.bring_in(material, KeySpec.ALIYUN_AES_256)

    def test_reaping_removes_expired_resident_keys(
        self, conversation: Conversation, count_objects: Callable[[], int] | None
    ) -> None:
        if count_objects is None:
            pytest.skip("capability: has no objects to count")
        conversation.backend.reap(datetime.now(UTC) + timedelta(hours=48))
        before = count_objects()
        key = conversation.key
        self._converse(conversation.backend, key.spec, key.algorithm)
        conversation.backend.reap(datetime.now(UTC) + timedelta(hours=48))
        assert count_objects() == before


def _flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)


def _bad_ciphertexts(good: bytes) -> list[bytes]:
    damaged = [_flip(good, 8 * at) for at in range(2, len(good), 9)]
    random = [secrets.token_bytes(len(good)) for _ in range(3)]
    cut = [good[:-1], good + b"\0", b"", b"\0" * len(good), b"\xff" * len(good)]
    return [*damaged, *random, *cut]


def _outcome(
    conversation: Conversation, ciphertext: bytes, key_spec: KeySpec, expected: bytes
) -> tuple[str, tuple[object, ...]]:
    try:
        conversation.bring_in(ciphertext, key_spec, expected)
    except HsmwrapError as error:
        return type(error).__name__, error.args
    return "imported", ()
