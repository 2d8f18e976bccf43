"""Access keys and what they may do: deny by default.

A permission is a list of grants; a grant names actions and keys by shell patterns. What no grant
allows is forbidden.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import InitVar, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from hsmwrap.catalog import loggable
from hsmwrap.errors import ConfigurationError, strip_tracebacks
from hsmwrap.kms.api import PERMISSIONS
from hsmwrap.kms.audit import SYSTEM
from hsmwrap.kms.signing import SigningSecret
from hsmwrap.privatefile import ParsedFile, PrivateFile
from hsmwrap.settings import did_you_mean

MAX_ID_LENGTH = 128
"""Longest id of an access key: keys remember their creator, and logs name who asked."""
_ID = re.compile(r"[!-~]+")
# A secret between its quotes; comments and other texts, so that they are not taken for one.
_SECRET = re.compile(
    rb"""#[^\n]*|\bsecret[ \t]*=[ \t]*(?:"(?P<basic>[^"\\\n]+)"|'(?P<literal>[^'\n]+)')"""
    rb"""|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'"""
)
# Letters of ids that a reader of the audit log may take for the KMS itself.
_OWN = frozenset({SYSTEM, "kms", "hsmwrap", f"kms{SYSTEM}", f"hsmwrap{SYSTEM}", "hsmwrapkms"})


@dataclass(frozen=True, slots=True)
class Grant:
    """Actions that are allowed on keys, both as shell patterns.

    Attributes:
        actions: Patterns of API actions (``Decrypt``, ``Generate*``, ``*``).
        keys: Patterns of key ids. Actions without a key (CreateKey, ListKeys) need ``*`` itself.
    """

    actions: tuple[str, ...]
    keys: tuple[str, ...]

    def allows(self, action: str, key_id: str | None) -> bool:
        """Whether this grant covers ``action`` on ``key_id`` (None: an action without a key)."""
        if not any(fnmatchcase(action, pattern) for pattern in self.actions):
            return False
        return "*" in self.keys or (
            key_id is not None and any(fnmatchcase(key_id, pattern) for pattern in self.keys)
        )


@dataclass(frozen=True, slots=True)
class Permissions:
    """What an access key may do; empty, it may do nothing."""

    grants: tuple[Grant, ...] = ()

    @classmethod
    def everything(cls) -> Permissions:
        """Each action on each key."""
        return cls((Grant(("*",), ("*",)),))

    def allows(self, action: str, key_id: str | None) -> bool:
        """Whether some grant covers ``action`` on ``key_id`` (None: an action without a key)."""
        return any(grant.allows(action, key_id) for grant in self.grants)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls, once the protocol has authenticated them.

    Attributes:
        access_key_id: The access key that signed the request.
        permissions: What it may do.
        address: Where the connection comes from, for the audit log; None: not known.
    """

    access_key_id: str
    permissions: Permissions
    address: str | None = None


@dataclass(frozen=True, slots=True)
class AccessKey:
    """An access key: its id, the secret that signs requests, and what it may do.

    Attributes:
        access_key_id: Names the access key.
        signing: Signs as the secret does; the secret itself is not kept.
        permissions: What it may do.

    Raises:
        ConfigurationError: The id is longer than :data:`MAX_ID_LENGTH`, has characters other than
            printable ASCII without blanks, or looks like the KMS itself in the audit log.
    """

    access_key_id: str
    secret: InitVar[str | bytearray]
    permissions: Permissions
    signing: SigningSecret = field(init=False)

    def __post_init__(self, secret: str | bytearray) -> None:
        """Take the secret; a ``bytearray`` (UTF-8) is overwritten."""
        object.__setattr__(self, "signing", SigningSecret(secret))
        if len(self.access_key_id) > MAX_ID_LENGTH:
            raise ConfigurationError(
                f"access keys: an id has more than {MAX_ID_LENGTH} characters; take a shorter one"
            )
        # Others look like these ones: a Cyrillic s, a blank at the end.
        if not _ID.fullmatch(self.access_key_id):
            raise ConfigurationError(
                "access keys: an id takes printable characters of ASCII without blanks"
            )
        if re.sub("[^a-z]", "", self.access_key_id.lower()) in _OWN:
            raise ConfigurationError(
                f"access keys: the id {self.access_key_id} looks like the KMS itself in the audit "
                "log; take another one"
            )

    def caller(self, address: str | None = None) -> Caller:
        """The caller that a request signed with this key stands for, from this address."""
        return Caller(self.access_key_id, self.permissions, address)


class AccessKeys(Protocol):
    """Where access keys are looked up."""

    def lookup(self, access_key_id: str) -> AccessKey | None:
        """Return the access key of this id, or None."""


class StaticAccessKeys:
    """Access keys that are known from the start."""

    def __init__(self, access_keys: Iterable[AccessKey]) -> None:
        """Take the access keys."""
        self._by_id = {key.access_key_id: key for key in access_keys}

    def lookup(self, access_key_id: str) -> AccessKey | None:
        """Return the access key of this id, or None."""
        return self._by_id.get(access_key_id)


class FileAccessKeys:
    """Access keys in a private TOML file; read again when it, its mode or its owner changes.

    A change that does not parse, or has no access key at all, is not taken: the file may be half
    written. The keys stay those of before, :meth:`fault` says why. A file that is open to others,
    belongs to another user or is gone is refused, and with it every request.

    ::

        [[access_key]]
        id = "backup-service"
        secret = "…"
        allow = [{ actions = ["Encrypt", "GenerateDataKey"], keys = ["*"] }]
    """

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            ConfigurationError: It does not parse, or is not private (:mod:`hsmwrap.privatefile`).
        """
        self._parsed = ParsedFile(
            PrivateFile(path, "access_key_file"), _parse, keep=True, erasable=True
        )
        self._parsed.read()

    def fault(self) -> str | None:
        """Why the keys are not those of the file as it is now; None where they are.

        Raises:
            ConfigurationError: The file is refused, and so is every request.
        """
        self._parsed.read()
        return self._parsed.fault

    def lookup(self, access_key_id: str) -> AccessKey | None:
        """Return the access key of this id, or None."""
        return self._parsed.read().lookup(access_key_id)


def _parse(content: bytearray) -> StaticAccessKeys:
    return StaticAccessKeys(parse_access_keys(_document(content)))


def _document(content: bytearray) -> dict[str, Any]:
    """Parse the file with its secrets taken out: a parser makes texts, which cannot be overwritten.

    In the document they are ``bytearray``. A secret that is written in an unusual form (escapes,
    several lines, a quoted name) stays where it is.
    """
    spans = [match.span(match.lastgroup) for match in _SECRET.finditer(content) if match.lastgroup]
    secrets = [content[start:end] for start, end in spans]
    for start, end in spans:
        content[start:end] = b"x" * (end - start)
    try:
        document = _toml(content)
        entries = document.get("access_key", [])
        if [entry.get("secret") for entry in entries] == ["x" * len(secret) for secret in secrets]:
            for entry, secret in zip(entries, secrets, strict=True):
                entry["secret"] = secret
            return document
    except (TypeError, AttributeError):
        pass  # wrong in any case: said by parse_access_keys
    for (start, end), secret in zip(spans, secrets, strict=True):
        content[start:end] = secret
    return _toml(content)


def _toml(content: bytearray) -> dict[str, Any]:
    try:
        return tomllib.loads(content.decode())
    except tomllib.TOMLDecodeError:
        raise ConfigurationError("not TOML") from None


@strip_tracebacks
def parse_access_keys(document: Mapping[str, Any]) -> list[AccessKey]:
    """Read the access keys of a parsed file.

    Raises:
        ConfigurationError: A key is missing, unknown or of the wrong kind, an id is too long, or a
            grant names an action or a key that there cannot be; no value is quoted.
    """
    try:
        _only(document, "access_key")
        keys = [_access_key(entry) for entry in document.get("access_key", [])]
        if not keys:
            raise ConfigurationError(
                "access keys: there is none; an access key without allow may do nothing"
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(f"access keys: wrong or missing entry: {error}") from None
    if len({key.access_key_id for key in keys}) != len(keys):
        raise ConfigurationError("access keys: an id is there twice")
    return keys


def _access_key(entry: Mapping[str, Any]) -> AccessKey:
    _only(entry, "id", "secret", "allow")
    grants = tuple(_grant(grant) for grant in entry.get("allow", []))
    secret = entry["secret"]
    if not isinstance(secret, bytearray):
        secret = _text(secret)
    return AccessKey(_text(entry["id"]), secret, Permissions(grants))


def _grant(entry: Mapping[str, Any]) -> Grant:
    _only(entry, "actions", "keys")
    if "keys" not in entry:
        raise ConfigurationError(
            'access keys: a grant names its keys; keys = ["*"] stands for every key'
        )
    grant = Grant(_texts(entry["actions"]), _texts(entry["keys"]))
    for pattern in grant.actions:
        if not any(fnmatchcase(action, pattern) for action in PERMISSIONS):
            raise ConfigurationError(
                f"access keys: an entry of actions matches none; "
                f"{did_you_mean([pattern], PERMISSIONS)}It takes {', '.join(PERMISSIONS)}, and "
                "patterns of them (Generate*)"
            )
    if any(pattern.startswith(("alias/", "acs:")) for pattern in grant.keys):
        raise ConfigurationError(
            "access keys: an entry of keys that is an alias or an ARN matches no key: give the "
            "key id, as another call may give the alias to another key"
        )
    return grant


def _only(entry: Any, *known: str) -> None:
    if not isinstance(entry, Mapping):
        raise TypeError(f"a table of {', '.join(known)} is due")
    unknown = sorted(set(entry) - set(known))
    if unknown:
        name = loggable(unknown[0])
        raise ConfigurationError(f"access keys: {name} is none of {', '.join(known)}")


def _texts(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise TypeError("actions and keys are lists")
    return tuple(_text(value) for value in values)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError("a text is missing or empty")
    return value
