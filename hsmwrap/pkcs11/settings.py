"""The PKCS#11 backend's settings: a table that says what there is, and one reader of it."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, Self

from hsmwrap.backend import Custody
from hsmwrap.errors import ConfigurationError
from hsmwrap.pkcs11.token import pin
from hsmwrap.pkcs11.token.selection import TokenSelector, selector_from
from hsmwrap.pkcs11.token.uri import Pkcs11Uri, parse
from hsmwrap.sm2.formats import DEFAULT_LAYOUTS, Layout, check_layouts


class WrappingCustody(StrEnum):
    """How private wrapping keys are kept: sealed in the import token, resident in the HSM token.

    AUTO: sealed where the HSM token can, as probed; resident otherwise.
    """

    AUTO = "auto"
    SEALED = "sealed"
    RESIDENT = "resident"


@dataclass(frozen=True, slots=True)
class Kind:
    """What a setting takes.

    Attributes:
        takes: In words, to follow "takes".
        read: Turns the plain value into the one used; ``ValueError`` where it does not fit.
    """

    takes: str
    read: Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table; ``default`` None: not set."""

    name: str
    kind: Kind
    help: str
    default: Any = None

    def read(self, value: Any) -> Any:
        """Return the checked value, or the default for None.

        Raises:
            ConfigurationError: The value does not fit. It is not repeated: it may be a PIN that
                was put into the wrong place.
        """
        if value is None:
            return self.default
        try:
            return self.kind.read(value)
        except ValueError:
            raise ConfigurationError(
                f"{self.name}: takes {self.kind.takes}; this {type(value).__name__} does not fit"
            ) from None


def _typed(value: Any, *types: type) -> Any:
    # bool is an int to Python, and to nobody else.
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise ValueError
    return value


def _text(value: Any) -> str:
    if not _typed(value, str) or "\0" in value:
        raise ValueError
    return str(value)


def _name(value: Any) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,32}", _typed(value, str)):
        raise ValueError
    return str(value)


def _integer(lowest: int, highest: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if not lowest <= _typed(value, int) <= highest:
            raise ValueError
        return int(value)

    return read


def _seconds(value: Any) -> float:
    if not math.isfinite(_typed(value, int, float)) or value < 0:
        raise ValueError
    return float(value)


def _choice(members: Iterable[StrEnum]) -> Kind:
    by_name = {str(member): member for member in members}

    def read(value: Any) -> StrEnum:
        if _typed(value, str) not in by_name:
            raise ValueError
        return by_name[value]

    return Kind(f"one of {', '.join(by_name)}", read)


def _layouts(value: Any) -> tuple[Layout, ...]:
    chosen = check_layouts([_typed(name, str) for name in _typed(value, list, tuple)])
    return tuple(layout for layout in Layout if layout in chosen)


def _pin_source_of(name: str) -> Kind:
    # hsmwrap.pkcs11.token.pin checks the value and says what is wrong with it.
    return Kind(pin.SOURCES[name].takes, lambda value: value)


_TEXT = Kind("text that is not empty", _text)
_NAME = Kind("1 to 32 ASCII letters, digits, dots, dashes or underscores", _name)
_SWITCH = Kind("true or false", lambda value: _typed(value, bool))
_SECONDS = Kind("a number of seconds, 0 or more", _seconds)
_SLOT_ID = Kind("a slot number", _integer(0, 2**64 - 1))
_POOL_SIZE = Kind("a whole number, 1 to 1024", _integer(1, 1024))
_LAYOUTS = Kind(f"a list of {', '.join(Layout)}", _layouts)

SETTINGS: tuple[Setting, ...] = (
    Setting("uri", _TEXT, "RFC 7512 URI: module-path, token selection, pin-source."),
    Setting("module", _TEXT, "Path of the PKCS#11 module; or module-path in the URI."),
    Setting("library_parameters", _TEXT, "pReserved of C_Initialize; NSS softokn needs it."),
    Setting("token_label", _TEXT, "Label of the HSM token."),
    Setting("token_serial", _TEXT, "Serial number of the HSM token."),
    Setting("token_manufacturer", _TEXT, "Manufacturer of the HSM token."),
    Setting("token_model", _TEXT, "Model of the HSM token."),
    Setting("slot_id", _SLOT_ID, "Slot of the HSM token; some modules renumber their slots."),
    Setting(
        "pin_file", _pin_source_of("pin_file"), "File with the PIN, mode 0400, ours or root's."
    ),
    Setting("pin_env", _pin_source_of("pin_env"), "Environment variable that holds the PIN."),
    Setting("pin_command", _pin_source_of("pin_command"), "Program that prints the PIN; no shell."),
    Setting("pin_callback", _pin_source_of("pin_callback"), "Returns the PIN, for embedders."),
    Setting("allow_pin_value", _SWITCH, "Accept pin-value in the URI.", default=False),
    Setting(
        "force_login", _SWITCH, "Log in although one wrong PIN may lock the token.", default=False
    ),
    Setting("sessions", _POOL_SIZE, "Size of the session pool.", default=8),
    Setting("session_wait", _SECONDS, "Seconds that a call waits for a session.", default=10.0),
    Setting("lazy", _SWITCH, "Start although the HSM is away.", default=False),
    Setting("initial_backoff", _SECONDS, "Wait before a lost HSM is tried again.", default=0.5),
    Setting("max_backoff", _SECONDS, "Longest wait between two tries.", default=30.0),
    Setting(
        "wrapping_custody",
        _choice(WrappingCustody),
        "Private wrapping keys: sealed in the import token, or resident in the HSM token.",
        default=WrappingCustody.AUTO,
    ),
    Setting(
        "material_custody",
        _choice(Custody),
        "Imported keys: sealed blobs that the caller keeps, or objects in the HSM token.",
        default=Custody.HSM_ENCRYPTED_DATABASE,
    ),
    Setting(
        "sm2_layouts",
        _LAYOUTS,
        "SM2 ciphertext layouts that are accepted.",
        default=DEFAULT_LAYOUTS,
    ),
    Setting(
        "require_trusted_keys",
        _SWITCH,
        "Use only key sets that the security officer made trusted.",
        default=False,
    ),
    Setting("profile", _NAME, "Vendor profile."),
    Setting("name", _NAME, "Name of the backend in import tokens and keys.", default="pkcs11"),
    Setting("key_prefix", _NAME, "Start of our objects' labels in the token.", default="hsmwrap"),
)
"""Every setting of the PKCS#11 backend."""

_BY_NAME: Mapping[str, Setting] = {setting.name: setting for setting in SETTINGS}


@dataclass(frozen=True, slots=True)
class Pkcs11Settings:
    """The checked settings; :data:`SETTINGS` says what each is for.

    Attributes that differ from the plain settings:
        module: From ``module`` or the URI's module-path.
        selector: From the URI and the ``token_`` settings and ``slot_id``.
        pin: The one PIN source; None where none is given.
    """

    module: str
    library_parameters: str | None
    selector: TokenSelector
    pin: pin.PinSource | None
    force_login: bool
    sessions: int
    session_wait: float
    lazy: bool
    initial_backoff: float
    max_backoff: float
    wrapping_custody: WrappingCustody
    material_custody: Custody
    sm2_layouts: tuple[Layout, ...]
    require_trusted_keys: bool
    profile: str | None
    name: str
    key_prefix: str

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Self:
        """Check plain settings; None counts as absent.

        Raises:
            ConfigurationError: A setting is unknown, missing, of the wrong kind, or contradicts
                another; the text says which and what would be right.
        """
        _require_known(mapping)
        values = {setting.name: setting.read(mapping.get(setting.name)) for setting in SETTINGS}
        if values["initial_backoff"] > values["max_backoff"]:
            raise ConfigurationError("initial_backoff exceeds max_backoff")
        uri = _uri(values)
        taken = {field.name: values[field.name] for field in fields(cls) if field.name in values}
        derived = {
            "module": _module(values["module"], uri),
            "selector": selector_from(values, uri),
            "pin": _pin_source(values, uri),
        }
        return cls(**(taken | derived))


def _require_known(mapping: Mapping[str, Any]) -> None:
    if unknown := sorted(str(name) for name in mapping.keys() - _BY_NAME.keys()):
        near = [m for name in unknown for m in difflib.get_close_matches(name, _BY_NAME, 1)]
        hint = f"did you mean {', '.join(near)}? " if near else ""
        raise ConfigurationError(
            f"unknown setting {', '.join(unknown)}; {hint}There are {', '.join(_BY_NAME)}"
        )


def _uri(values: Mapping[str, Any]) -> Pkcs11Uri:
    if values["uri"] is None:
        return Pkcs11Uri()
    return parse(values["uri"], allow_pin_value=values["allow_pin_value"])


def _module(plain: str | None, uri: Pkcs11Uri) -> str:
    module = plain or uri.module_path
    if module is None:
        raise ConfigurationError("module: give the module's path, here or as the URI's module-path")
    if uri.module_path not in {None, module}:
        raise ConfigurationError(
            f"module is {plain!r}, but the PKCS#11 URI says {uri.module_path!r}; give one of them"
        )
    return module


def _pin_source(values: Mapping[str, Any], uri: Pkcs11Uri) -> pin.PinSource | None:
    given = {name: values[name] for name in pin.SOURCES if name in values} | uri.pin_settings()
    if all(value is None for value in given.values()):
        return None
    return pin.from_settings(given)
