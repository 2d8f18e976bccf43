"""Which HSM token is meant: exactly one has to match, or the error lists those present."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from pkcs11.constants import TokenFlag
from pkcs11.exceptions import TokenNotPresent, TokenNotRecognised
from pkcs11.types import Token

from hsmwrap.errors import ConfigurationError, TokenSelectionError
from hsmwrap.pkcs11.binding.module import Module
from hsmwrap.pkcs11.token.uri import Pkcs11Uri

SETTING_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "serial": "token_serial",
        "label": "token_label",
        "slot_id": "slot_id",
        "manufacturer": "token_manufacturer",
        "model": "token_model",
    }
)
"""The setting behind each attribute of a selector."""


@dataclass(frozen=True, slots=True)
class TokenDescription:
    """What a slot says of the token in it.

    Attributes:
        slot_id: Slot number.
        label: Label of the token; may be blank.
        serial: Serial number.
        manufacturer: Manufacturer.
        model: Model.
        initialised: Whether there is a token to be used.
    """

    slot_id: int
    label: str
    serial: str
    manufacturer: str
    model: str
    initialised: bool = True

    def __str__(self) -> str:
        return f"label {_plain(self.label)!r}, serial {_plain(self.serial)!r}, slot {self.slot_id}"


@dataclass(frozen=True, slots=True)
class TokenSelector:
    """What the configuration says of the token; None: anything. Attributes as in the description.

    Trailing blanks and NULs do not count: PKCS#11 pads its fixed-length fields with blanks, some
    modules with NULs.
    """

    label: str | None = None
    serial: str | None = None
    slot_id: int | None = None
    manufacturer: str | None = None
    model: str | None = None

    def __str__(self) -> str:
        wanted = (f"{SETTING_NAMES[name]} {value!r}" for name, value in self._wanted().items())
        return ", ".join(wanted) or "no setting"

    def matches(self, description: TokenDescription) -> bool:
        """Whether the token is one of those meant."""
        return all(
            _plain(getattr(description, name)) == value for name, value in self._wanted().items()
        )

    def _wanted(self) -> dict[str, str | int]:
        values = {attribute.name: getattr(self, attribute.name) for attribute in fields(self)}
        return {name: _plain(value) for name, value in values.items() if value is not None}


def select(selector: TokenSelector, present: Sequence[TokenDescription]) -> TokenDescription:
    """Return the one token that ``selector`` means.

    Tokens that are not initialised are not counted, so an empty selector finds the only token.

    Raises:
        TokenSelectionError: None or several match. The text lists the tokens present and the
            settings that tell them apart. Retryable where none matches.
    """
    ready = [token for token in present if token.initialised]
    matching = [token for token in ready if selector.matches(token)]
    if len(matching) == 1:
        return matching[0]
    count = f"{len(matching)} of {len(ready)} tokens match {selector}; exactly one has to"
    lines = [count, *(f"  {token}" for token in ready)]
    if blank := [str(token.slot_id) for token in present if token not in ready]:
        lines.append(f"  not initialised, not counted: slot {', '.join(blank)}")
    text = "\n".join([*lines, _advice(matching or ready)])
    raise TokenSelectionError(text, absent=not matching)


def selector_from(settings: Mapping[str, Any], uri: Pkcs11Uri | None = None) -> TokenSelector:
    """Make a selector of plain settings (:data:`SETTING_NAMES`), a URI, or both.

    The URI's object attributes (``object``, ``type``, ``id``) say nothing of the token.

    Raises:
        ConfigurationError: Both name the same thing differently, or the URI selects by slot or
            library attributes, which are not known here and must not be passed over.
    """
    from_uri = _uri_selection(uri) if uri else {}
    return TokenSelector(
        **{
            name: _agreed(setting, settings.get(setting), from_uri.get(name))
            for name, setting in SETTING_NAMES.items()
        }
    )


_UNUSABLE = (
    "library_manufacturer",
    "library_description",
    "library_version",
    "slot_manufacturer",
    "slot_description",
)


def _uri_selection(uri: Pkcs11Uri) -> dict[str, str | int | None]:
    if unusable := [name for name in _UNUSABLE if getattr(uri, name) is not None]:
        listed = ", ".join(unusable).replace("_", "-")
        raise ConfigurationError(
            f"PKCS#11 URI: tokens are not selected by {listed}; use token, serial or slot-id"
        )
    return {
        "label": uri.token,
        "serial": uri.serial,
        "slot_id": uri.slot_id,
        "manufacturer": uri.manufacturer,
        "model": uri.model,
    }


def _agreed(setting: str, plain: Any, from_uri: Any) -> Any:
    if plain is None or from_uri is None:
        return from_uri if plain is None else plain
    if _plain(plain) != _plain(from_uri):
        raise ConfigurationError(
            f"{setting} is {plain!r}, but the PKCS#11 URI says {from_uri!r}; give one of them"
        )
    return plain


# Slot ids come last: some modules renumber their slots.
_TELLING = ("serial", "label", "slot_id")


def _advice(tokens: Sequence[TokenDescription]) -> str:
    settings = [SETTING_NAMES[name] for name in _TELLING if _differs(name, tokens)]
    return f"set one of: {', '.join(settings)}" if tokens else "no initialised token is present"


def _differs(name: str, tokens: Sequence[TokenDescription]) -> bool:
    return len({_plain(getattr(token, name)) for token in tokens}) == len(tokens)


def _plain(value: Any) -> Any:
    return value.rstrip(" \0") if isinstance(value, str) else value


def find_token(module: Module, selector: TokenSelector) -> Token:
    """The one HSM token that matches.

    Raises:
        TokenSelectionError: None or several match.
        PKCS11Error: The module does not answer.
    """
    present = {t.slot.slot_id: t for t in _tokens_of(module)}
    chosen = select(selector, [_describe(token) for token in present.values()])
    return present[chosen.slot_id]


def _tokens_of(module: Module) -> list[Token]:
    tokens = []
    for slot in module.get_slots(token_present=True):
        try:
            tokens.append(slot.get_token())
        except (TokenNotPresent, TokenNotRecognised):
            continue  # pulled between the two calls
    return tokens


def _describe(token: Token) -> TokenDescription:
    return TokenDescription(
        slot_id=token.slot.slot_id,
        label=token.label,
        serial=token.serial.decode("utf-8", "replace"),
        manufacturer=token.manufacturer_id,
        model=token.model,
        # Not every module sets the flag, and some tokens are ready without a label.
        initialised=bool(token.flags & TokenFlag.TOKEN_INITIALIZED or _plain(token.label)),
    )
