"""Parameters of API requests: parsed from text into typed values."""

from __future__ import annotations

import binascii
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from hsmwrap.catalog import (
    KeySpec,
    Origin,
    ProtectionLevel,
    WrappingAlgorithm,
    WrappingKeySpec,
    loggable,
)
from hsmwrap.errors import (
    InvalidCiphertext,
    InvalidImportToken,
    InvalidParameter,
    KeyNotFound,
    MissingParameter,
)
from hsmwrap.kms.blobs import CiphertextBlob
from hsmwrap.kms.errors import AliasNotFound, UnsupportedAlias
from hsmwrap.kms.schema import ALIAS_LENGTH

MAX_PLAINTEXT = 6144
"""Longest plaintext of Encrypt, in bytes."""
_MAX_CONTEXT = 8192
_MAX_UNIX = 253_402_300_799  # the last second of 9999, where datetime ends
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")  # PostgreSQL keeps neither NUL nor surrogates
_DIGITS = re.compile(r"[0-9]{1,20}")
_KEY_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_ALIAS_NAME = re.compile(rf"alias/[A-Za-z0-9_/-]{{1,{ALIAS_LENGTH}}}")
_RESERVED_ALIAS = "alias/acs"
_BOOLEANS = {"true": True, "false": False}

Parser = Callable[[str, str], Any]
"""Takes the parameter's name and text; returns the value, or raises InvalidParameter."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of an operation.

    Attributes:
        parse: Makes the value.
        required: True if the operation needs it. An empty text counts as absent.
        default: The value when absent.
        empty: True where an empty text is a value.
    """

    parse: Parser
    required: bool = False
    default: Any = None
    empty: bool = False


class AliasName(str):
    """The name of an alias that has to exist, with its prefix ``alias/``."""

    __slots__ = ()


def parse(known: Mapping[str, Parameter], given: Mapping[str, str]) -> dict[str, Any]:
    """Parse all ``known`` parameters.

    Raises:
        InvalidParameter: A parameter is unknown or its value is wrong.
        MissingParameter: A required parameter is absent.
    """
    for name in given:
        if name not in known:
            allowed = ", ".join(known)
            raise InvalidParameter(loggable(name), f"not a parameter of this operation: {allowed}")
    return {name: _value(name, one, given.get(name)) for name, one in known.items()}


def _value(name: str, parameter: Parameter, text: str | None) -> Any:
    if text or (parameter.empty and text is not None):
        return parameter.parse(name, text)
    if parameter.required:
        raise MissingParameter(name)
    return parameter.default


def key_id(_name: str, text: str) -> str:
    """A key id. ARNs of this KMS were converted before; other ARNs are unknown keys."""
    if text.startswith("alias/") or ":alias/" in text:
        raise UnsupportedAlias("this operation takes the key id or the ARN of a key, no alias")
    if not _KEY_ID.fullmatch(text):
        raise KeyNotFound("no key has this id")
    return text


def key_id_or_alias(name: str, text: str) -> str | AliasName:
    """A key id, or the name of an alias; the ARN of an alias is refused."""
    return alias(name, text) if text.startswith("alias/") else key_id(name, text)


def alias(_name: str, text: str) -> AliasName:
    """The name of an alias that has to exist."""
    if not _ALIAS_NAME.fullmatch(text):
        raise AliasNotFound("no alias has this name")
    return AliasName(text)


def new_alias(name: str, text: str) -> str:
    """The name of an alias that is to be created."""
    if not _ALIAS_NAME.fullmatch(text) or text.startswith(_RESERVED_ALIAS):
        raise InvalidParameter(
            name,
            f"is not alias/ and 1 to {ALIAS_LENGTH} letters, digits, _, - or /; {_RESERVED_ALIAS} "
            "is reserved",
        )
    return text


def binary(name: str, text: str) -> bytes:
    """Bytes in base64 (RFC 4648, section 4), in the one text that encoders make of them.

    No line ends, no URL-safe alphabet, all padding, and no bits set that decoding ignores (section
    3.5): two texts never mean the same token or ciphertext.
    """
    try:
        value = binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        raise InvalidParameter(name, "is not base64 (RFC 4648, section 4)") from None
    if binascii.b2a_base64(value, newline=False) != text.encode():
        raise InvalidParameter(name, "is not canonical base64: ignored bits are set at its end")
    return value


def plaintext(name: str, text: str) -> bytes:
    """Bytes in base64, at most :data:`MAX_PLAINTEXT`."""
    value = binary(name, text)
    if len(value) > MAX_PLAINTEXT:
        raise InvalidParameter(name, f"has more than {MAX_PLAINTEXT} bytes")
    return value


def import_token(name: str, text: str) -> bytes:
    """An import token in base64; anything else is an invalid token."""
    try:
        return binary(name, text)
    except InvalidParameter:
        raise InvalidImportToken("the import token is not base64") from None


def ciphertext_blob(name: str, text: str) -> CiphertextBlob:
    """A CiphertextBlob in base64."""
    try:
        return CiphertextBlob.from_bytes(binary(name, text))
    except InvalidParameter:
        raise InvalidCiphertext from None


def integer(low: int, high: int) -> Parser:
    """A whole number in decimal, from ``low`` to ``high``."""

    def parse_integer(name: str, text: str) -> int:
        if not _DIGITS.fullmatch(text) or not low <= int(text) <= high:
            raise InvalidParameter(name, f"is not a whole number from {low} to {high}")
        return int(text)

    return parse_integer


def unix_time(name: str, text: str) -> datetime | None:
    """Seconds since 1970; 0: None."""
    seconds = integer(0, _MAX_UNIX)(name, text)
    return datetime.fromtimestamp(seconds, UTC) if seconds else None


def boolean(name: str, text: str) -> bool:
    """``true`` or ``false``; Python's SDK writes them with a capital letter."""
    value = _BOOLEANS.get(text.lower())
    if value is None:
        raise InvalidParameter(name, "has to be true or false")
    return value


def never(name: str, text: str) -> bool:
    """``false``: what is not served."""
    if boolean(name, text):
        raise InvalidParameter(name, "has to be false: this is not served here")
    return False


def choice(*known: str) -> Parser:
    """One of these values."""

    def parse_choice(name: str, text: str) -> str:
        if text not in known:
            raise InvalidParameter(name, f"has to be one of {', '.join(known)}")
        return text

    return parse_choice


def words(limit: int) -> Parser:
    """Text of at most ``limit`` characters."""

    def parse_words(name: str, text: str) -> str:
        if len(text) > limit or _UNSTORABLE.search(text):
            raise InvalidParameter(name, f"is not text of at most {limit} characters")
        return text

    return parse_words


def member(
    enum: type[KeySpec | Origin | ProtectionLevel | WrappingAlgorithm | WrappingKeySpec],
) -> Parser:
    """A member of one of the catalogue's enums."""
    return lambda _name, text: enum.parse(text)


def encryption_context(name: str, text: str) -> dict[str, str]:
    """A JSON object of strings; a repeated name is refused."""
    if len(text) > _MAX_CONTEXT:
        raise InvalidParameter(name, f"has more than {_MAX_CONTEXT} characters")
    try:
        context = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        raise InvalidParameter(name, "is not a JSON object with unique names") from None
    if not isinstance(context, dict) or not all(isinstance(v, str) for v in context.values()):
        raise InvalidParameter(name, "is not a JSON object of strings")
    return context


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name is repeated")
    return dict(pairs)
