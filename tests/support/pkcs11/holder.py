"""The holder of the PIN, who tries to read an imported key, also in its wrapped form."""

import time
from contextlib import contextmanager, suppress
from functools import partial
from itertools import product

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.keywrap import (
    InvalidUnwrap,
    aes_key_unwrap,
    aes_key_unwrap_with_padding,
)
from pkcs11.constants import Attribute, ObjectClass
from pkcs11.exceptions import PKCS11Error
from pkcs11.mechanisms import KeyType, Mechanism

from hsmwrap.backend import Custody
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.pkcs11.binding.templates import AES_KEY_WRAP, for_unwrap
from hsmwrap.pkcs11.wrapping.material import ROLE_OF, parse_key_ref
from support.pkcs11 import sm4_key_wrap
from support.pkcs11.attacker import force

_VALUE = bytes(range(32))
"""Of the holder's own wrapping key."""
_IV = bytes(16)
_READABLE = {Attribute.SENSITIVE: False, Attribute.EXTRACTABLE: True}
_DEVIATIONS = (
    {},
    _READABLE,
    {Attribute.EXTRACTABLE: True},
    {Attribute.SENSITIVE: False},
)


@contextmanager
def lent_session(backend):
    """A session of the backend's; its objects go with it."""
    pool = backend.ability(Pkcs11Backend)._connection._connector.connected.pool
    pooled = pool.acquire(time.monotonic() + 10)
    yield pooled.session
    pooled.tainted = True
    pool.release(pooled)


class Holder:
    """Has a backend's PIN and its session; calls the module as they like."""

    def __init__(self, backend):
        self._backend = backend.ability(Pkcs11Backend)
        self._made = []

    def reads(self, ref):
        """The value of an imported key, in whatever way it comes out; None if it does not."""
        return self._backend._connection.run(lambda pooled: self._read(pooled, ref))

    def _read(self, pooled, ref):
        try:
            for key in self._opened(pooled, ref):
                for each in (key, *self._weaker(key)):
                    value = _value(each) or self._wrapped(pooled.session, each)
                    if value:
                        return value
            return None
        finally:
            for key in self._made:
                with suppress(PKCS11Error):
                    key.destroy()
            self._made.clear()

    def _keep(self, key):
        self._made.append(key)
        return key

    def _opened(self, pooled, ref):
        """The object, or the sealed key unwrapped into whatever the HSM token takes."""
        number, data = parse_key_ref(ref)
        if ref.custody is Custody.HSM_INTERNAL:
            yield from pooled.find({Attribute.CLASS: ObjectClass.SECRET_KEY, Attribute.ID: data})
            return
        role = ROLE_OF[ref.key_spec]
        keys, features = self._backend._keys, self._backend._token().features
        kek = keys.require(pooled, role, number)
        key_wrap = features.key_wrap(keys.cipher_of(number))
        for of_type, deviation in product((True, False), _DEVIATIONS):
            template = self._backend._keys.unwrapped_template(role, sm4=of_type)
            becomes = features.fit({**template, **deviation})
            with suppress(PKCS11Error):
                yield self._keep(
                    kek.unwrap_key(key_data=data, mechanism=key_wrap, **for_unwrap(becomes))
                )

    def _weaker(self, key):
        """Copies and changes of it."""
        for change in (_READABLE, {Attribute.EXTRACTABLE: True}, {Attribute.SENSITIVE: False}):
            with suppress(PKCS11Error):
                yield self._keep(key.copy({Attribute.TOKEN: False, **change}))
        for attribute, value in _READABLE.items():
            with suppress(PKCS11Error):
                key[attribute] = value
        yield key

    def _wrapped(self, session, key):
        cipher = self._backend._token().features.cipher
        value = _VALUE[: cipher.length]
        own = self._keep(
            session.create_object(
                {
                    Attribute.CLASS: ObjectClass.SECRET_KEY,
                    Attribute.KEY_TYPE: cipher.key_type,
                    Attribute.TOKEN: False,
                    Attribute.WRAP: True,
                    Attribute.ENCRYPT: True,
                    Attribute.VALUE: value,
                }
            )
        )
        ways = _WAYS
        if cipher.key_type != KeyType.AES:
            by_sm4 = partial(sm4_key_wrap.unwrapped, value)
            ways = [((each, None), by_sm4) for each in cipher.key_wraps]
        for (mechanism, parameter), unwrap in ways:
            with suppress(PKCS11Error, InvalidUnwrap):
                return unwrap(
                    force(own).wrap_key(key, mechanism=mechanism, mechanism_param=parameter)
                )
        return None


def _value(key):
    with suppress(PKCS11Error):
        return key[Attribute.VALUE]
    return None


def _unwrap(blob):
    """By RFC 5649; NSS pads as PKCS#7 does."""
    try:
        return aes_key_unwrap_with_padding(_VALUE, blob)
    except InvalidUnwrap:
        return aes_key_unwrap(_VALUE, blob)


def _decrypt(mode):
    def decrypt(blob):
        decryptor = Cipher(algorithms.AES(_VALUE), mode).decryptor()
        return decryptor.update(blob) + decryptor.finalize()

    return decrypt


_WAYS = (
    ((AES_KEY_WRAP, None), _unwrap),
    ((Mechanism.AES_KEY_WRAP, None), lambda blob: aes_key_unwrap(_VALUE, blob)),
    ((Mechanism.AES_CBC_PAD, _IV), _decrypt(modes.CBC(_IV))),
    ((Mechanism.AES_ECB, None), _decrypt(modes.ECB())),  # whatever the token does
)
