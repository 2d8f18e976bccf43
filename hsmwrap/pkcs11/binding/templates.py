"""Object templates: what each kind of object may be used for, as data.

Attributes are spelled out, false ones too: SoftHSM compares an unwrap with the key-encryption
key's CKA_UNWRAP_TEMPLATE attribute by attribute, and one that is left out is a mismatch
(field note 31).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Container, Iterable, Mapping
from enum import IntEnum
from functools import partial
from types import MappingProxyType
from typing import Any

from pkcs11.attributes import AttributeMapper
from pkcs11.constants import DEFAULT, Attribute, ObjectClass
from pkcs11.mechanisms import KeyType, Mechanism

Template = dict[Attribute, Any]


class CkAttribute(ctypes.Structure):
    """CK_ATTRIBUTE (PKCS#11 v2.40, 3.4)."""

    _fields_ = (
        ("type", ctypes.c_ulong),
        ("value", ctypes.c_void_p),
        ("length", ctypes.c_ulong),
    )


class NestedTemplate:
    """A template as the value of an attribute: an array of CK_ATTRIBUTE.

    The array holds pointers into this object: keep it, with the template that it is in, for as
    long as that is in use.
    """

    def __init__(self, template: Template) -> None:
        """Pack ``template`` once."""
        mapper = AttributeMapper()
        values = {key: mapper.pack_attribute(key, value) for key, value in template.items()}
        self._buffers = [ctypes.create_string_buffer(v, len(v)) for v in values.values()]
        entries = (
            CkAttribute(int(key), ctypes.addressof(buffer), len(buffer))
            for key, buffer in zip(values, self._buffers, strict=True)
        )
        self.packed = bytes((CkAttribute * len(values))(*entries))


def _pack_mechanisms(mechanisms: Iterable[int]) -> bytes:
    values = [int(m) for m in mechanisms]
    return bytes((ctypes.c_ulong * len(values))(*values))


def _unpack_mechanisms(packed: bytes) -> tuple[int, ...]:
    return tuple(memoryview(packed).cast("L"))


def _unpack_member(kind: type[IntEnum], packed: bytes) -> int:
    number = int.from_bytes(packed, sys.byteorder)
    try:
        return kind(number)
    except ValueError:
        return number  # a vendor's own, or CK_UNAVAILABLE_INFORMATION


_NUMBERS: Mapping[Attribute, type[IntEnum]] = MappingProxyType(
    {Attribute.KEY_TYPE: KeyType, Attribute.KEY_GEN_MECHANISM: Mechanism}
)


class HsmAttributeMapper(AttributeMapper):
    """python-pkcs11's attribute packing, and the array attributes that it leaves out."""

    def __init__(self) -> None:
        super().__init__()
        # Other applications' labels need not be UTF-8, and must not stop a search.
        self.register_handler(
            Attribute.LABEL, str.encode, partial(str, encoding="utf-8", errors="replace")
        )
        # Nor must keys of a vendor's own type, or of no mechanism; the number compares like any.
        for attribute, kind in _NUMBERS.items():
            pack, _ = self.attribute_types[attribute]
            self.register_handler(attribute, pack, partial(_unpack_member, kind))
        for nested in (Attribute.UNWRAP_TEMPLATE, Attribute.WRAP_TEMPLATE):
            self.register_handler(nested, lambda t: t.packed, bytes)
        self.register_handler(Attribute.ALLOWED_MECHANISMS, _pack_mechanisms, _unpack_mechanisms)


USES = (
    Attribute.ENCRYPT,
    Attribute.DECRYPT,
    Attribute.SIGN,
    Attribute.VERIFY,
    Attribute.WRAP,
    Attribute.UNWRAP,
    Attribute.DERIVE,
)
"""What a key may be used for; each is spelled out in every template."""
_PUBLIC_USES = frozenset({Attribute.ENCRYPT, Attribute.VERIFY, Attribute.WRAP})
_PRIVATE_USES = frozenset(USES) - _PUBLIC_USES


def _uses(possible: Iterable[Attribute], allowed: Iterable[Attribute]) -> Template:
    granted = frozenset(allowed)
    return {use: use in granted for use in USES if use in frozenset(possible)}


_FIXED: Template = {Attribute.COPYABLE: False, Attribute.MODIFIABLE: False}


def secret_key(key_type: KeyType, *uses: Attribute, extractable: bool = False) -> Template:
    """A private, sensitive session secret key that allows ``uses`` and no more, for ever."""
    return {
        Attribute.CLASS: ObjectClass.SECRET_KEY,
        Attribute.KEY_TYPE: key_type,
        Attribute.TOKEN: False,
        Attribute.PRIVATE: True,
        Attribute.SENSITIVE: True,
        Attribute.EXTRACTABLE: extractable,
        **_FIXED,
        **_uses(USES, uses),
    }


def private_key(key_type: KeyType, *uses: Attribute, extractable: bool = False) -> Template:
    """A private, sensitive session private key that allows ``uses`` and no more, for ever."""
    return {
        Attribute.CLASS: ObjectClass.PRIVATE_KEY,
        Attribute.KEY_TYPE: key_type,
        Attribute.TOKEN: False,
        Attribute.PRIVATE: True,
        Attribute.SENSITIVE: True,
        Attribute.EXTRACTABLE: extractable,
        **_FIXED,
        **_uses(_PRIVATE_USES, uses),
    }


def stored(template: Mapping[Attribute, Any], object_id: bytes, label: str) -> Template:
    """The same key as a token object with a name."""
    return {
        **template,
        Attribute.TOKEN: True,
        Attribute.ID: object_id,
        Attribute.LABEL: label,
    }


def without(template: Mapping[Attribute, Any], refused: Container[Attribute]) -> Template:
    """The same template for an HSM token that does not know the attributes in ``refused``."""
    return {key: value for key, value in template.items() if key not in refused}


def for_unwrap(template: Mapping[Attribute, Any]) -> dict[str, Any]:
    """Arguments for python-pkcs11's ``unwrap_key`` that send exactly ``template``.

    python-pkcs11 adds every use of a secret key to the template, which is wrong for a private
    key (field note 7); DEFAULT takes them out again. CKA_MODIFIABLE goes last: SoftHSM applies
    an unwrap's template in its order, and after MODIFIABLE = false refuses the rest (field
    note 30).
    """
    absent: Template = {use: DEFAULT for use in USES if use not in template}
    ordered = {**absent, **template}
    if Attribute.MODIFIABLE in ordered:
        ordered[Attribute.MODIFIABLE] = ordered.pop(Attribute.MODIFIABLE)
    return {
        "object_class": template[Attribute.CLASS],
        "key_type": template[Attribute.KEY_TYPE],
        "store": template[Attribute.TOKEN],
        "capabilities": 0,
        "template": ordered,
    }


AES_KEY_WRAP = Mechanism.AES_KEY_WRAP_PAD
"""AES key wrap with padding where nothing else is known: :data:`.traits.AES`."""
