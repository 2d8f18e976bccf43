"""Import tokens: MACs, references that fit, and a second instance that accepts both."""

# A test kit: asserts do it.
# ruff: noqa: S101

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterator
from dataclasses import replace

import pytest

from hsmwrap import tokens
from hsmwrap.backend import Backend, Mac
from hsmwrap.catalog import KeySpec
from hsmwrap.errors import InvalidImportToken, InvalidMac
from hsmwrap.testing._conformance.base import (
    ConformanceFixtures,
    Conversation,
    UsableKey,
    any_conversation,
    any_key_spec,
    flip,
    tomorrow,
)

KEY_SET_ID_LENGTH = 32
TAG_LENGTH = 32


class ImportTokenConformance(ConformanceFixtures):
    """What import tokens need from a backend."""

    topic = "Import tokens"

    def test_a_mac_has_the_contract_s_form(self, backend: Backend) -> None:
        mac = backend.mac(b"data")
        assert mac.key_set.isascii()
        assert 0 < len(mac.key_set) <= KEY_SET_ID_LENGTH
        assert len(mac.tag) == TAG_LENGTH

    def test_a_mac_holds_for_its_data_only(self, backend: Backend) -> None:
        data = secrets.token_bytes(100)
        mac = backend.mac(data)
        backend.verify_mac(data, mac)
        assert not _holds(backend, flip(data, 99), mac)
        for bit in range(0, 256, 7):
            assert not _holds(backend, data, Mac(mac.key_set, flip(mac.tag, bit)))

    def test_a_cut_mac_does_not_hold(self, backend: Backend) -> None:
        mac = backend.mac(b"data")
        for length in (0, 1, 4, 16, 31):
            assert not _holds(backend, b"data", Mac(mac.key_set, mac.tag[:length])), length
        assert not _holds(backend, b"data", Mac(mac.key_set, mac.tag + b"\0"))

    @pytest.mark.parametrize("key_set", ["", "0", "01", "unknown", "-1", "9" * 32])
    def test_a_mac_of_an_unknown_key_set_does_not_hold(
        self, backend: Backend, key_set: str
    ) -> None:
        assert not _holds(backend, b"data", Mac(key_set, bytes(32)))

    def test_a_token_for_the_longest_cmk_id_fits(self, conversation: Conversation) -> None:
        backend, key_spec = conversation.backend, any_key_spec(conversation.backend)
        ciphertext = conversation.encrypt(secrets.token_bytes(key_spec.material_length))
        token = _token(conversation, cmk_id="k" * tokens.MAX_CMK_ID_LENGTH)
        assert _import_by_token(backend, token, ciphertext, key_spec)

    def test_a_damaged_wrapping_key_reference_is_no_import_token(
        self, conversation: Conversation
    ) -> None:
        key, key_spec = conversation.key, any_key_spec(conversation.backend)
        ciphertext = conversation.encrypt(secrets.token_bytes(key_spec.material_length))
        for data in _damaged(key.private_key.data):
            damaged = replace(key, private_key=replace(key.private_key, data=data))
            with pytest.raises(InvalidImportToken):
                Conversation(conversation.backend, damaged).import_material(ciphertext, key_spec)

    def test_another_instance_honours_import_tokens(
        self, conversation: Conversation, another: Backend
    ) -> None:
        key_spec = any_key_spec(another)
        ciphertext = conversation.encrypt(secrets.token_bytes(key_spec.material_length))
        token = _token(conversation, cmk_id="key-1")
        first = _import_by_token(conversation.backend, token, ciphertext, key_spec)
        assert first == _import_by_token(another, token, ciphertext, key_spec)

    def test_another_instance_uses_the_same_keys(
        self, backend: Backend, another: Backend, usable_key: UsableKey
    ) -> None:
        key = usable_key[0].key
        assert another.decrypt(key, backend.encrypt(key, b"m", b"c"), b"c") == b"m"

    def test_a_resident_wrapping_key_is_discarded_for_all(
        self, backend: Backend, another: Backend
    ) -> None:
        conversation, key_spec = any_conversation(backend), any_key_spec(backend)
        ciphertext = conversation.encrypt(secrets.token_bytes(key_spec.material_length))
        conversation.import_material(ciphertext, key_spec)
        another.discard_wrapping_key(conversation.key.private_key)
        if conversation.capability.custody == "HsmInternal":
            with pytest.raises(InvalidImportToken):
                conversation.import_material(ciphertext, key_spec)


def _holds(backend: Backend, data: bytes, mac: Mac) -> bool:
    try:
        backend.verify_mac(data, mac)
    except InvalidMac:
        return False
    return True


def _token(conversation: Conversation, cmk_id: str) -> bytes:
    """An import token as the import service makes it."""
    backend, key = conversation.backend, conversation.key
    claims = tokens.ImportTokenClaims(
        token_id=secrets.token_bytes(tokens.TOKEN_ID_LENGTH),
        cmk_id=cmk_id,
        key_spec=KeySpec.ALIYUN_AES_256,
        spec=key.spec,
        algorithm=key.algorithm,
        protection_level=min(backend.capabilities().protection_levels),
        backend=backend.name,
        public_key_sha256=hashlib.sha256(key.public_key).digest(),
        expires_at=tomorrow().replace(microsecond=0),
        private_key=key.private_key,
    )
    return tokens.encode(claims, backend.mac)


def _import_by_token(backend: Backend, token: bytes, ciphertext: bytes, key_spec: KeySpec) -> bytes:
    """The check value of the imported key."""
    claims = tokens.decode(token, backend.verify_mac)
    imported = backend.unwrap_material(
        claims.private_key, claims.algorithm, ciphertext, key_spec=key_spec
    )
    return imported.check_value


def _damaged(data: bytes) -> Iterator[bytes]:
    for at in (0, len(data) // 2, len(data) - 1):
        yield flip(data, 8 * at)
    yield from (data[:-1], b"", secrets.token_bytes(len(data)))
