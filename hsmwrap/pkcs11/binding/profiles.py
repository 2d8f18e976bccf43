"""Vendor profiles: what a family of PKCS#11 modules does in its own way, as data.

A profile is a TOML file: ``vendors/NAME.toml`` here, or one of the operator's. Values
collide between vendors (0x80008200 is Sansec's and TASS's), so a profile is chosen by
configuration, one per module, and only proposed by what a module calls itself. What can be found
out by trying is not in a profile: attributes that a token does not know, the number of AES key
wrap, the type of HMAC keys, OAEP's hashes and the form of EC points. What a profile says is tried
as well, before it is relied on.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self, TypeVar

from pkcs11.mechanisms import KeyType, Mechanism

from hsmwrap.errors import ConfigurationError
from hsmwrap.settings import (
    REQUIRED,
    TEXT,
    Kind,
    Settings,
    choice,
    did_you_mean,
    integer,
    setting,
    typed,
    unknown_setting,
)
from hsmwrap.sm2 import Layout

_E = TypeVar("_E", KeyType, Mechanism)

_DIRECTORY = resources.files("hsmwrap.pkcs11.binding") / "vendors"
_SUFFIX = ".toml"
_SETTINGS = ("library_parameters", "sessions", "wrapping_custody", "material_custody")


@dataclass(frozen=True, slots=True)
class ModuleNames(Settings):
    """``[module]``: how a module of the family calls itself, each the start of the text."""

    component: ClassVar[str] = "profile: module"

    manufacturer: str | None = setting(TEXT, "Manufacturer of the HSM token (C_GetTokenInfo).")
    model: str | None = setting(TEXT, "Model of the HSM token (C_GetTokenInfo).")
    library: str | None = setting(TEXT, "Description of the module (C_GetInfo).")

    def fit(self, manufacturer: str, model: str, library: str) -> bool:
        """Whether each name that is given begins what the module says; False if none is."""
        said = {"manufacturer": manufacturer, "model": model, "library": library}
        given = {name: start for name in said if (start := getattr(self, name)) is not None}
        return bool(given) and all(said[name].startswith(start) for name, start in given.items())


def _number(kind: type[_E], what: str) -> Kind:
    number = integer(0, 2**32 - 1)

    def read(value: Any) -> _E:
        return value if isinstance(value, kind) else by_number(kind, number.read(value))

    return Kind(f"{what} of PKCS#11 as a number, such as 0x80000001", read)


def by_number(kind: type[_E], value: int) -> _E:
    """A member by number, for python-pkcs11, which takes no plain int (field note 6)."""
    for member in kind:
        if member.value == value:
            return member
    made: _E = int.__new__(kind, value)
    made._name_ = f"VENDOR_{value:#010x}"
    made._value_ = value
    return made


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else bytes.fromhex(TEXT.read(value))


@dataclass(frozen=True, slots=True)
class VendorSm2(Settings):
    """``[sm2]``: a vendor's SM2."""

    component: ClassVar[str] = "profile: sm2"

    key_type: KeyType | None = setting(
        _number(KeyType, "a key type"), "Type of its SM2 keys; without it CKK_EC."
    )
    generate: Mechanism | None = setting(
        _number(Mechanism, "a mechanism"),
        "Mechanism of key pair generation; without it CKM_EC_KEY_PAIR_GEN.",
    )
    decrypt: Mechanism | None = setting(
        _number(Mechanism, "a mechanism"),
        "Mechanism of C_Decrypt; without it CKM_ECDH1_DERIVE does what the token does of SM2.",
    )
    ciphertext: Layout = setting(
        choice(Layout), "What that mechanism takes; C1C3C2_BARE is without 04.", Layout.C1C3C2
    )
    unwrap: Mechanism | None = setting(
        _number(Mechanism, "a mechanism"),
        "Mechanism of C_UnwrapKey; without it key material passes through the host.",
    )
    unwrap_parameter: bytes | None = setting(
        Kind("bytes in hexadecimal digits", _bytes), "That mechanism's parameter; without it none."
    )
    unwrap_ciphertext: Layout | None = setting(
        choice(Layout), "What that mechanism takes; without it the same as that of C_Decrypt."
    )

    @property
    def unwrap_layout(self) -> Layout:
        """What the mechanism of C_UnwrapKey takes."""
        return self.unwrap_ciphertext or self.ciphertext


@dataclass(frozen=True, slots=True)
class Profile(Settings):
    """A whole file."""

    component: ClassVar[str] = "profile"

    summary: str = setting(TEXT, "What it is for, in a line.", REQUIRED)
    tried: str = setting(TEXT, "On which version and when it was tried, or where it is from.",
                         REQUIRED)  # fmt: skip
    module: ModuleNames = setting(
        Kind("a table", lambda value: _table(ModuleNames, value)),
        "How the module calls itself: `hsmwrap doctor` proposes the profile by it.",
        ModuleNames(),
    )
    sm2: VendorSm2 | None = setting(
        Kind("a table", lambda value: _table(VendorSm2, value)),
        "SM2 by the vendor's own mechanisms; without it by those of the standard.",
    )
    settings: Mapping[str, Any] | None = setting(
        Kind("a table", lambda value: _settings(value)),  # noqa: PLW0108  # defined below
        f"What the backend takes where the configuration does not say it: {', '.join(_SETTINGS)}.",
    )
    quirks: tuple[str, ...] = setting(
        Kind("a list of texts", lambda value: tuple(TEXT.read(each) for each in _list(value))),
        "What else is known of it, in words.",
        (),
    )

    @classmethod
    def read(cls, name: str, text: str) -> Self:
        """Parse a file.

        Raises:
            ConfigurationError: It is not TOML, or not a profile; the text says what is wrong where.
        """
        try:
            return cls.from_mapping(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise ConfigurationError(f"profile {name}: not TOML: {error}") from None
        except ConfigurationError as error:
            raise ConfigurationError(f"{name}: {error}") from None


def names() -> tuple[str, ...]:
    """Those that hsmwrap brings along."""
    files = (each.name for each in _DIRECTORY.iterdir())
    return tuple(sorted(n.removesuffix(_SUFFIX) for n in files if n.endswith(_SUFFIX)))


def text_of(name: str) -> str:
    """The file of a profile that hsmwrap brings along, as text.

    Raises:
        ConfigurationError: No profile has this name.
    """
    if name not in (known := names()):
        near = did_you_mean([name], known)
        raise ConfigurationError(
            f"profile: {name!r} is unknown; {near}there are {', '.join(known)}, and profile_file "
            "takes one of your own"
        )
    return (_DIRECTORY / f"{name}{_SUFFIX}").read_text("utf-8")


@cache
def load(name: str) -> Profile:
    """A profile that hsmwrap brings along.

    Raises:
        ConfigurationError: No profile has this name.
    """
    return Profile.read(name, text_of(name))


def load_file(path: str) -> Profile:
    """A profile of the operator's.

    Raises:
        ConfigurationError: The file cannot be read, or is not a profile.
    """
    try:
        text = Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigurationError(f"profile_file {path}: {why}") from None
    return Profile.read(path, text)


def chosen(name: str | None, path: str | None) -> Profile | None:
    """The profile that the configuration names, by name or by file; None for none.

    Raises:
        ConfigurationError: It names both, or what :func:`load` and :func:`load_file` raise.
    """
    if name is not None and path is not None:
        raise ConfigurationError("profile and profile_file: give one of them")
    if path is not None:
        return load_file(path)
    return None if name is None else load(name)


def fitting(manufacturer: str, model: str, library: str) -> tuple[str, ...]:
    """Names of the profiles that are for a module and HSM token that call themselves this."""
    return tuple(n for n in names() if load(n).module.fit(manufacturer, model, library))


def _table(kind: type[Settings], value: Any) -> Settings:
    return value if isinstance(value, kind) else kind.from_mapping(typed(value, dict))


def _settings(value: Any) -> Mapping[str, Any]:
    if unknown := sorted(typed(value, dict, MappingProxyType).keys() - set(_SETTINGS)):
        raise unknown_setting("profile: settings", unknown, _SETTINGS)
    return MappingProxyType(dict(value))


def _list(value: Any) -> Any:
    return typed(value, list, tuple)
