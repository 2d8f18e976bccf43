"""PKCS#11 URIs (RFC 7512): read, written without the PIN, and masked for logs.

Read strictly by the ABNF of section 2.3. What the RFC leaves to the reader:

* An attribute in the path that is not known restricts the selection in a way not understood here;
  section 2.5 wants it to match nothing, so it is refused. An unknown (vendor) attribute in the
  query is ignored, also when it is repeated (sections 2.4 and 2.5).
* A path attribute in the query, or the reverse, is formally a vendor attribute. It is refused: as
  one, ``?token=A`` would be ignored and select any token, and a PIN in the path gets printed.
* Names are compared without case, as ABNF literals are (RFC 5234 section 2.3).
* ``pin-source`` beside ``pin-value``, and a relative ``module-path``, are refused (section 2.4).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NoReturn
from urllib.parse import quote_from_bytes, unquote_to_bytes

from hsmwrap.errors import ConfigurationError, strip_tracebacks
from hsmwrap.pkcs11.token.pin import Pin, checked_pin

_SCHEME = "pkcs11:"
_MASK = "***"
_MAX_SLOT_ID = 2**64 - 1
_MAX_VERSION_PART = 255


@dataclass(frozen=True, slots=True)
class Pkcs11Uri:
    """The attributes of a ``pkcs11:`` URI, percent-decoded; None: not given.

    ``str()`` is :meth:`to_uri`, so it never shows a PIN; nor does ``repr()``.

    Attributes:
        token: Label of the token.
        manufacturer: Manufacturer of the token.
        serial: Serial number of the token.
        model: Model of the token.
        library_manufacturer: Manufacturer of the module.
        library_description: Description of the module.
        library_version: Major and minor version of the module, each 0 to 255.
        object: Label of an object.
        type: Class of an object: public, private, cert, secret-key or data.
        id: CKA_ID of an object, raw bytes.
        slot_manufacturer: Manufacturer of the slot.
        slot_description: Description of the slot.
        slot_id: Slot number.
        module_name: Name of the module without prefix and suffix.
        module_path: Absolute path of the module.
        pin_source: Where the PIN is, see :func:`hsmwrap.pkcs11.token.pin.from_pin_source`.
        pin_value: The PIN, where that was allowed.
    """

    token: str | None = None
    manufacturer: str | None = None
    serial: str | None = None
    model: str | None = None
    library_manufacturer: str | None = None
    library_description: str | None = None
    library_version: tuple[int, int] | None = None
    object: str | None = None
    type: str | None = None
    id: bytes | None = None
    slot_manufacturer: str | None = None
    slot_description: str | None = None
    slot_id: int | None = None
    module_name: str | None = None
    module_path: str | None = None
    pin_source: str | None = field(default=None, repr=False)
    pin_value: Pin | None = field(default=None, repr=False, hash=False)

    def __str__(self) -> str:
        return self.to_uri()

    def to_uri(self) -> str:
        """Write the URI, attributes in a fixed order, without the PIN attributes."""
        path, query = _PATH.write(self), _QUERY.write(self)
        return f"{_SCHEME}{path}?{query}" if query else f"{_SCHEME}{path}"

    def pin_settings(self) -> dict[str, Any]:
        """The PIN attributes, as :func:`hsmwrap.pkcs11.token.pin.from_settings` takes them."""
        given = {"pin-source": self.pin_source, "pin-value": self.pin_value}
        return {name: value for name, value in given.items() if value is not None}


@strip_tracebacks
def parse(uri: str, *, allow_pin_value: bool = False) -> Pkcs11Uri:
    """Read a ``pkcs11:`` URI.

    Raises:
        ConfigurationError: It is not one, or holds a ``pin-value`` that was not allowed. The text
            gives the position (in characters, from 1) and the attribute at fault, no values.
    """
    if uri[: len(_SCHEME)].lower() != _SCHEME:
        _refuse(0, f"a PKCS#11 URI starts with {_SCHEME}")
    path, mark, _ = uri.partition("?")
    attributes = [
        *_PATH.read(path, len(_SCHEME)),
        *(_QUERY.read(uri, len(path) + 1) if mark else ()),
    ]
    values: dict[str, Any] = {}
    for attribute in attributes:
        if attribute.name in values:
            attribute.refuse("is given twice")
        values[attribute.name] = attribute.value(allow_pin_value=allow_pin_value)
    if {"pin-source", "pin-value"} <= values.keys():
        _refuse(len(path) + 1, "pin-source and pin-value exclude each other")
    return Pkcs11Uri(**{name.replace("-", "_"): value for name, value in values.items()})


def redact(uri: str) -> str:
    """Make any string loggable that was given as a URI, well-formed or not.

    Only known attributes with well-formed values stay. The values of ``pin-source`` (a command in
    it may hold the PIN) and ``pin-value`` are masked, and so is every part that is not understood:
    it may be the rest of a PIN whose ``&`` was not encoded.
    """
    if uri[: len(_SCHEME)].lower() != _SCHEME:
        return _MASK
    path, mark, query = uri[len(_SCHEME) :].partition("?")
    return _SCHEME + _PATH.redact(path) + mark + _QUERY.redact(query)


def _refuse(position: int, detail: str) -> NoReturn:
    raise ConfigurationError(f"PKCS#11 URI, character {position + 1}: {detail}")


@dataclass(frozen=True, slots=True)
class _Kind:
    """How the values of an attribute are read and written; ``read`` gives None for bad ones."""

    takes: str
    read: Callable[[str], Any]
    write: Callable[[Any, str], str]


def _read_text(raw: str) -> str | None:
    try:
        return unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        # It holds the bytes, a PIN's perhaps: must not become an error's __context__.
        return None


def _read_path(raw: str) -> str | None:
    text = _read_text(raw)
    return text if text and text.startswith("/") else None


def _read_number(raw: str, limit: int = _MAX_SLOT_ID) -> int | None:
    number = int(raw) if re.fullmatch(r"[0-9]{1,20}", raw) else None
    return number if number is not None and number <= limit else None


def _read_version(raw: str) -> tuple[int, int] | None:
    major, dot, minor = raw.partition(".")
    parts = [_read_number(part, _MAX_VERSION_PART) for part in (major, minor if dot else "0")]
    return None if parts[0] is None or parts[1] is None else (parts[0], parts[1])


def _read_type(raw: str) -> str | None:
    return raw.lower() if raw.lower() in _OBJECT_TYPES else None


def _write_text(value: str, safe: str) -> str:
    return quote_from_bytes(value.encode(), safe)


def _write_id(value: bytes, _safe: str) -> str:
    # Section 2.3: the whole value should be percent-encoded.
    return "".join(f"%{byte:02X}" for byte in value)


_OBJECT_TYPES = ("public", "private", "cert", "secret-key", "data")
_TEXT = _Kind("UTF-8 text", _read_text, _write_text)
_ABSOLUTE_PATH = _Kind("an absolute path", _read_path, _write_text)
_ID = _Kind("bytes", unquote_to_bytes, _write_id)
_NUMBER = _Kind("a number that fits 64 bits", _read_number, lambda value, _: str(value))
_VERSION = _Kind(
    "a version, M or M.N, each up to 255",
    _read_version,
    lambda value, _: f"{value[0]}.{value[1]}",
)
_TYPE = _Kind(f"one of {', '.join(_OBJECT_TYPES)}", _read_type, lambda value, _: str(value))


@dataclass(frozen=True, slots=True)
class _Attribute:
    """One ``name=value`` of a URI whose characters are all allowed where it stands."""

    name: str
    raw: str = field(repr=False)
    position: int
    kind: _Kind

    def refuse(self, detail: str) -> NoReturn:
        _refuse(self.position, f"{self.name} {detail}")

    def value(self, *, allow_pin_value: bool) -> Any:
        if self.name == "pin-value" and not allow_pin_value:
            self.refuse(
                "is refused, as URIs end up in logs and process lists: use pin-source or one of "
                "the pin_ settings, or set allow_pin_value"
            )
        value = self.kind.read(self.raw)
        if value is None:
            self.refuse(f"takes {self.kind.takes}")
        return checked_pin(value, self.name) if self.name == "pin-value" else value


@dataclass(frozen=True, slots=True)
class _Component:
    """The path or the query.

    Attributes:
        title: Its name.
        separator: Stands between attributes.
        safe: Characters that stand unencoded in values, besides the unreserved ones of RFC 3986.
        kinds: Its attributes.
        foreign: Names of the other component's attributes.
        vendor: Whether unknown attributes are ignored.
    """

    title: str
    separator: str
    safe: str
    kinds: Mapping[str, _Kind]
    foreign: Collection[str]
    vendor: bool

    def read(self, uri: str, start: int) -> Iterator[_Attribute]:
        """The known attributes in ``uri`` from ``start`` on."""
        text, position = uri[start:], start
        for part in text.split(self.separator) if text else ():
            yield from self._read_one(part, position)
            position += len(part) + len(self.separator)

    def write(self, uri: Pkcs11Uri) -> str:
        """The attributes that are set, PIN attributes left out."""
        # Encoded in both, though the ABNF does not ask for it: see _STRAY_PIN.
        safe = self.safe.replace("&", "").replace("?", "")
        values = {name: getattr(uri, name.replace("-", "_")) for name in self.kinds}
        return self.separator.join(
            f"{name}={self.kinds[name].write(value, safe)}"
            for name, value in values.items()
            if value is not None and name not in _PIN_ATTRIBUTES
        )

    def redact(self, text: str) -> str:
        """Mask all but well-formed values of known attributes other than the PIN attributes."""
        return self.separator.join(map(self._redact_one, text.split(self.separator)))

    def _read_one(self, part: str, position: int) -> Iterator[_Attribute]:
        name, equals, raw = part.partition("=")
        # Not repeated in the error: behind a PIN with a bare & in it, this is the rest of the PIN.
        if not equals or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            _refuse(position, f"the {self.title} takes name=value here")
        name = name.lower()
        if name in self.foreign:
            _refuse(position, f"{name} does not belong in the {self.title}")
        if stray := _STRAY_PIN.search(raw):
            at = position + len(part) - len(raw) + stray.start()
            _refuse(at, "a PIN attribute stands in the query, between & signs")
        if rest := self._disallowed(raw):
            at = position + len(part) - len(rest)
            _refuse(at, f"this character of {name} has to be percent-encoded")
        if name in self.kinds:
            yield _Attribute(name, raw, position, self.kinds[name])
        elif not self.vendor:
            _refuse(position, f"the {self.title} has no attribute {name}")

    def _redact_one(self, part: str) -> str:
        name, _, raw = part.partition("=")
        if name.lower() in _PIN_ATTRIBUTES:
            return f"{name}={_MASK}"
        known = name.lower() in self.kinds
        plain = known and not self._disallowed(raw) and not _STRAY_PIN.search(raw)
        return part if plain or not part else _MASK

    def _disallowed(self, raw: str) -> str:
        """What is left of ``raw`` from the first character on that may not stand there."""
        safe = re.escape(self.safe)
        return re.sub(rf"\A(?:[A-Za-z0-9._~{safe}-]|%[0-9A-Fa-f]{{2}})*", "", raw)


_PATH_KINDS: Mapping[str, _Kind] = MappingProxyType(
    {
        "token": _TEXT,
        "manufacturer": _TEXT,
        "serial": _TEXT,
        "model": _TEXT,
        "library-manufacturer": _TEXT,
        "library-description": _TEXT,
        "library-version": _VERSION,
        "object": _TEXT,
        "type": _TYPE,
        "id": _ID,
        "slot-manufacturer": _TEXT,
        "slot-description": _TEXT,
        "slot-id": _NUMBER,
    }
)
_QUERY_KINDS: Mapping[str, _Kind] = MappingProxyType(
    {
        "module-name": _TEXT,
        "module-path": _ABSOLUTE_PATH,
        "pin-source": _TEXT,
        "pin-value": _TEXT,
    }
)
_PIN_ATTRIBUTES = frozenset({"pin-source", "pin-value"})
# By the ABNF, pkcs11:token=A&pin-value=1 is a label with an & in it, ready to be printed.
_STRAY_PIN = re.compile(r"[&;?]pin-(?:source|value)=", re.IGNORECASE)
# pk11-res-avail of section 2.3; each component adds to it.
_RESERVED = ":[]@!$'()*+,="
_PATH = _Component("path", ";", _RESERVED + "&", _PATH_KINDS, _QUERY_KINDS.keys(), vendor=False)
_QUERY = _Component("query", "&", _RESERVED + "/?|", _QUERY_KINDS, _PATH_KINDS.keys(), vendor=True)
