"""Key sets in a backup, wrapped under a backup key that the caller has in its memory.

An HSM token keeps no key that it could share with one that does not exist yet. So this is the one
case where a key that opens key-encryption keys is outside a token: the backup key, a fresh AES key
for one backup, whose value the caller has, splits into shares and forgets
(:mod:`hsmwrap.backup`). In a token it exists as a session object of the security officer's session,
for as long as sets are wrapped or unwrapped. It is trusted, wraps or unwraps but not both, and its
templates take key sets and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

from pkcs11.constants import Attribute
from pkcs11.mechanisms import KeyType
from pkcs11.types import Session

from hsmwrap.backend import KeySetInfo
from hsmwrap.errors import ConfigurationError, UnsupportedOperation
from hsmwrap.pkcs11.binding import objects
from hsmwrap.pkcs11.binding.client_errors import read_if_known
from hsmwrap.pkcs11.binding.templates import Template, secret_key
from hsmwrap.pkcs11.keysets import movability
from hsmwrap.pkcs11.keysets.admin import (
    connected,
    destroy_all,
    key_sets_of,
    survey,
)
from hsmwrap.pkcs11.keysets.keys import Needs
from hsmwrap.pkcs11.keysets.wrapped import (
    CarriedBy,
    CarryingKey,
    WrappedSet,
    document_of,
    of_every_role,
    parsing,
    take_in,
    wrap_sets,
)
from hsmwrap.pkcs11.sessions.session import PooledSession
from hsmwrap.pkcs11.settings import Pkcs11Settings
from hsmwrap.pkcs11.token.pin import PinSource

_FORMAT = "hsmwrap-pkcs11-backup/1"
_DRILL = "drill"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Backup:
    """Key sets, wrapped under a backup key.

    Attributes:
        label: Label of the HSM token that they are of.
        serial: Its serial number.
        sets: Oldest first.
    """

    label: str
    serial: str
    sets: tuple[WrappedSet, ...]

    def to_json(self) -> str:
        """The plug-in's part of a backup file."""
        source = {"label": self.label, "serial": self.serial}
        sets = [each.to_document() for each in self.sets]
        return json.dumps({"format": _FORMAT, "token": source, "key_sets": sets})

    @classmethod
    def from_json(cls, raw: str) -> Self:
        """Parse it.

        Raises:
            ConfigurationError: It is not one, or a key set in it is not complete.
        """
        with parsing("a backup"):
            document = document_of(raw, _FORMAT)
            source = document["token"]
            sets = tuple(map(WrappedSet.from_document, document["key_sets"]))
            return cls(str(source["label"]), str(source["serial"]), sets)


def back_up(settings: Pkcs11Settings, so_pin: PinSource, backup_key: bytes) -> Backup:
    """Wrap every movable key set under a backup key.

    Args:
        settings: Which HSM token, and the user PIN.
        so_pin: The security officer's PIN.
        backup_key: 32 bytes, for this backup alone.

    Raises:
        UnsupportedOperation: The token has no AES key wrap.
        ConfigurationError: It has no movable key set.
        PinError, ServiceUnavailable, HsmError: As for :func:`~.admin.initialise`.
    """
    sets = wrap_sets(settings, so_pin, _backup_key(backup_key, Attribute.WRAP))
    return Backup(*_label_and_serial(settings), sets)


def restore(
    settings: Pkcs11Settings, so_pin: PinSource, backup: Backup, backup_key: bytes
) -> tuple[KeySetInfo, ...]:
    """Unwrap those key sets of a backup that the HSM token does not have.

    Returns:
        All its key sets.

    Raises:
        UnsupportedOperation: The token has no AES key wrap, or does not keep extractable keys for
            trusted keys alone.
        ConfigurationError: It has another key set of the same number. Nothing was made.
        HsmError: A key does not unwrap, or does not open what the set sealed before; nothing is
            kept of its set.
        PinError, ServiceUnavailable: As for :func:`~.admin.initialise`.
    """
    return take_in(settings, so_pin, backup.sets, _backup_key(backup_key, Attribute.UNWRAP))


def drill(
    settings: Pkcs11Settings,
    so_pin: PinSource,
    backup: Backup,
    backup_key: bytes,
    examine: Callable[[str], None],
) -> tuple[KeySetInfo, ...]:
    """Restore on a scratch HSM token, let ``examine`` look at it, and destroy what was restored.

    The restored keys have a ``key_prefix`` of their own, which ``examine`` gets. So nothing that
    the token has is touched, whichever token it is. But what an earlier drill on it left that was
    killed is destroyed: the prefix, in which the token's serial number is, tells it.

    Returns:
        The key sets that were restored.

    Raises:
        ConfigurationError: It is the token of the backup, or one that has key sets.
        Exception: What :func:`restore` or ``examine`` raises.
    """
    label, serial = _label_and_serial(settings)
    if label == backup.label or serial == backup.serial:
        raise ConfigurationError(
            f"the HSM token {label} (serial number {serial}) is the one that the backup is of, or "
            "has its label or serial number; a drill takes a scratch token"
        )
    if survey(settings, key_sets_of(settings)).numbers:
        raise ConfigurationError(
            f"the HSM token {label} (serial number {serial}) has key sets, so a KMS may use it; a "
            "drill takes a scratch token"
        )
    _destroy_leftovers(settings, serial)
    own = replace(settings, key_prefix=_drill_prefix(secrets.token_hex(4), serial))
    try:
        restored = restore(own, so_pin, backup, backup_key)
        examine(own.key_prefix)
    finally:
        destroy_all(own)
    return restored


def _drill_prefix(word: str, serial: str) -> str:
    """The ``key_prefix`` of a drill: none that is chosen by other means looks like it."""
    proof = hashlib.sha256(f"hsmwrap drill\n{serial}\n{word}".encode()).hexdigest()[:8]
    return f"{_DRILL}-{word}-{proof}"


def _destroy_leftovers(settings: Pkcs11Settings, serial: str) -> None:
    """Destroy what drills on this HSM token left that were killed."""

    def destroy(pooled: PooledSession) -> set[str]:
        found = set()
        for each in pooled.find({Attribute.TOKEN: True}):
            prefix = str(read_if_known(each, Attribute.LABEL) or "").partition(":")[0]
            word = prefix.removeprefix(f"{_DRILL}-").partition("-")[0]
            if prefix == _drill_prefix(word, serial):
                each.destroy()
                found.add(prefix)
        return found

    with connected(settings) as connection:
        if found := connection.run(destroy):
            _log.warning("objects of killed drills were destroyed", extra={"of": sorted(found)})


def _backup_key(value: bytes, use: Attribute) -> CarriedBy:
    @contextmanager
    def in_session(session: Session, needs: Needs) -> Iterator[CarryingKey]:
        if needs.cipher.key_type is not KeyType.AES:
            raise UnsupportedOperation(
                "a backup key is an AES key of 256 bits, and this HSM token wraps keys by "
                f"{needs.cipher.name} alone: its key sets go to another HSM token by "
                "`hsmwrap keys export`, where it has RSA, and into no backup"
            )
        kept = use is Attribute.WRAP or movability.is_kept(session, needs.cipher, needs.key_wrap)
        if not kept:
            raise UnsupportedOperation(
                "this HSM token does not keep extractable keys for trusted keys alone, so key sets "
                "cannot be restored to it"
            )
        key = objects.create(session, backup_key_template(use, needs), value)
        try:
            yield CarryingKey(key, needs.key_wrap)
        finally:
            key.destroy()

    return in_session


def backup_key_template(use: Attribute, needs: Needs) -> Template:
    """Of a backup key that may WRAP or UNWRAP key sets by the mechanism of the HSM token."""
    nested = {
        Attribute.WRAP: Attribute.WRAP_TEMPLATE,
        Attribute.UNWRAP: Attribute.UNWRAP_TEMPLATE,
    }
    return {
        **secret_key(KeyType.AES, use),
        Attribute.PRIVATE: False,  # a security officer's session makes no others
        Attribute.TRUSTED: True,
        nested[use]: of_every_role(),
        Attribute.ALLOWED_MECHANISMS: (needs.key_wrap,),
    }


def _label_and_serial(settings: Pkcs11Settings) -> tuple[str, str]:
    with connected(settings) as connection:
        token = connection.run(lambda pooled: pooled.session.token)
    return token.label.rstrip(" \0"), token.serial.decode("utf-8", "replace").rstrip(" \0")
