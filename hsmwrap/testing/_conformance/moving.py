"""Key sets that move to another HSM: clones by files, backups, restoring and drills."""

# A test kit: asserts do it.
# ruff: noqa: S101

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import combinations
from typing import Any

import pytest

from hsmwrap import backup as backup_files
from hsmwrap.backend import (
    Backend,
    BacksUpKeySets,
    ClonesKeySets,
    Custody,
    KeepsTrialsApart,
    KeyRef,
    KeySetFile,
    Mac,
    ManagesKeySets,
)
from hsmwrap.errors import ConfigurationError, HsmError, UnsupportedOperation
from hsmwrap.guard import guarded
from hsmwrap.registry import KeySetManager
from hsmwrap.testing._conformance.base import Apart, ConformanceFixtures, any_conversation

REFUSED = (ConfigurationError, HsmError)
NOT_MOVABLE = "capability: its key sets cannot move to another HSM"
DATA, MESSAGE = b"claims of an import token", b"a message from before"
SHARES, THRESHOLD = 3, 2


@dataclass(frozen=True)
class Sealed:
    """What a backend made before its key sets moved."""

    mac: Mac
    key: KeyRef
    message: bytes | None


@dataclass(frozen=True)
class Side:
    """One of two HSMs."""

    plugin: type[Backend]
    settings: Mapping[str, Any]
    so_pin_file: str | None
    apart: Apart

    @property
    def key_sets(self) -> KeySetManager:
        """Its key sets, as ``hsmwrap keys`` works on them."""
        return KeySetManager(self.plugin.__name__, self.settings, self.plugin)

    def do(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call a method of ``key_sets`` that takes the security officer's PIN."""
        return self.apart(partial(call, *arguments, so_pin_file=self.so_pin_file))

    def listed(self) -> list[tuple[str, bool]]:
        """Id of each finished key set, and whether it is current."""
        found = self.apart(self.key_sets.list)
        return [(each.key_set, each.current) for each in found if each.finished]

    def require_refused(self, call: Callable[..., Any], *arguments: Any) -> None:
        """It fails, and leaves the key sets as they are."""
        before = self.listed()
        with pytest.raises(REFUSED):
            self.do(call, *arguments)
        assert self.listed() == before

    def require_opens(self, sealed: Sealed) -> None:
        """What was made on the other side is used here."""
        require_opens(self.plugin, self.settings, sealed)

    def mac(self) -> Mac:
        """A MAC under the current key set."""
        with guarded(self.plugin.from_settings(self.settings)) as backend:
            return backend.mac(DATA)


def require_opens(plugin: type[Backend], settings: Mapping[str, Any], sealed: Sealed) -> None:
    """What was sealed before opens under these settings, and MACs hold."""
    with guarded(plugin.from_settings(settings)) as backend:
        backend.verify_mac(DATA, sealed.mac)
        if sealed.message is not None:
            assert backend.decrypt(sealed.key, sealed.message) == MESSAGE


def changes(text: str) -> list[str]:
    """A text with one character changed, at several places, in none of which it means the same."""
    # The last characters of base64 have bits that say nothing. Hexadecimal digits stay digits.
    places = [at for at in range(len(text) - 3) if text[at : at + 4].isalnum()]
    return [
        text[:at] + ("1" if text[at] == "0" else "0") + text[at + 1 :]
        for at in places[:: max(1, len(places) // 5)]
    ]


class MovingConformance(ConformanceFixtures):
    """What an operator needs to survive the loss of an HSM, and to change to another one."""

    topic = "Key sets that move to another HSM"

    @pytest.fixture
    def other_settings(self) -> Mapping[str, Any] | None:
        """Settings of a second HSM that has no key sets, for each test anew; None without one."""
        return None

    @pytest.fixture
    def other_so_pin_file(self) -> str | None:
        """File with the PIN of its security officer."""
        return None

    @pytest.fixture
    def sides(  # noqa: PLR0917  # fixtures
        self,
        plugin_class: type[Backend],
        settings: Mapping[str, Any],
        so_pin_file: str | None,
        other_settings: Mapping[str, Any] | None,
        other_so_pin_file: str | None,
        apart: Apart,
    ) -> Iterator[tuple[Side, Side]]:
        """The HSM with a key set, and the one that it moves to; no backend is open on either."""
        movable = issubclass(plugin_class, ClonesKeySets | BacksUpKeySets)
        if not movable or not issubclass(plugin_class, ManagesKeySets):
            pytest.skip("capability: key sets do not move to another HSM")
        if other_settings is None:
            pytest.skip("capability: no second HSM to which key sets could move")
        other = Side(plugin_class, other_settings, other_so_pin_file, apart)
        if not issubclass(plugin_class, KeepsTrialsApart):
            yield Side(plugin_class, settings, so_pin_file, apart), other
            return
        own = plugin_class.trial_settings(settings)
        source = Side(plugin_class, own, so_pin_file, apart)
        try:
            source.do(source.key_sets.initialise)
            yield source, other
        finally:
            apart(partial(plugin_class.end_trial, own))

    @pytest.fixture
    def source(self, sides: tuple[Side, Side]) -> Side:
        """The HSM with the key sets."""
        return sides[0]

    @pytest.fixture
    def target(self, sides: tuple[Side, Side]) -> Side:
        """The HSM that they come to."""
        return sides[1]

    @pytest.fixture
    def sealed(self, source: Side, request: pytest.FixtureRequest) -> Sealed:
        """What the source made; in some tests under a key set that is not current any more."""
        with guarded(source.plugin.from_settings(source.settings)) as backend:
            conversation, spec = any_conversation(backend), backend.capabilities().keys[0]
            ciphertext = conversation.encrypt(secrets.token_bytes(spec.key_spec.material_length))
            key = conversation.import_material(ciphertext, spec.key_spec).key
            used = spec.usable and key.custody is Custody.HSM_ENCRYPTED_DATABASE
            message = backend.encrypt(key, MESSAGE) if used else None
            sealed = Sealed(backend.mac(DATA), key, message)
            conversation.clean_up()
        if request.node.originalname.endswith("_does_what_it_did"):
            source.do(source.key_sets.rotate)
        return sealed

    @pytest.fixture
    def transport_key(self, source: Side, target: Side) -> KeySetFile:
        """The first step of a clone."""
        if not issubclass(source.plugin, ClonesKeySets):
            pytest.skip("capability: does not clone key sets")
        try:
            made: KeySetFile = target.do(target.key_sets.make_transport_key)
        except UnsupportedOperation:
            pytest.skip(NOT_MOVABLE)
        return made

    @pytest.fixture
    def exported(
        self,
        sealed: Sealed,  # noqa: ARG002  # comes first
        source: Side,
        transport_key: KeySetFile,
    ) -> KeySetFile:
        """The second step."""
        made: KeySetFile = source.do(
            source.key_sets.export, transport_key.content, transport_key.fingerprint
        )
        return made

    @pytest.fixture
    def backup_key(self, source: Side) -> bytes:
        """A key for one backup."""
        if not issubclass(source.plugin, BacksUpKeySets):
            pytest.skip("capability: does not back up key sets")
        return secrets.token_bytes(32)

    @pytest.fixture
    def backup(
        self,
        sealed: Sealed,  # noqa: ARG002  # comes first
        source: Side,
        backup_key: bytes,
    ) -> str:
        """A backup of the source's key sets."""
        made: str = source.do(source.key_sets.back_up, backup_key)
        return made

    # --- clones ------------------------------------------------------------------------------

    def test_a_cloned_key_set_does_what_it_did(
        self, exported: KeySetFile, sealed: Sealed, source: Side, target: Side
    ) -> None:
        target.do(target.key_sets.import_exported, exported.content, exported.fingerprint)
        assert target.listed() == source.listed()
        target.require_opens(sealed)
        assert target.mac() == source.mac()

    def test_cloning_again_changes_nothing(
        self, exported: KeySetFile, sealed: Sealed, source: Side, target: Side
    ) -> None:
        target.do(target.key_sets.import_exported, exported.content, exported.fingerprint)
        made = target.do(target.key_sets.make_transport_key)
        again = source.do(source.key_sets.export, made.content, made.fingerprint)
        target.do(target.key_sets.import_exported, again.content, again.fingerprint)
        assert target.listed() == source.listed()
        target.require_opens(sealed)

    def test_nothing_is_exported_for_a_transport_key_that_was_not_confirmed(
        self, sealed: Sealed, source: Side, transport_key: KeySetFile
    ) -> None:
        del sealed  # made first
        wrong = f"{int(transport_key.fingerprint, 16) ^ 1:064x}"
        source.require_refused(source.key_sets.export, transport_key.content, wrong)

    def test_a_changed_transport_key_is_refused(
        self, sealed: Sealed, source: Side, transport_key: KeySetFile
    ) -> None:
        del sealed  # made first
        for changed in changes(transport_key.content):
            source.require_refused(source.key_sets.export, changed, transport_key.fingerprint)

    def test_a_changed_file_of_key_sets_is_refused(
        self, exported: KeySetFile, target: Side
    ) -> None:
        call = target.key_sets.import_exported
        for changed in (*changes(exported.content), exported.content[:-20], ""):
            target.require_refused(call, changed, exported.fingerprint)
        assert target.listed() == []

    def test_key_sets_that_were_not_confirmed_are_refused(
        self, exported: KeySetFile, target: Side
    ) -> None:
        wrong = f"{int(exported.fingerprint, 16) ^ 1:064x}"
        target.require_refused(target.key_sets.import_exported, exported.content, wrong)

    def test_a_file_for_another_transport_key_is_refused(
        self, exported: KeySetFile, target: Side
    ) -> None:
        target.do(target.key_sets.make_transport_key)  # replaces the first
        call = target.key_sets.import_exported
        target.require_refused(call, exported.content, exported.fingerprint)

    def test_a_clone_leaves_another_key_set_of_the_same_id_alone(
        self, exported: KeySetFile, source: Side, target: Side
    ) -> None:
        before = _own_key_set(source, target)
        call = target.key_sets.import_exported
        target.require_refused(call, exported.content, exported.fingerprint)
        assert target.mac() == before

    # --- backups -----------------------------------------------------------------------------

    def test_a_restored_key_set_does_what_it_did(
        self, backup: str, backup_key: bytes, sealed: Sealed, source: Side, target: Side
    ) -> None:
        for _ in range(2):  # the second time all are there
            target.do(target.key_sets.restore, backup, backup_key)
            assert target.listed() == source.listed()
        target.require_opens(sealed)
        assert target.mac() == source.mac()

    def test_another_backup_key_restores_nothing(
        self, backup: str, backup_key: bytes, target: Side
    ) -> None:
        for wrong in (bytes(32), secrets.token_bytes(32), backup_key[::-1]):
            target.require_refused(target.key_sets.restore, backup, wrong)
        assert target.listed() == []

    @pytest.mark.parametrize("place", range(4))
    def test_a_changed_backup_restores_nothing_else(
        self, backup: str, backup_key: bytes, sealed: Sealed, target: Side, place: int
    ) -> None:
        """Not all in a backup is of its keys: if it is restored all the same, it is whole."""
        try:
            target.do(target.key_sets.restore, changes(backup)[-1 - place], backup_key)
        except REFUSED:
            assert target.listed() == []
        else:
            target.require_opens(sealed)

    def test_a_restored_backup_leaves_another_key_set_of_the_same_id_alone(
        self, backup: str, backup_key: bytes, source: Side, target: Side
    ) -> None:
        before = _own_key_set(source, target)
        target.require_refused(target.key_sets.restore, backup, backup_key)
        assert target.mac() == before

    def test_enough_shares_restore_a_backup_and_fewer_do_not(
        self, backup_key: bytes, sealed: Sealed, source: Side, target: Side
    ) -> None:
        del backup_key  # skips without the ability
        pytest.importorskip("shamir_mnemonic", reason="capability: the extra backup is missing")
        make = partial(
            backup_files.back_up,
            source.key_sets,
            shares=SHARES,
            threshold=THRESHOLD,
            now=datetime.now(UTC),
        )
        made, words = source.do(make)
        named = {f"share {number}": share for number, share in enumerate(words)}
        restore = partial(backup_files.restore, target.key_sets, made)
        for some in combinations(named, THRESHOLD - 1):
            target.require_refused(restore, {each: named[each] for each in some})
        assert target.listed() == []
        target.do(restore, {each: named[each] for each in list(named)[-THRESHOLD:]})
        target.require_opens(sealed)

    def test_a_drill_opens_what_was_sealed_and_leaves_nothing(
        self, backup: str, backup_key: bytes, sealed: Sealed, source: Side, target: Side
    ) -> None:
        def drill(*, so_pin_file: str | None) -> tuple[list[str], int]:
            seen: list[Mapping[str, Any]] = []

            def examine(settings: Mapping[str, Any]) -> None:
                seen.append(settings)
                require_opens(target.plugin, settings, sealed)

            call = target.key_sets.drill
            drilled = call(backup, backup_key, examine, so_pin_file=so_pin_file)
            return [each.key_set for each in drilled], len(seen)

        assert target.do(drill) == ([each for each, _ in source.listed()], 1)
        assert target.listed() == []

    def test_a_drill_that_finds_a_fault_says_so_and_leaves_nothing(
        self, backup: str, backup_key: bytes, target: Side
    ) -> None:
        def examine(_settings: Mapping[str, Any]) -> None:
            raise HsmError("a stored key does not open")

        target.require_refused(target.key_sets.drill, backup, backup_key, examine)
        assert target.listed() == []

    def test_a_drill_refuses_an_hsm_in_use(
        self, backup: str, backup_key: bytes, source: Side, target: Side
    ) -> None:
        def examine(_settings: Mapping[str, Any]) -> None:
            """Nothing to look at."""

        source.require_refused(source.key_sets.drill, backup, backup_key, examine)
        target.do(target.key_sets.initialise)
        target.require_refused(target.key_sets.drill, backup, backup_key, examine)


def _own_key_set(source: Side, target: Side) -> Mac:
    """Makes a key set on the target that has an id of the source's; a MAC under it."""
    target.do(target.key_sets.initialise)
    if not {each for each, _ in source.listed()} & {each for each, _ in target.listed()}:
        pytest.skip("capability: two HSMs never have key sets of the same id")
    return target.mac()
