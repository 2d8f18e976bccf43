"""Imports: the right material becomes a key; everything else gives one and the same error."""

# A test kit: asserts do it.
# ruff: noqa: S101

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import replace

import pytest

from hsmwrap.backend import Backend, Custody
from hsmwrap.catalog import KeySpec, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.checkvalue import METHODS, check_value
from hsmwrap.errors import InvalidImportToken, InvalidKeyMaterial
from hsmwrap.testing._conformance.base import (
    DONE,
    REFUSED,
    ConformanceFixtures,
    Conversation,
    CountObjects,
    HolderReads,
    Outcome,
    any_conversation,
    any_key_spec,
    flip,
    import_one,
    new_conversation,
)
from hsmwrap.testing._conformance.leaks import leaks
from hsmwrap.testing.hostile import (
    oaep_forgeries,
    sm2_forgeries,
    sm2_layouts,
    small_order_forgeries,
)

WRONG_LENGTHS = (0, 1, 8, 15, 16, 17, 20, 24, 25, 30, 31, 32, 33, 40, 48, 64, 100)
NO_MATERIAL_S = b"\x01" + bytes(16)
"""A check value that no material has: random bytes from implicit rejection never match it."""
SM2 = (WrappingKeySpec.EC_SM2, WrappingAlgorithm.SM2PKE)
SMALL_ORDER_KEYS = 3


class ImportConformance(ConformanceFixtures):
    """A client's ciphertext becomes a key, or one error."""

    topic = "Imports"

    def test_material_becomes_a_key(self, conversation: Conversation, key_spec: KeySpec) -> None:
        material = secrets.token_bytes(key_spec.material_length)
        imported = conversation.import_material(conversation.encrypt(material), key_spec)
        capability = conversation.backend.capabilities().key_for(key_spec)
        assert capability is not None
        assert imported.exposure is conversation.capability.exposure
        assert imported.key.key_spec is key_spec
        assert imported.key.custody is capability.custody
        assert imported.key.backend == conversation.backend.name

    def test_the_holder_of_the_pin_does_not_read_the_key(
        self, conversation: Conversation, key_spec: KeySpec, holder_reads: HolderReads | None
    ) -> None:
        if holder_reads is None:
            pytest.skip("capability: no holder of a PIN who could try to read keys")
        material = secrets.token_bytes(key_spec.material_length)
        imported = conversation.import_material(conversation.encrypt(material), key_spec)
        assert material not in (holder_reads(imported.key) or b"")

    def test_neither_reference_nor_check_value_shows_the_material(
        self, backend: Backend, key_spec: KeySpec
    ) -> None:
        imported, material = import_one(backend, key_spec)
        assert not leaks(material, imported.key.to_bytes())
        assert not leaks(material, imported.check_value)

    def test_check_values_of_known_methods_are_the_documented_ones(
        self, backend: Backend, key_spec: KeySpec
    ) -> None:
        imported, material = import_one(backend, key_spec)
        method = imported.check_value[0]
        if method in METHODS:
            assert imported.check_value == check_value(material, method)

    def test_the_same_token_imports_again(
        self, conversation: Conversation, key_spec: KeySpec
    ) -> None:
        material = secrets.token_bytes(key_spec.material_length)
        first = conversation.import_material(conversation.encrypt(material), key_spec)
        second = conversation.import_material(
            conversation.encrypt(material), key_spec, first.check_value
        )
        assert first.check_value == second.check_value

    def test_other_material_is_refused_on_re_import(
        self, conversation: Conversation, key_spec: KeySpec
    ) -> None:
        length = key_spec.material_length
        first = conversation.import_material(
            conversation.encrypt(secrets.token_bytes(length)), key_spec
        )
        other = conversation.encrypt(secrets.token_bytes(length))
        assert conversation.attempt(other, key_spec, first.check_value) == REFUSED

    def test_only_the_exact_length_is_accepted(
        self, conversation: Conversation, key_spec: KeySpec
    ) -> None:
        for length in set(WRONG_LENGTHS) - {key_spec.material_length}:
            for ciphertext in _of_length(conversation, length):
                assert conversation.attempt(ciphertext, key_spec) == REFUSED, length

    def test_every_bad_ciphertext_is_the_same_error(
        self, conversation: Conversation, key_spec: KeySpec
    ) -> None:
        good = conversation.encrypt(secrets.token_bytes(key_spec.material_length))
        bad = list(_damaged(good, step=9))
        outcomes = _outcomes(conversation, bad, key_spec, NO_MATERIAL_S)
        assert set(outcomes.values()) == {REFUSED}, _others(outcomes, {REFUSED})

    def test_no_bad_ciphertext_becomes_a_key_at_first(
        self, conversation: Conversation, key_spec: KeySpec
    ) -> None:
        """Without a check value from an earlier import, the padding or C3 has to show the error.

        PKCS#1 v1.5 has no integrity: there a wrong ciphertext may become a random key.
        """
        good = conversation.encrypt(secrets.token_bytes(key_spec.material_length))
        bad = [*_damaged(good, step=37), *_forged(conversation, key_spec)]
        outcomes = _outcomes(conversation, bad, key_spec, None)
        pkcs1 = conversation.key.algorithm is WrappingAlgorithm.RSAES_PKCS1_V1_5
        allowed = {REFUSED, DONE} if pkcs1 else {REFUSED}
        assert set(outcomes.values()) <= allowed, _others(outcomes, allowed)

    def test_every_sm2_layout_is_read(self, backend: Backend, key_spec: KeySpec) -> None:
        conversation = new_conversation(backend, *SM2)
        material = secrets.token_bytes(key_spec.material_length)
        expected = conversation.import_material(
            conversation.encrypt(material), key_spec
        ).check_value
        for layout, ciphertext in sm2_layouts(conversation.key.public_key, material):
            assert conversation.attempt(ciphertext, key_spec, expected) == DONE, layout

    def test_points_of_other_curves_are_refused(self, backend: Backend, key_spec: KeySpec) -> None:
        for _ in range(SMALL_ORDER_KEYS):
            conversation = new_conversation(backend, *SM2)
            for what, ciphertext in small_order_forgeries(key_spec.material_length):
                assert conversation.attempt(ciphertext, key_spec) == REFUSED, what

    def test_a_wrapping_key_serves_its_own_algorithm_only(self, conversation: Conversation) -> None:
        key, backend = conversation.key, conversation.backend
        key_spec = any_key_spec(backend)
        for other in backend.capabilities().wrapping:
            if other.algorithm is key.algorithm:
                continue
            ciphertext = b"\0" + secrets.token_bytes(255)
            if other.spec is key.spec:
                as_other = Conversation(backend, replace(key, algorithm=other.algorithm))
                ciphertext = as_other.encrypt(secrets.token_bytes(key_spec.material_length))
            with pytest.raises(InvalidImportToken):
                backend.unwrap_material(
                    key.private_key, other.algorithm, ciphertext, key_spec=key_spec
                )

    # --- no object is left over --------------------------------------------------------------

    def test_failed_imports_leave_no_object(
        self, conversation: Conversation, key_spec: KeySpec, counted: CountObjects
    ) -> None:
        before = counted()
        good = conversation.encrypt(secrets.token_bytes(key_spec.material_length))
        wrong = conversation.encrypt(secrets.token_bytes(key_spec.material_length + 1))
        bad = [ciphertext for _, ciphertext in _damaged(good, step=37)]
        for ciphertext in (*bad, wrong, good):
            with pytest.raises(InvalidKeyMaterial):
                conversation.import_material(ciphertext, key_spec, NO_MATERIAL_S)
        assert counted() == before

    def test_an_import_leaves_its_key_and_nothing_else(
        self, conversation: Conversation, key_spec: KeySpec, counted: CountObjects
    ) -> None:
        before = counted()
        ciphertext = conversation.encrypt(secrets.token_bytes(key_spec.material_length))
        imported = [conversation.import_material(ciphertext, key_spec) for _ in range(2)]
        kept = [i for i in imported if i.key.custody is Custody.HSM_INTERNAL]
        assert counted() == before + len(kept)
        for each in imported:
            conversation.backend.destroy_key(each.key)
        assert counted() == before

    def test_a_key_under_its_chosen_object_id_goes_when_destroyed(
        self, backend: Backend, counted: CountObjects
    ) -> None:
        conversation, key_spec = any_conversation(backend), any_key_spec(backend)
        before, object_id = counted(), secrets.token_bytes(16)
        imported = backend.unwrap_material(
            conversation.key.private_key,
            conversation.key.algorithm,
            conversation.encrypt(secrets.token_bytes(key_spec.material_length)),
            key_spec=key_spec,
            object_id=object_id,
        )
        if imported.key.custody is Custody.HSM_INTERNAL:
            assert imported.key.data == object_id
        for _ in range(2):
            backend.destroy_key(imported.key)
        assert counted() == before


def _of_length(conversation: Conversation, length: int) -> Iterator[bytes]:
    material = secrets.token_bytes(length)
    if conversation.key.spec is WrappingKeySpec.EC_SM2 and not material:
        # openssl refuses an empty message, but an attacker can encrypt one.
        yield from (c for _, c in sm2_layouts(conversation.key.public_key, material))
    else:
        yield conversation.encrypt_in_process(material)


def _damaged(good: bytes, *, step: int) -> Iterator[tuple[str, bytes]]:
    for at in range(2, len(good), step):
        yield f"byte {at} changed", flip(good, 8 * at)
    for number in range(3):
        yield f"random {number}", secrets.token_bytes(len(good))
    yield from (("cut", good[:-1]), ("longer", good + b"\0"), ("empty", b""))
    yield from (("zeros", b"\0" * len(good)), ("ones", b"\xff" * len(good)))


def _forged(conversation: Conversation, key_spec: KeySpec) -> Iterator[tuple[str, bytes]]:
    key, length = conversation.key, key_spec.material_length
    if key.spec is WrappingKeySpec.EC_SM2:
        yield from sm2_forgeries(key.public_key, length)
    elif key.algorithm is not WrappingAlgorithm.RSAES_PKCS1_V1_5:
        yield from oaep_forgeries(key.algorithm, key.public_key, length)


def _outcomes(
    conversation: Conversation,
    ciphertexts: list[tuple[str, bytes]],
    key_spec: KeySpec,
    expected: bytes | None,
) -> dict[str, Outcome]:
    return {w: conversation.attempt(c, key_spec, expected) for w, c in ciphertexts}


def _others(outcomes: dict[str, Outcome], allowed: set[Outcome]) -> dict[str, Outcome]:
    return {what: seen for what, seen in outcomes.items() if seen not in allowed}
