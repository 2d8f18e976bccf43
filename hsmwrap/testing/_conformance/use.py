"""Use of imported keys: GCM or CCM as documented, and no nonce is used twice."""

# A test kit: asserts do it.
# ruff: noqa: S101

from __future__ import annotations

import pytest

from hsmwrap.backend import NONCE_LENGTH, Backend, Custody, KeyRef
from hsmwrap.catalog import KeySpec
from hsmwrap.errors import InvalidCiphertext, KeyNotFound, UnsupportedOperation
from hsmwrap.testing._conformance.base import (
    ConformanceFixtures,
    UsableKey,
    flip,
    import_one,
    in_child,
    outcome,
    seen,
)
from hsmwrap.testing.clients import decrypt_message, encrypt_message

MESSAGES = 20


class UseConformance(ConformanceFixtures):
    """Encrypting and decrypting under imported keys."""

    topic = "Use of imported keys"

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
        sealed = encrypt_message(spec, material, b"from pyca", b"context", version=sealed[0])
        assert backend.decrypt(imported.key, sealed, b"context") == b"from pyca"

    def test_no_nonce_twice(self, backend: Backend, usable_key: UsableKey) -> None:
        assert _all_differ(_nonces(backend, usable_key))

    def test_no_nonce_twice_across_a_fork(self, backend: Backend, usable_key: UsableKey) -> None:
        before = _nonces(backend, usable_key)
        childs = in_child(lambda: _nonces(backend, usable_key))
        assert _all_differ([*before, *_nonces(backend, usable_key), *childs()])

    def test_no_nonce_twice_across_instances(
        self, backend: Backend, another: Backend, usable_key: UsableKey
    ) -> None:
        assert _all_differ([*_nonces(backend, usable_key), *_nonces(another, usable_key)])

    def test_damage_and_other_context_are_one_error(
        self, backend: Backend, usable_key: UsableKey
    ) -> None:
        key = usable_key[0].key
        sealed = backend.encrypt(key, b"message", b"context")
        damaged = [flip(sealed, 8 * at) for at in range(len(sealed))]
        bad = [(b, b"context") for b in (*damaged, sealed[:-1], sealed + b"\0", b"", sealed[:13])]
        bad.append((sealed, b"other"))
        outcomes = {outcome(lambda b=b: backend.decrypt(key, *b)) for b in bad}  # type: ignore[misc]
        assert outcomes == {seen(InvalidCiphertext())}

    def test_references_survive_storage(self, backend: Backend, usable_key: UsableKey) -> None:
        stored = KeyRef.from_bytes(usable_key[0].key.to_bytes())
        assert backend.decrypt(stored, backend.encrypt(stored, b"m")) == b"m"

    def test_a_reference_to_nothing_is_not_found(
        self, backend: Backend, usable_key: UsableKey
    ) -> None:
        key = usable_key[0].key
        damaged = KeyRef(key.backend, key.key_spec, key.custody, flip(key.data, 80))
        with pytest.raises(KeyNotFound):
            backend.encrypt(damaged, b"m")

    def test_a_destroyed_object_is_not_found(self, backend: Backend, usable_key: UsableKey) -> None:
        key = usable_key[0].key
        if key.custody is not Custody.HSM_INTERNAL:
            pytest.skip("capability: keeps no imported keys in the HSM")
        backend.destroy_key(key)
        with pytest.raises(KeyNotFound):
            backend.encrypt(key, b"m")

    def test_a_key_that_cannot_be_used_says_so(self, backend: Backend, key_spec: KeySpec) -> None:
        capability = backend.capabilities().key_for(key_spec)
        if capability is None or capability.usable:
            pytest.skip(f"capability: can use every {key_spec} key")
        imported, _ = import_one(backend, key_spec)
        with pytest.raises(UnsupportedOperation):
            backend.encrypt(imported.key, b"m")


def _nonces(backend: Backend, usable_key: UsableKey) -> list[bytes]:
    messages = [backend.encrypt(usable_key[0].key, b"same") for _ in range(MESSAGES)]
    return [message[1 : 1 + NONCE_LENGTH] for message in messages]


def _all_differ(nonces: list[bytes]) -> bool:
    return len(set(nonces)) == len(nonces)
