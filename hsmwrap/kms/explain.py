"""The effective configuration, value by value, each with where it comes from. No secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from hsmwrap.kms.config import ENV_PREFIX, ServerConfig, read_file
from hsmwrap.kms.database import shown_url
from hsmwrap.settings import as_toml

MASK = "(set, not shown)"
# Names of settings that may hold a secret. Those that say where a secret is (file, variable) may be
# shown. A command is not among them, since its arguments may hold secrets.
_SECRET = re.compile(r"(?i)pin|secret|password|passphrase|credential")
_WHERE = re.compile(r"(?i)_(file|env|path)$")
# The PIN attributes of a PKCS#11 URI (RFC 7512) and everything after: a PIN may contain a bare &.
_URI_PIN = re.compile(r"(?i)(pin-(?:value|source))\s*=.*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Setting:
    """One value: dotted name, as TOML (``-``: not set), and source: file, default or variable."""

    name: str
    value: str
    source: str


def explain(config: ServerConfig, path: Path | None = None) -> list[Setting]:
    """All effective values; ``path`` is the file that the configuration was loaded from.

    Raises:
        ConfigurationError: The file cannot be read.
    """
    document = read_file(path)
    return [
        Setting(".".join(keys), _text(keys, value), _source(keys, document))
        for keys, value in _leaves((), config)
    ]


def _leaves(keys: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if isinstance(value, Mapping) and (value or not keys):
        for name, inner in value.items():
            yield from _leaves((*keys, str(name)), inner)
    else:
        yield keys, value


def _text(keys: tuple[str, ...], value: Any) -> str:
    if isinstance(value, SecretStr):
        url = _url(value.get_secret_value())
        return url if url is MASK else as_toml(url)
    if value is None:
        return "-"
    if any(map(_is_secret, keys[:-1])):
        return MASK
    shown = _masked(keys[-1], value)
    return MASK if shown is MASK else as_toml(shown)


def _masked(key: str, value: Any) -> Any:
    """The value with every secret in it masked, at any depth; booleans are never secret."""
    if isinstance(value, bool):
        return value
    if _is_secret(key):
        return MASK
    if isinstance(value, Mapping):
        return {name: _masked(str(name), inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(key, inner) for inner in value]
    return _URI_PIN.sub(rf"\1={MASK}", value) if isinstance(value, str) else value


def _is_secret(key: str) -> bool:
    return bool(_SECRET.search(key)) and not _WHERE.search(key)


def _url(url: str) -> str:
    try:
        return shown_url(make_url(url))
    except (ArgumentError, ValueError):
        return MASK


def _source(keys: tuple[str, ...], document: Mapping[str, Any]) -> str:
    variables = {name.upper() for name in os.environ}
    for length in range(len(keys), 0, -1):
        variable = ENV_PREFIX + "__".join(keys[:length]).upper()
        if variable in variables:
            return variable
    return "file" if _is_in(document, keys) else "default"


def _is_in(document: Any, keys: tuple[str, ...]) -> bool:
    """Whether the file has this value; it may name a level (``backends.HSM``) in small letters."""
    if not keys:
        return True
    if not isinstance(document, Mapping):
        return False
    names = [name for name in document if keys[0] in {name, name.upper()}]
    return any(_is_in(document[name], keys[1:]) for name in names)
