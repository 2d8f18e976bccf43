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

MASK = "(set, not shown)"
# A setting that may hold a secret itself; one that says where the secret is may be shown.
_SECRET = re.compile(r"(?i)pin|secret|password|passphrase|credential")
_WHERE = re.compile(r"(?i)_(file|env|path|source|command)$")


@dataclass(frozen=True, slots=True)
class Setting:
    """One value: its name with dots, its text, and ``file``, ``default`` or the variable."""

    name: str
    value: str
    source: str


def explain(config: ServerConfig, path: Path | None = None) -> list[Setting]:
    """Every effective value; ``path`` is the file that the configuration was loaded from.

    Raises:
        ConfigurationError: The file cannot be read (any more).
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
        return _url(value.get_secret_value())
    if _SECRET.search(keys[-1]) and not _WHERE.search(keys[-1]):
        return MASK
    return "-" if value is None else str(value)


def _url(url: str) -> str:
    try:
        return make_url(url).set(query={}).render_as_string(hide_password=True)
    except ArgumentError:
        return MASK


def _source(keys: tuple[str, ...], document: Mapping[str, Any]) -> str:
    variables = {name.upper() for name in os.environ}
    for length in range(len(keys), 0, -1):
        variable = ENV_PREFIX + "__".join(keys[:length]).upper()
        if variable in variables:
            return variable
    found: Any = document
    for key in keys:
        if not isinstance(found, Mapping) or key not in found:
            return "default"
        found = found[key]
    return "file"
