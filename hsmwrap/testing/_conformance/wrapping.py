"""Capabilities and wrapping keys: the backend serves what it lists, and nothing else."""

# A test kit: asserts do it.
# ruff: noqa: S101

from __future__ import annotations

import itertools
import secrets
from collections.abc import Mapping
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import load_der_public_key

from hsmwrap.backend import CONTRACT_VERSION, Backend, Custody, Exposure, HasKeySets, ListsKeySets
from hsmwrap.catalog import KeySpec, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.errors import ConfigurationError, InvalidImportToken, UnsupportedOperation
from hsmwrap.guard import plugin_ref
from hsmwrap.testing._conformance.base import (
    PAIRS,
    ConformanceFixtures,
    Conversation,
    CountObjects,
    any_conversation,
    any_key_spec,
    new_conversation,
    tomorrow,
)
from hsmwrap.testing._conformance.leaks import private_key_in

SPKI_LENGTH = {WrappingKeySpec.RSA_2048: 294, WrappingKeySpec.EC_SM2: 91}
F4 = 65537
NAME_LENGTH = 32


class WrappingKeyConformance(ConformanceFixtures):
    """The capability report, and wrapping keys."""

    topic = "Capabilities and wrapping keys"

    def test_contract_version(self, plugin_class: type[Backend]) -> None:
        assert plugin_class.contract_version == CONTRACT_VERSION

    def test_name_fits_import_tokens(self, backend: Backend) -> None:
        assert backend.name.isascii()
        assert 0 < len(backend.name) <= NAME_LENGTH
        assert backend.capabilities().backend == backend.name

    def test_an_unknown_setting_is_refused(
        self, plugin_class: type[Backend], settings: Mapping[str, Any]
    ) -> None:
        with pytest.raises(ConfigurationError):
            plugin_class.from_settings({**settings, "no_such_setting": "x"}).close()

    def test_capabilities_are_within_the_catalogue(self, backend: Backend) -> None:
        report = backend.capabilities()
        assert report == backend.capabilities()
        assert report.protection_levels
        assert report.wrapping
        assert report.keys
        assert {(w.spec, w.algorithm) for w in report.wrapping} <= set(PAIRS)

    def test_a_pair_that_is_not_served_inside_the_hsm_says_why(self, backend: Backend) -> None:
        report = backend.capabilities()
        outside = [w.reason for w in report.wrapping if w.exposure is Exposure.HOST]
        assert all([*outside, *(m.reason for m in report.missing)])
        served = {(w.spec, w.algorithm) for w in report.wrapping}
        assert not served & {(m.spec, m.algorithm) for m in report.missing}

    def test_health_of_an_open_backend(self, backend: Backend) -> None:
        backend.capabilities()
        assert backend.health().ready

    def test_public_key_has_the_api_s_form(self, conversation: Conversation) -> None:
        der = conversation.key.public_key
        assert len(der) == SPKI_LENGTH[conversation.key.spec]
        if conversation.key.spec is WrappingKeySpec.RSA_2048:
            assert load_der_public_key(der).public_numbers().e == F4  # type: ignore[union-attr]

    def test_a_wrapping_key_is_what_was_asked_for_and_hides_its_private_part(
        self, conversation: Conversation, pair: tuple[WrappingKeySpec, WrappingAlgorithm]
    ) -> None:
        key = conversation.key
        assert (key.spec, key.algorithm) == pair
        assert key.private_key.custody is conversation.capability.custody
        # The guard put a byte in front of what the plug-in made.
        for data in (key.private_key.data, plugin_ref(key.private_key).data):
            assert not private_key_in(data, key.spec, key.public_key)

    def test_a_sealed_wrapping_key_names_the_current_key_set(
        self, conversation: Conversation
    ) -> None:
        # A fresh one: meanwhile another test may have rotated.
        backend, known = conversation.backend, conversation.key
        key = new_conversation(backend, known.spec, known.algorithm).key
        key_set, key_sets = key.key_set, HasKeySets.of(backend)
        if key_set is None:
            sealed = key.private_key.custody is Custody.HSM_ENCRYPTED_DATABASE
            assert key_sets is None or not sealed
        else:
            assert key_sets is not None, "a wrapping key of a key set, and no HasKeySets"
            assert key_set == key_sets.current_key_set() == backend.mac(b"").key_set
            if listing := ListsKeySets.of(backend):
                assert key_set in listing.key_set_ids()

    def test_no_two_wrapping_keys_are_the_same(self, conversation: Conversation) -> None:
        key = conversation.key
        keys = [
            key,
            *(new_conversation(conversation.backend, key.spec, key.algorithm).key for _ in "1234"),
        ]
        assert len({key.public_key for key in keys}) == len(keys)
        assert len({key.private_key.data for key in keys}) == len(keys)

    def test_what_is_not_served_is_refused(self, backend: Backend) -> None:
        report = backend.capabilities()
        served = {(w.spec, w.algorithm) for w in report.wrapping}
        for pair in set(itertools.product(WrappingKeySpec, WrappingAlgorithm)) - served:
            with pytest.raises(UnsupportedOperation):
                backend.generate_wrapping_key(*pair, expires_at=tomorrow())

    def test_a_key_spec_that_is_not_listed_is_refused(self, backend: Backend) -> None:
        for key_spec in set(KeySpec) - {k.key_spec for k in backend.capabilities().keys}:
            conversation = any_conversation(backend)
            ciphertext = conversation.encrypt(secrets.token_bytes(key_spec.material_length))
            with pytest.raises(UnsupportedOperation):
                conversation.import_material(ciphertext, key_spec)

    def test_discarding_a_wrapping_key_twice_does_nothing_more(
        self, fresh_conversation: Conversation
    ) -> None:
        for _ in range(2):
            fresh_conversation.backend.discard_wrapping_key(fresh_conversation.key.private_key)

    def test_a_discarded_resident_wrapping_key_is_gone(
        self, fresh_conversation: Conversation
    ) -> None:
        if fresh_conversation.capability.custody is not Custody.HSM_INTERNAL:
            pytest.skip("capability: keeps no wrapping keys in the HSM")
        key_spec = any_key_spec(fresh_conversation.backend)
        ciphertext = fresh_conversation.encrypt(secrets.token_bytes(key_spec.material_length))
        fresh_conversation.backend.discard_wrapping_key(fresh_conversation.key.private_key)
        with pytest.raises(InvalidImportToken):
            fresh_conversation.import_material(ciphertext, key_spec)

    def test_a_wrapping_key_is_where_its_custody_says(
        self, conversation: Conversation, counted: CountObjects
    ) -> None:
        before = counted()
        key = conversation.key
        again = new_conversation(conversation.backend, key.spec, key.algorithm)
        resident = key.private_key.custody is Custody.HSM_INTERNAL
        assert (counted() > before) is resident
        conversation.backend.discard_wrapping_key(again.key.private_key)
        assert counted() == before
