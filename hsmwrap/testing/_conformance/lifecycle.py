"""Threads, forks, expiry and closing; and no secret in logs, reprs and errors."""

# A test kit: asserts do it.
# ruff: noqa: S101

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest

from hsmwrap.backend import (
    Backend,
    Custody,
    HasKeySets,
    ListsKeySets,
    ReapsWrappingKeys,
    ReSealsKeys,
)
from hsmwrap.catalog import KeySpec
from hsmwrap.errors import BackendClosed, HsmwrapError
from hsmwrap.testing._conformance.base import (
    ConformanceFixtures,
    Conversation,
    Conversations,
    CountObjects,
    Pair,
    any_conversation,
    any_key_spec,
    flip,
    import_one,
    in_child,
    new_conversation,
    tomorrow,
)
from hsmwrap.testing._conformance.leaks import leaks


class LifecycleConformance(ConformanceFixtures):
    """What a KMS needs from a backend that is open for months."""

    topic = "Threads, forks and closing"

    def test_threads_do_not_mix_up_their_keys(
        self, conversation: Conversation, key_spec: KeySpec
    ) -> None:
        def one(material: bytes) -> bytes:
            ciphertext = conversation.encrypt_in_process(material)
            return conversation.import_material(ciphertext, key_spec).check_value

        materials = [secrets.token_bytes(key_spec.material_length) for _ in range(12)]
        expected = [one(material) for material in materials]
        with ThreadPoolExecutor(6) as threads:
            assert list(threads.map(one, materials)) == expected

    def test_a_forked_child_works_and_the_parent_goes_on(
        self, backend: Backend, key_spec: KeySpec
    ) -> None:
        imported, material = import_one(backend, key_spec)

        def again() -> bytes:
            conversation = any_conversation(backend)
            return conversation.import_material(
                conversation.encrypt(material), key_spec
            ).check_value

        childs = in_child(again)
        assert again() == imported.check_value
        assert childs() == imported.check_value
        assert again() == imported.check_value

    def test_reaping_spares_what_has_not_expired(self, conversation: Conversation) -> None:
        _reap(conversation.backend, datetime.now(UTC))
        key_spec = any_key_spec(conversation.backend)
        material = secrets.token_bytes(key_spec.material_length)
        conversation.import_material(conversation.encrypt(material), key_spec)

    def test_reaping_removes_expired_resident_keys(
        self, backend: Backend, pair: Pair, counted: CountObjects, conversations: Conversations
    ) -> None:
        new_conversation(backend, *pair)
        conversations.clean_up()
        _reap(backend, datetime.now(UTC) + timedelta(hours=48))
        before = counted()
        new_conversation(backend, *pair)
        _reap(backend, datetime.now(UTC) + timedelta(hours=48))
        assert counted() == before

    def test_no_secret_in_logs_reprs_and_errors(
        self,
        conversation: Conversation,
        caplog: pytest.LogCaptureFixture,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        caplog.set_level(logging.DEBUG)
        calls = _LoggedCalls(conversation)
        said = [*calls.run(), *capfd.readouterr()]
        said += [record.getMessage() + repr(vars(record)) for record in caplog.records]
        # Text in the repr of text has its backslashes doubled.
        readings = [text.encode() for said_once in said for text in _unescaped(said_once)]
        for what, secret in calls.secrets.items():
            assert not any(leaks(secret, reading) for reading in readings), what

    def test_everything_is_closed_after_close(self, backend: Backend) -> None:
        key_spec = any_key_spec(backend)
        imported, _ = import_one(backend, key_spec)
        key = any_conversation(backend).key
        mac = backend.mac(b"data")
        backend.close()
        backend.close()
        calls: list[Callable[[], object]] = [
            backend.capabilities,
            lambda: backend.generate_wrapping_key(key.spec, key.algorithm, expires_at=tomorrow()),
            lambda: Conversation(backend, key).import_material(bytes(256), key_spec),
            lambda: backend.encrypt(imported.key, b""),
            lambda: backend.decrypt(imported.key, bytes(40)),
            lambda: backend.destroy_key(imported.key),
            lambda: backend.mac(b"data"),
            lambda: backend.verify_mac(b"data", mac),
        ]
        if reaper := ReapsWrappingKeys.of(backend):
            calls.append(lambda: reaper.reap(datetime.now(UTC)))
        if key_sets := HasKeySets.of(backend):
            calls.append(key_sets.current_key_set)
        if listing := ListsKeySets.of(backend):
            calls.append(listing.key_set_ids)
        if reseals := ReSealsKeys.of(backend):
            calls.append(lambda: reseals.reseal(imported.key))
        for call in calls:
            with pytest.raises(BackendClosed):
                call()
        assert not backend.health().ready

    def test_discarding_is_closed_after_close(self, backend: Backend) -> None:
        key = any_conversation(backend).key
        backend.close()
        with pytest.raises(BackendClosed):
            backend.discard_wrapping_key(key.private_key)


def _reap(backend: Backend, now: datetime) -> None:
    reaper = ReapsWrappingKeys.of(backend)
    if reaper is None:
        custodies = {each.custody for each in backend.capabilities().wrapping}
        assert Custody.HSM_INTERNAL not in custodies, "resident wrapping keys, and no reaping"
    else:
        reaper.reap(now)


def _unescaped(text: str) -> tuple[str, str]:
    return text, text.replace(r"\\", "\\")


class _LoggedCalls:
    """Imports that succeed and fail, and uses of the key, with all that could be printed."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._key_spec = any_key_spec(conversation.backend)
        length = self._key_spec.material_length
        self.secrets = {
            "the material": secrets.token_bytes(length),
            "other material": secrets.token_bytes(length),
            "material of another length": secrets.token_bytes(length + 8),
            "the message": secrets.token_bytes(40),
        }

    def run(self) -> Iterator[str]:
        """Yield the reprs and errors."""
        conversation, backend = self._conversation, self._conversation.backend
        material, other, longer, message = self.secrets.values()
        imported = conversation.import_material(conversation.encrypt(material), self._key_spec)
        yield repr((imported, imported.key, conversation.key, conversation.key.private_key))
        yield repr((backend, str(backend), backend.capabilities(), backend.health()))
        for bad, expected in ((other, imported.check_value), (longer, None)):
            ciphertext = conversation.encrypt(bad)
            yield from _errors(
                lambda c=ciphertext, e=expected: conversation.import_material(c, self._key_spec, e)  # type: ignore[misc]
            )
        with suppress(HsmwrapError):  # a key that is kept but not used
            sealed = backend.encrypt(imported.key, message)
            backend.decrypt(imported.key, sealed)
            yield from _errors(lambda: backend.decrypt(imported.key, flip(sealed, 8)))
            yield from _errors(lambda: backend.decrypt(imported.key, sealed, b"other"))
        yield repr((backend, backend.mac(b"data"), backend.health()))


def _errors(call: Callable[[], object]) -> Iterator[str]:
    """All texts of an error and of its causes and contexts, hidden or not."""
    error: BaseException | None = None
    try:
        call()
    except HsmwrapError as raised:
        error = raised
    while error is not None:
        yield repr((str(error), error.args, error, vars(error)))
        error = error.__cause__ or error.__context__
