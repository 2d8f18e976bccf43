"""Settings: one way to say what there is, and one way to check it.

A component's settings are a frozen dataclass. Its fields are the table: each has a kind, a help
text and a default (None: not set); the required ones come first::

    @dataclass(frozen=True, slots=True)
    class AcmeSettings(Settings):
        component: ClassVar[str] = "acme"
        key_file: str = setting(TEXT, "File with the master key.", REQUIRED)
        sessions: int = setting(integer(1, 64), "Sessions that are kept open.", 8)

    settings = AcmeSettings.from_mapping({"key_file": "/etc/acme/key"})

The same table is printed by ``hsmwrap config settings`` and in docs/settings.md.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from datetime import timedelta
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Any, ClassVar, Self

from hsmwrap.errors import ConfigurationError, strip_tracebacks


@dataclass(frozen=True, slots=True)
class Kind:
    """What a setting takes.

    Attributes:
        takes: In words, to follow "takes".
        read: Turns a plain value (text, number, boolean, list) into the one that is used; its own
            output stays as it is. Raises ``ValueError`` where the value does not fit.
        names: What it takes, if that is one of some names.
    """

    takes: str
    read: Callable[[Any], Any]
    names: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of a table."""

    name: str
    takes: str
    help: str
    default: Any


REQUIRED = MISSING
"""The default of a setting that has to be given."""


def setting(kind: Kind, help_: str, default: Any = None, *, show: bool = True) -> Any:
    """A field of a settings class; ``show=False`` keeps its value out of the repr."""
    return field(default=default, repr=show, metadata={"kind": kind, "help": help_})


@dataclass(frozen=True, slots=True)
class Settings:
    """Base of a component's settings, which are checked however they are made.

    Attributes:
        component: What errors call the component.
    """

    component: ClassVar[str]

    @classmethod
    def table(cls) -> tuple[Setting, ...]:
        """Every setting, in the order of the fields."""
        return tuple(
            Setting(each.name, each.metadata["kind"].takes, each.metadata["help"], each.default)
            for each in fields(cls)
            if each.metadata
        )

    @classmethod
    @strip_tracebacks
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Self:
        """Check plain settings. None counts as absent where that is the default.

        Raises:
            ConfigurationError: A setting is unknown, missing, of the wrong kind, or contradicts
                another; the text says which and what would be right. No value is repeated: it
                may be a secret that was put into the wrong place.
        """
        table = cls.table()
        if unknown := sorted(map(str, mapping.keys() - {each.name for each in table})):
            raise unknown_setting(cls.component, unknown, [each.name for each in table])
        for each in table:
            if each.default is REQUIRED and each.name not in mapping:
                raise ConfigurationError(f"{cls.component}: {each.name}: required; {each.help}")
        return cls(**mapping)

    @strip_tracebacks
    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ConfigurationError: One does not fit.
        """
        for each in fields(self):
            value = getattr(self, each.name, None)
            if not each.metadata or value is each.default is None:
                continue
            try:
                object.__setattr__(self, each.name, each.metadata["kind"].read(value))
            except ValueError:
                kind = each.metadata["kind"]
                raise ConfigurationError(
                    f"{self.component}: {each.name}: takes {kind.takes}; {_advice(kind, value)}"
                ) from None


@strip_tracebacks
def read_settings(path: Path, option: str = "--settings") -> dict[str, Any]:
    """The plain settings in a TOML file.

    Args:
        path: The file.
        option: The option that named it, for errors.

    Raises:
        ConfigurationError: It cannot be read or does not parse.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        # Of TOML's own errors not the text, which quotes the file: it may hold a secret.
        why = error.strerror if isinstance(error, OSError) else "is not TOML in UTF-8"
        raise ConfigurationError(f"{option} {path}: {why}") from None


def unknown_setting(
    component: str, unknown: Sequence[str], known: Sequence[str]
) -> ConfigurationError:
    """What is wrong where nothing reads a setting, with the nearest known ones."""
    return ConfigurationError(
        f"{component}: unknown setting {', '.join(unknown)}; {did_you_mean(unknown, known)}"
        f"There are {', '.join(known)}"
    )


def did_you_mean(unknown: Iterable[str], known: Sequence[str]) -> str:
    """A question that names the nearest known names; empty where none is near."""
    by_small = {name.casefold(): name for name in known}
    near = [
        by_small[match]
        for name in unknown
        for match in difflib.get_close_matches(name.casefold(), by_small, 1)
    ]
    return f"did you mean {', '.join(near)}? " if near else ""


_CALLED = {str: "text", bool: "boolean", int: "number", float: "number", dict: "table"}


def _advice(kind: Kind, value: Any) -> str:
    """How the same value has to be written, if that is what is wrong with it; else what is near."""
    others: list[tuple[str, Callable[[], Any]]] = [("in [ ]", lambda: [value])]
    if isinstance(value, str):
        others.append(("without quotes", lambda: tomllib.loads(f"it = {value}")["it"]))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        others.append(("in quotes", lambda: str(value)))
    for how, other in others:
        with suppress(ValueError, ConfigurationError):  # TOMLDecodeError is a ValueError
            kind.read(other())
            return f"write it {how}"
    given = value if isinstance(value, list) else [value]
    near = did_you_mean([name for name in given if isinstance(name, str)], kind.names)
    return f"{near}this {_CALLED.get(type(value), type(value).__name__)} does not fit"


def as_toml(value: Any) -> str:
    """A value of a setting as TOML has it; a duration in seconds."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
        value = int(value) if value == int(value) else value
    if isinstance(value, Mapping):
        inner = (f"{_toml_key(str(name))} = {as_toml(each)}" for name, each in value.items())
        return f"{{ {', '.join(inner)} }}" if value else "{}"
    if isinstance(value, frozenset):
        value = sorted(value)
    if isinstance(value, IntEnum):  # a number of PKCS#11
        return f"{value:#x}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_toml, value))}]"
    return json.dumps(value, ensure_ascii=False, default=str)


def _toml_key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


# --- kinds


def integer(lowest: int, highest: int | None = None) -> Kind:
    """A whole number within these bounds."""
    bounds = f"{lowest} or more" if highest is None else f"{lowest} to {highest}"

    def read(value: Any) -> int:
        if typed(value, int) < lowest or (highest is not None and value > highest):
            raise ValueError
        return int(value)

    return Kind(f"a whole number, {bounds}", read)


def seconds(*, zero: bool = True) -> Kind:
    """A number of seconds, as ``float``."""

    def read(value: Any) -> float:
        if not math.isfinite(typed(value, int, float)) or value < 0 or not (zero or value):
            raise ValueError
        return float(value)

    return Kind(f"a number of seconds, {'0 or more' if zero else 'more than 0'}", read)


def choice(members: Iterable[StrEnum | str]) -> Kind:
    """One of these names, as the member of the enumeration."""
    by_name = {str(member): member for member in members}

    def read(value: Any) -> str:
        if typed(value, str) not in by_name:
            raise ValueError
        return by_name[value]

    return Kind(f"one of {', '.join(by_name)}", read, tuple(by_name))


def several(kind: Kind, what: str) -> Kind:
    """A list of these, as a tuple; not a text."""
    return Kind(
        f"a list of {what}",
        lambda value: tuple(kind.read(each) for each in typed(value, list, tuple)),
        kind.names,
    )


def typed(value: Any, *types: type) -> Any:
    """Return a value of one of these types; ``bool`` does not count as ``int``.

    Raises:
        ValueError: It has another type.
    """
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise ValueError
    return value


def _text(value: Any) -> str:
    if not typed(value, str) or "\0" in value:
        raise ValueError
    return str(value)


def _name(value: Any) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,32}", typed(value, str)):
        raise ValueError
    return str(value)


def _hex(value: Any) -> bytes:
    read = value if isinstance(value, bytes) else bytes.fromhex(typed(value, str))
    if not read:
        raise ValueError
    return read


def _duration(value: Any) -> timedelta:
    duration = (
        value if isinstance(value, timedelta) else timedelta(seconds=typed(value, int, float))
    )
    if duration <= timedelta(0):
        raise ValueError
    return duration


TEXT = Kind("text that is not empty", _text)
NAME = Kind("1 to 32 ASCII letters, digits, dots, dashes or underscores", _name)
HEX = Kind("bytes in hex digits", _hex)
SWITCH = Kind("true or false", lambda value: typed(value, bool))
DURATION = Kind("a duration (timedelta, or seconds) of more than 0", _duration)
