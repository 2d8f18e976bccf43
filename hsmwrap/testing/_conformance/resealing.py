"""Re-sealing: a sealed key moves to the next key set and stays the same key."""

# A test kit: asserts do it.
# ruff: noqa: S101

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest

from hsmwrap.backend import (
    Backend,
    Custody,
    HasKeySets,
    ImportedKey,
    KeyRef,
    ManagesKeySets,
    ReSealsKeys,
)
from hsmwrap.catalog import KeySpec
from hsmwrap.errors import HsmError, InvalidKeyMaterial, KeyNotFound, UnsupportedOperation
from hsmwrap.testing._conformance.base import (
    Apart,
    ConformanceFixtures,
    Reopen,
    any_conversation,
    flip,
    import_one,
)

RotateKeys = Callable[[], object]


@dataclass(frozen=True)
class _Moved:
    """A key that moved: how it was before, and the backend that moved it."""

    backend: Backend
    reseals: ReSealsKeys
    imported: ImportedKey
    material: bytes
    key: KeyRef


class ResealingConformance(ConformanceFixtures):
    """What a KMS needs to rotate and retire key sets without asking clients to import again."""

    topic = "Keys that move to another key set"

    @pytest.fixture
    def may_rotate(self) -> bool:
        """Whether tests may rotate the key sets of these settings."""
        return True

    @pytest.fixture
    def rotate_keys(  # fixtures
        self,
        may_rotate: bool,  # noqa: FBT001  # a fixture
        plugin_class: type[Backend],
        settings: Mapping[str, Any],
        so_pin_file: str | None,
        apart: Apart,
    ) -> RotateKeys | None:
        """Makes another key set the current one; None where a test cannot do that."""
        if not may_rotate or not issubclass(plugin_class, ManagesKeySets):
            return None
        rotate = partial(plugin_class.rotate_keys, settings, so_pin_file=so_pin_file)
        return lambda: apart(rotate)

    @pytest.fixture
    def reseals(self, backend: Backend) -> ReSealsKeys:
        """The ability, where the backend has it."""
        found = ReSealsKeys.of(backend)
        if found is None:
            pytest.skip("capability: does not re-seal keys")
        return found

    @pytest.fixture
    def moved(
        self,
        reseals: ReSealsKeys,  # noqa: ARG002  # skips without it
        backend: Backend,
        key_spec: KeySpec,
        rotate_keys: RotateKeys | None,
        reopen: Reopen | None,
    ) -> Iterator[_Moved]:
        """A key that was imported before a rotation, and moved by an instance opened after it."""
        imported, material = import_one(backend, key_spec)
        if imported.key.custody is Custody.HSM_INTERNAL:
            pytest.skip("capability: imported keys are resident, so no key set seals them")
        if rotate_keys is None or reopen is None:
            pytest.skip("capability: a test cannot rotate its key sets")
        rotate_keys()
        with reopen() as later:
            reseals_later = ReSealsKeys.of(later)
            assert reseals_later is not None
            try:
                key = reseals_later.reseal(imported.key, expected_check_value=imported.check_value)
            except UnsupportedOperation:
                pytest.skip("capability: keys of this key set cannot move")
            yield _Moved(later, reseals_later, imported, material, key)

    def test_a_key_moves_to_the_current_key_set(self, moved: _Moved) -> None:
        key_sets = HasKeySets.of(moved.backend)
        assert key_sets is not None, "re-seals keys, but does not say which key set is current"
        assert moved.reseals.key_set_of(moved.key) == key_sets.current_key_set()
        assert moved.reseals.key_set_of(moved.imported.key) != key_sets.current_key_set()
        assert replace(moved.key, data=moved.imported.key.data) == moved.imported.key

    def test_a_key_that_moved_is_the_same_key(self, moved: _Moved) -> None:
        backend, key = moved.backend, moved.key
        reseals, check_value = moved.reseals, moved.imported.check_value
        assert reseals.reseal(key, expected_check_value=check_value) == key
        capability = backend.capabilities().key_for(key.key_spec)
        if capability is not None and capability.usable:
            message = secrets.token_bytes(40)
            before = backend.encrypt(moved.imported.key, message, b"context")
            after = backend.encrypt(key, message, b"context")
            assert backend.decrypt(key, before, b"context") == message
            assert backend.decrypt(moved.imported.key, after, b"context") == message

    def test_another_check_value_is_refused(self, moved: _Moved) -> None:
        capability = moved.backend.capabilities().key_for(moved.key.key_spec)
        if capability is None or not capability.usable:
            pytest.skip(f"capability: keeps {moved.key.key_spec} keys but cannot use them")
        wrong = flip(moved.imported.check_value, 100)
        for key in (moved.imported.key, moved.key):
            with pytest.raises(HsmError):
                moved.reseals.reseal(key, expected_check_value=wrong)

    def test_a_changed_reference_does_not_move(self, moved: _Moved) -> None:
        old = moved.imported.key
        for data in (flip(old.data, 8 * len(old.data) - 1), old.data[:-1], old.data[:1], b""):
            with pytest.raises(KeyNotFound):
                moved.reseals.reseal(replace(old, data=data))

    def test_the_same_material_is_imported_again_after_a_key_moved(self, moved: _Moved) -> None:
        conversation = any_conversation(moved.backend)
        spec, check_value = moved.key.key_spec, moved.imported.check_value
        again = conversation.encrypt(moved.material)
        assert conversation.import_material(again, spec, check_value).check_value == check_value
        other = conversation.encrypt(secrets.token_bytes(spec.material_length))
        with pytest.raises(InvalidKeyMaterial):
            conversation.import_material(other, spec, check_value)
        conversation.clean_up()

    def test_a_resident_key_needs_no_key_set(
        self, reseals: ReSealsKeys, backend: Backend, key_spec: KeySpec
    ) -> None:
        resident = KeyRef(backend.name, key_spec, Custody.HSM_INTERNAL, bytes(16))
        assert reseals.key_set_of(resident) is None
        assert reseals.reseal(resident) == resident

    def test_keys_of_another_backend_do_not_move(
        self, reseals: ReSealsKeys, key_spec: KeySpec
    ) -> None:
        foreign = KeyRef("another", key_spec, Custody.HSM_ENCRYPTED_DATABASE, bytes(60))
        for call in (reseals.key_set_of, reseals.reseal):
            with pytest.raises(KeyNotFound):
                call(foreign)
