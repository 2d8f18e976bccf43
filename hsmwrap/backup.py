"""Backups of a backend's key sets in a file, under a key that is split into shares.

A backup file has what the plug-in made of its key sets (:class:`hsmwrap.backend.BacksUpKeySets`),
wrapped under a backup key, and a MAC over all of it. Both keys are derived from one secret of
32 random bytes, which is new for each backup. It is in this process's memory while a backup is made
or restored: do that on an offline machine. Afterwards it exists as shares alone, of which a number
is needed that was chosen when the backup was made (:mod:`hsmwrap.shares`). The file is not a
secret, and is not believed before the shares have authenticated it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any, Self

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from hsmwrap import shares as secret_sharing
from hsmwrap.backend import KeySetInfo
from hsmwrap.errors import ConfigurationError, strip_tracebacks
from hsmwrap.registry import KeySetManager

_FORMAT = "hsmwrap-backup/1"
_BYTES = 32


@dataclass(frozen=True, slots=True)
class Backup:
    """What a backup file says.

    Attributes:
        format: Of the file.
        plugin: The backend plug-in whose key sets these are.
        made_at: ISO 8601 time.
        key_sets: Ids of the key sets that there were; the plug-in may have left some out.
        threshold: How many shares are needed.
        shares: :func:`hsmwrap.shares.digest` of each share.
        identifier: :func:`hsmwrap.shares.identifier` of all of them.
        content: What the plug-in made.
        tag: HMAC-SHA-256 of the rest, in hexadecimal digits.
    """

    format: str
    plugin: str
    made_at: str
    key_sets: tuple[str, ...]
    threshold: int
    shares: tuple[str, ...]
    identifier: int
    content: str
    tag: str = ""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content, 64 hexadecimal digits."""
        return hashlib.sha256(self._authenticated() + self.tag.encode()).hexdigest()

    def to_json(self) -> str:
        """The file."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, raw: str) -> Self:
        """Parse the file; :func:`restore` and :func:`drill` check whether it is authentic.

        Raises:
            ConfigurationError: It is not one.
        """
        try:
            document = json.loads(raw)
            if document["format"] != _FORMAT:
                raise ValueError  # noqa: TRY301 (as what does not parse)
            return cls(
                format=_FORMAT,
                plugin=str(document["plugin"]),
                made_at=str(document["made_at"]),
                key_sets=tuple(map(str, document["key_sets"])),
                threshold=int(document["threshold"]),
                shares=tuple(map(str, document["shares"])),
                identifier=int(document["identifier"]),
                content=str(document["content"]),
                tag=str(document["tag"]),
            )
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ConfigurationError(
                "not a backup file that this version of hsmwrap reads"
            ) from None

    def _authenticated(self) -> bytes:
        fields = asdict(self)
        del fields["tag"]
        return json.dumps(fields, sort_keys=True).encode()

    def tag_under(self, secret: bytes) -> str:
        """The tag that it has to have."""
        return hmac.digest(_derived(secret, b"file"), self._authenticated(), "sha256").hex()


@strip_tracebacks
def back_up(
    key_sets: KeySetManager,
    *,
    shares: int,
    threshold: int,
    now: datetime,
    so_pin_file: str | None = None,
) -> tuple[Backup, tuple[str, ...]]:
    """Make a backup of the key sets that can be backed up.

    Args:
        key_sets: Of which backend.
        shares: Into how many shares its secret is split.
        threshold: How many of these are needed to restore it.
        now: The current time.
        so_pin_file: File with the security officer's PIN.

    Returns:
        The backup, and the shares: each is a secret.

    Raises:
        ConfigurationError: The numbers of shares are not possible, or no key set can be backed up.
        UnsupportedOperation: The backend does not back up key sets.
    """
    secret = secrets.token_bytes(_BYTES)
    made = secret_sharing.split(secret, shares, threshold)
    content = key_sets.back_up(_derived(secret, b"key sets"), so_pin_file=so_pin_file)
    backup = Backup(
        format=_FORMAT,
        plugin=key_sets.plugin,
        made_at=now.isoformat(timespec="seconds"),
        key_sets=tuple(each.key_set for each in key_sets.list()),
        threshold=threshold,
        shares=tuple(map(secret_sharing.digest, made)),
        identifier=secret_sharing.identifier(made[0]),
        content=content,
    )
    return replace(backup, tag=backup.tag_under(secret)), made


@strip_tracebacks
def restore(
    key_sets: KeySetManager,
    backup: Backup,
    shares: Mapping[str, str],
    *,
    so_pin_file: str | None = None,
) -> tuple[KeySetInfo, ...]:
    """Restore the key sets of a backup; those that are there already are left alone.

    Args:
        key_sets: Of which backend.
        backup: What its file says.
        shares: At least as many as it needs, by what errors call each.
        so_pin_file: File with the security officer's PIN.

    Returns:
        All key sets of the backend.

    Raises:
        ConfigurationError: The shares are not those of this backup, or too few; the file was
            changed; the backend has another key set of the same id. Nothing was made.
        HsmError: A key does not unwrap; nothing is kept of its key set.
    """
    key = _opened(key_sets, backup, shares)
    return key_sets.restore(backup.content, key, so_pin_file=so_pin_file)


@strip_tracebacks
def drill(
    key_sets: KeySetManager,
    backup: Backup,
    shares: Mapping[str, str],
    examine: Callable[[Mapping[str, Any]], None],
    *,
    so_pin_file: str | None = None,
) -> tuple[KeySetInfo, ...]:
    """Restore a backup on a scratch HSM, look at it, and leave the HSM as it was.

    Args:
        key_sets: Of the scratch HSM.
        backup: What its file says.
        shares: As for :func:`restore`.
        examine: Gets the settings under which the restored key sets are used; raises what is
            wrong with them.
        so_pin_file: File with the scratch HSM's security officer's PIN.

    Returns:
        The key sets that were restored.

    Raises:
        ConfigurationError: As for :func:`restore`, or it is the HSM of the backup, or one in use.
        HsmError: As for :func:`restore`.
    """
    key = _opened(key_sets, backup, shares)
    return key_sets.drill(backup.content, key, examine, so_pin_file=so_pin_file)


def _opened(key_sets: KeySetManager, backup: Backup, shares: Mapping[str, str]) -> bytes:
    if backup.plugin != key_sets.plugin:
        raise ConfigurationError(
            f"the backup is of backend plug-in {backup.plugin}, not of {key_sets.plugin}"
        )
    secret = secret_sharing.combine(shares, backup.shares, backup.threshold)
    if not hmac.compare_digest(backup.tag_under(secret).encode(), backup.tag.encode()):
        raise ConfigurationError("the backup file was changed: its shares do not authenticate it")
    return _derived(secret, b"key sets")


def _derived(secret: bytes, purpose: bytes) -> bytes:
    info = b"hsmwrap backup: " + purpose
    return HKDFExpand(algorithm=hashes.SHA256(), length=_BYTES, info=info).derive(secret)
