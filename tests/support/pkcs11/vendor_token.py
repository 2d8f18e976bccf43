"""An HSM token with a vendor's SM2, as python-pkcs11 would show it: records every call.

Nothing of it is real but the SM2 arithmetic; it holds to the templates: a key decrypts only if it
was made with CKA_DECRYPT, and a key-encryption key with CKA_UNWRAP_TEMPLATE unwraps only what
agrees with it, attribute by attribute.
"""

import ctypes
import itertools

from pkcs11.constants import DEFAULT, Attribute
from pkcs11.exceptions import (
    EncryptedDataInvalid,
    MechanismInvalid,
    PKCS11Error,
    TemplateInconsistent,
)
from pkcs11.mechanisms import KeyType, Mechanism

from hsmwrap.pkcs11.binding.templates import CkAttribute, HsmAttributeMapper
from hsmwrap.pkcs11.sessions.session import PooledSession
from hsmwrap.sm2 import open_engine, parse

MAPPER = HsmAttributeMapper()
SIZE = ctypes.sizeof(CkAttribute)


def packed(template):
    """As the HSM token gets it; DEFAULT leaves an attribute out."""
    return {
        Attribute(name): MAPPER.pack_attribute(name, value)
        for name, value in template.items()
        if value is not DEFAULT
    }


def rows(nested):
    """What CKA_UNWRAP_TEMPLATE points to."""
    for start in range(0, len(nested), SIZE):
        row = CkAttribute.from_buffer_copy(nested[start : start + SIZE])
        yield Attribute(row.type), ctypes.string_at(row.value, row.length)


class Key:
    """An object: its attributes in bytes, and for SM2 its key pair."""

    numbers = itertools.count(1)

    def __init__(self, token, template, pair=None):
        self.token, self.pair = token, pair
        self.handle = next(self.numbers)
        # CKA_UNWRAP_TEMPLATE points into the caller's memory, which is gone later.
        self.nested = dict(rows(template.get(Attribute.UNWRAP_TEMPLATE, b"")))
        self.told = template

    def __getitem__(self, name):
        return MAPPER.unpack_attributes(name, self.told[name])

    def get_attributes(self, names):
        return {name: self[name] for name in names if name in self.told}

    @property
    def key_type(self):
        return self[Attribute.KEY_TYPE]

    def destroy(self):
        self.token.objects.remove(self)

    def wrap_key(self, key, *, mechanism):
        self.token.calls.append(("wrap", mechanism))
        assert self[Attribute.WRAP]
        assert key[Attribute.EXTRACTABLE]
        self.token.wrapped.append(key.pair)
        return b"blob%d" % (len(self.token.wrapped) - 1)

    def unwrap_key(self, *, key_data, mechanism, object_class, key_type, store, template, **_more):
        self.token.calls.append(("unwrap", mechanism))
        assert self[Attribute.UNWRAP]
        named = {Attribute.CLASS: object_class, Attribute.KEY_TYPE: key_type}
        asked = packed({**named, Attribute.TOKEN: store, **template})
        if any(asked.get(name) != value for name, value in self.nested.items()):
            raise TemplateInconsistent
        return self.token.keep(asked, self.token.wrapped[int(key_data.removeprefix(b"blob"))])

    def decrypt(self, data, *, mechanism):
        self.token.calls.append(("decrypt", mechanism))
        if mechanism != self.token.vendor.decrypt:
            raise MechanismInvalid
        if not self[Attribute.DECRYPT]:
            raise PKCS11Error("Unmapped error code 0x68")  # CKR_KEY_FUNCTION_NOT_PERMITTED
        try:
            parsed = parse(data, self.token.material_length, (self.token.vendor.ciphertext,))
            return open_engine("libcrypto").decrypt(self.pair.private, self.pair.public, parsed)
        except Exception:
            raise EncryptedDataInvalid from None


class VendorToken:
    """A session of such a token. ``calls`` are (function, mechanism or key type)."""

    material_length = 32

    def __init__(self, vendor):
        self.vendor = vendor
        self.objects, self.calls, self.wrapped = [], [], []

    def pooled(self):
        return PooledSession(self, lambda _session: True)

    def keep(self, template, pair=None):
        self.objects.append(Key(self, template, pair))
        return self.objects[-1]

    def get_objects(self, wanted):
        asked = packed(wanted).items()
        return [key for key in self.objects if asked <= key.told.items()]

    def generate_key(self, _key_type, _bits, *, store=False, template=None, **_more):
        if not store:
            raise MechanismInvalid  # keys that only show what the token says of a key's origin
        return self.keep(packed(template))

    def generate_keypair(
        self, key_type, *, capabilities, mechanism, public_template, private_template
    ):
        self.calls.append(("generate", mechanism))
        expected = self.vendor.generate or Mechanism.EC_KEY_PAIR_GEN
        if mechanism != expected or key_type != (self.vendor.key_type or KeyType.EC):
            raise MechanismInvalid
        assert not capabilities
        pair = open_engine("libcrypto").generate()
        point = b"\x04\x41" + pair.public
        public = self.keep(packed({**public_template, Attribute.EC_POINT: point}), pair)
        return public, self.keep(packed(private_template), pair)
