"""The software backend's settings, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, Self

from hsmwrap.errors import ConfigurationError
from hsmwrap.sm2.formats import DEFAULT_LAYOUTS


@dataclass(frozen=True, slots=True)
class SoftwareSettings:
    """Settings of the software backend.

    Attributes:
        keyring_file: Path of the keyring file; None: an ephemeral keyring in memory.
        sm2_engine: ``libcrypto``, or ``gmssl`` for development; None: libcrypto, and no SM2
            where the distribution built libcrypto without it.
        sm2_layouts: Names of the SM2 ciphertext layouts that are accepted.
        serve_hsm_level: Development mode: serve CMKs of protection level HSM as well.
    """

    keyring_file: str | None = None
    sm2_engine: str | None = None
    sm2_layouts: tuple[str, ...] = tuple(DEFAULT_LAYOUTS)
    serve_hsm_level: bool = False

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> Self:
        """Check plain settings.

        Raises:
            ConfigurationError: A setting is unknown or of the wrong kind; the text says which.
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(settings.keys() - set(known)):
            raise ConfigurationError(
                f"software backend: unknown setting {', '.join(unknown)}; "
                f"there are {', '.join(known)}"
            )
        return cls(**{name: _checked(name, value) for name, value in settings.items()})


def _checked(name: str, value: Any) -> Any:
    kind, fits = _KINDS[name]
    if not fits(value):
        raise ConfigurationError(f"software backend: {name} has to be {kind}")
    return tuple(value) if isinstance(value, list) else value


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_text_or_none(value: object) -> bool:
    return value is None or _is_text(value)


_KINDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = MappingProxyType(
    {
        "keyring_file": ("a path", _is_text_or_none),
        "sm2_engine": ("a name", _is_text_or_none),
        "sm2_layouts": (
            "a list of names",
            lambda value: isinstance(value, list | tuple) and all(map(_is_text, value)),
        ),
        "serve_hsm_level": ("true or false", lambda value: isinstance(value, bool)),
    }
)
