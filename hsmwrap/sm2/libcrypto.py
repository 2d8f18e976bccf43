"""The production SM2 engine: the distribution's OpenSSL 3 libcrypto through ctypes.

ctypes releases the GIL during calls. Calls share nothing: each makes its own objects and frees
them on every path, so threads need no lock here; a fork waits for running calls.

Ciphertexts reach libcrypto as minimal DER that is rebuilt from a checked :class:`Sm2Ciphertext`,
because its own parser also takes trailing bytes, BER lengths, padded INTEGERs and x + p (measured).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from types import MappingProxyType
from typing import Any, ClassVar, Final

from hsmwrap.errors import ConfigurationError, HsmwrapError, InvalidKeyMaterial
from hsmwrap.forkgate import LIBCRYPTO
from hsmwrap.sm2.curve import FIELD_BYTES, POINT_BYTES, decode_point
from hsmwrap.sm2.engine import Sm2Engine, Sm2KeyPair
from hsmwrap.sm2.formats import Layout, Sm2Ciphertext, parse

# Not ctypes.util.find_library: it needs gcc or binutils, which a server does not have.
_SONAME: Final = "libcrypto.so.3"
_ALGORITHM: Final = b"SM2"
_ADVICE: Final = "for development only, the SM2 engine gmssl can be configured by name"

# openssl/core.h, openssl/evp.h
_UNSIGNED_INTEGER, _UTF8_STRING, _OCTET_STRING = 2, 4, 5
_PUBLIC_KEY, _KEYPAIR = 0x86, 0x87

# More than all of the DER that is not C2: two INTEGERs of 33 bytes, 32 bytes of hash, headers.
_DER_OVERHEAD: Final = 128


class _Param(ctypes.Structure):
    """OSSL_PARAM (openssl/core.h)."""

    _fields_: ClassVar = [
        ("key", c_char_p),
        ("data_type", c_uint),
        ("data", c_void_p),
        ("data_size", c_size_t),
        ("return_size", c_size_t),
    ]


_TRANSFORM = (c_int, c_void_p, c_void_p, POINTER(c_size_t), c_void_p, c_size_t)

_PROTOTYPES: Final[Mapping[str, tuple[Any, ...]]] = MappingProxyType(
    {  # function: result, *arguments
        "BN_bn2binpad": (c_int, c_void_p, c_void_p, c_int),
        "BN_clear_free": (None, c_void_p),
        "ERR_clear_error": (None,),
        "EVP_PKEY_CTX_free": (None, c_void_p),
        "EVP_PKEY_CTX_new_from_name": (c_void_p, c_void_p, c_char_p, c_char_p),
        "EVP_PKEY_CTX_new_from_pkey": (c_void_p, c_void_p, c_void_p, c_char_p),
        "EVP_PKEY_check": (c_int, c_void_p),
        "EVP_PKEY_decrypt": _TRANSFORM,
        "EVP_PKEY_decrypt_init": (c_int, c_void_p),
        "EVP_PKEY_encrypt": _TRANSFORM,
        "EVP_PKEY_encrypt_init": (c_int, c_void_p),
        "EVP_PKEY_free": (None, c_void_p),
        "EVP_PKEY_fromdata": (c_int, c_void_p, POINTER(c_void_p), c_int, POINTER(_Param)),
        "EVP_PKEY_fromdata_init": (c_int, c_void_p),
        "EVP_PKEY_generate": (c_int, c_void_p, POINTER(c_void_p)),
        "EVP_PKEY_get_bn_param": (c_int, c_void_p, c_char_p, POINTER(c_void_p)),
        "EVP_PKEY_get_octet_string_param": (
            *(c_int, c_void_p, c_char_p),
            *(c_void_p, c_size_t, POINTER(c_size_t)),
        ),
        "EVP_PKEY_keygen_init": (c_int, c_void_p),
        "OpenSSL_version": (c_char_p, c_int),
    }
)


def _raise_on_failure(result: int | None, function: Any, _arguments: Any) -> int:
    """Every OpenSSL function here answers a positive number or a pointer if all is well."""
    if result is None or result <= 0:
        raise HsmwrapError(f"libcrypto: {function.__name__} failed")
    return result


def _load() -> ctypes.CDLL:
    """Load libcrypto with every prototype declared and every failure made an exception."""
    try:
        lib = ctypes.CDLL(_SONAME)
        for name, (result, *arguments) in _PROTOTYPES.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
            if result in (c_int, c_void_p):
                function.errcheck = _raise_on_failure
    except (OSError, AttributeError) as error:
        raise ConfigurationError(
            f"SM2 needs the distribution's OpenSSL 3 ({error}); {_ADVICE}"
        ) from error
    return lib


class _Scope(ExitStack):
    """What one call made: freed at its end, buffers wiped, the thread's error queue emptied."""

    def __init__(self, lib: ctypes.CDLL) -> None:
        super().__init__()
        self.enter_context(LIBCRYPTO.passing())
        self.callback(lib.ERR_clear_error)

    def own(self, pointer: int, free: Callable[[int], None]) -> int:
        """Free this object at the end."""
        self.callback(free, pointer)
        return pointer

    def out(self, free: Callable[[c_void_p], None]) -> c_void_p:
        """A place for a pointer that a function will store; freed at the end, NULL or not."""
        pointer = c_void_p()
        self.callback(free, pointer)
        return pointer

    def buffer(self, size: int, content: bytes = b"") -> ctypes.Array[ctypes.c_char]:
        """Memory that stays valid until the end and is wiped then."""
        buffer = ctypes.create_string_buffer(content, size)
        self.callback(ctypes.memset, buffer, 0, size)
        return buffer


class LibcryptoEngine(Sm2Engine):
    """SM2 by libcrypto.

    Raises:
        ConfigurationError: libcrypto is not there, too old, or built without SM2.
    """

    name = "libcrypto"
    production = True

    def __init__(self) -> None:
        self._lib = _load()
        try:
            with self._scope() as scope:
                self._context_by_name(scope)
        except HsmwrapError:
            version = self._lib.OpenSSL_version(0).decode()
            raise ConfigurationError(f"{_SONAME} ({version}) has no SM2; {_ADVICE}") from None

    def generate(self) -> Sm2KeyPair:
        """Make a fresh key pair (libcrypto's private random generator)."""
        with self._scope() as scope:
            context, key = self._context_by_name(scope), scope.out(self._lib.EVP_PKEY_free)
            self._lib.EVP_PKEY_keygen_init(context)
            self._lib.EVP_PKEY_generate(context, byref(key))
            return Sm2KeyPair(self._private(scope, key), self._public(scope, key))

    def encrypt(self, public: bytes, plaintext: bytes) -> Sm2Ciphertext:
        """Encrypt to a public key; see :meth:`Sm2Engine.encrypt`."""
        if not plaintext:
            raise ValueError("SM2 encrypts no empty message")
        with self._scope() as scope:
            context = self._context(scope, self._import_key(scope, public))
            self._lib.EVP_PKEY_encrypt_init(context)
            capacity = len(plaintext) + _DER_OVERHEAD
            der = self._run(scope, self._lib.EVP_PKEY_encrypt, context, plaintext, capacity)
        return parse(der, len(plaintext), [Layout.DER])

    def decrypt(self, private: bytes, public: bytes, ciphertext: Sm2Ciphertext) -> bytes:
        """Decrypt with a key pair that is checked first; see :meth:`Sm2Engine.decrypt`."""
        try:
            with self._scope() as scope:
                context = self._context(scope, self._import_key(scope, public, private))
                # fromdata alone takes d = 0, n-1 and n, and a public key of another pair.
                self._lib.EVP_PKEY_check(context)
                self._lib.EVP_PKEY_decrypt_init(context)
                der = ciphertext.to_der()
                # OpenSSL's own estimate was once too small (CVE-2021-3711); this never is.
                plaintext = self._run(scope, self._lib.EVP_PKEY_decrypt, context, der, len(der))
        except (HsmwrapError, ValueError):
            raise InvalidKeyMaterial from None
        if len(plaintext) != len(ciphertext.c2):
            raise InvalidKeyMaterial
        return plaintext

    def _scope(self) -> _Scope:
        return _Scope(self._lib)

    def _context_by_name(self, scope: _Scope) -> int:
        context = self._lib.EVP_PKEY_CTX_new_from_name(None, _ALGORITHM, None)
        return scope.own(context, self._lib.EVP_PKEY_CTX_free)

    def _context(self, scope: _Scope, key: c_void_p) -> int:
        context = self._lib.EVP_PKEY_CTX_new_from_pkey(None, key, None)
        return scope.own(context, self._lib.EVP_PKEY_CTX_free)

    def _import_key(self, scope: _Scope, public: bytes, private: bytes | None = None) -> c_void_p:
        """Make an EVP_PKEY of raw bytes. ValueError: ``public`` is no point of the curve."""
        decode_point(public)
        fields = [(b"group", _UTF8_STRING, _ALGORITHM), (b"pub", _OCTET_STRING, public)]
        if private is not None:
            native = private if sys.byteorder == "big" else private[::-1]
            fields.append((b"priv", _UNSIGNED_INTEGER, native))
        params = (_Param * (len(fields) + 1))()  # the last one, all zero, ends the list
        for param, (name, kind, data) in zip(params, fields, strict=False):
            memory = ctypes.addressof(scope.buffer(len(data), data))
            param.key, param.data_type, param.data, param.data_size = name, kind, memory, len(data)
        context, key = self._context_by_name(scope), scope.out(self._lib.EVP_PKEY_free)
        self._lib.EVP_PKEY_fromdata_init(context)
        selection = _PUBLIC_KEY if private is None else _KEYPAIR
        self._lib.EVP_PKEY_fromdata(context, byref(key), selection, params)
        return key

    @staticmethod
    def _run(
        scope: _Scope, function: Callable[..., int], context: int, data: bytes, capacity: int
    ) -> bytes:
        """Call EVP_PKEY_encrypt or EVP_PKEY_decrypt with an output buffer of ``capacity`` bytes."""
        output, length = scope.buffer(capacity), c_size_t(capacity)
        function(context, output, byref(length), data, len(data))
        return ctypes.string_at(output, length.value)

    def _private(self, scope: _Scope, key: c_void_p) -> bytes:
        number, output = scope.out(self._lib.BN_clear_free), scope.buffer(FIELD_BYTES)
        self._lib.EVP_PKEY_get_bn_param(key, b"priv", byref(number))
        self._lib.BN_bn2binpad(number, output, FIELD_BYTES)
        return output.raw

    def _public(self, scope: _Scope, key: c_void_p) -> bytes:
        output, length = scope.buffer(POINT_BYTES), c_size_t()
        self._lib.EVP_PKEY_get_octet_string_param(key, b"pub", output, POINT_BYTES, byref(length))
        decode_point(output.raw)
        return output.raw
