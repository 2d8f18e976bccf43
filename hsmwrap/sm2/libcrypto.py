"""The production SM2 engine: the distribution's OpenSSL 3 libcrypto.

Ciphertexts reach libcrypto as minimal DER that is rebuilt from a checked :class:`Sm2Ciphertext`,
because its own parser also takes trailing bytes, BER lengths, padded INTEGERs and x + p (field note
59).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from ctypes import byref, c_size_t, c_void_p
from typing import Final

from hsmwrap.errors import (
    ConfigurationError,
    HsmwrapError,
    InvalidKeyMaterial,
    strip_tracebacks,
)
from hsmwrap.sm2.curve import FIELD_BYTES, POINT_BYTES, N, decode_point
from hsmwrap.sm2.engine import Sm2Engine, Sm2KeyPair
from hsmwrap.sm2.formats import Layout, Sm2Ciphertext, parse
from hsmwrap.sm2.openssl import ADVICE, SONAME, Param, Scope, load

_ALGORITHM: Final = b"SM2"

# openssl/core.h, openssl/evp.h
_UNSIGNED_INTEGER, _UTF8_STRING, _OCTET_STRING = 2, 4, 5
_PUBLIC_KEY, _KEYPAIR = 0x86, 0x87

# More than all of the DER that is not C2: two INTEGERs of 33 bytes, 32 bytes of hash, headers.
_DER_OVERHEAD: Final = 128


class LibcryptoEngine(Sm2Engine):
    """SM2 by libcrypto.

    Raises:
        ConfigurationError: libcrypto is not there, too old, or built without SM2.
    """

    name = "libcrypto"
    production = True

    def __init__(self) -> None:
        self._lib = load()
        try:
            with self._scope() as scope:
                self._context_by_name(scope)
        except HsmwrapError:
            version = self._lib.OpenSSL_version(0).decode()
            raise ConfigurationError(f"{SONAME} ({version}) has no SM2; {ADVICE}") from None

    @strip_tracebacks
    def generate(self) -> Sm2KeyPair:
        """Make a fresh key pair (libcrypto's private random generator), and prove it one.

        Here, where a computation that went wrong is still the engine's fault and not a client's.
        """
        with self._scope() as scope:
            context, key = self._context_by_name(scope), scope.out(self._lib.EVP_PKEY_free)
            self._lib.EVP_PKEY_keygen_init(context)
            self._lib.EVP_PKEY_generate(context, byref(key))
            self._lib.EVP_PKEY_pairwise_check(self._context(scope, key))
            return Sm2KeyPair(self._private(scope, key), self._public(scope, key))

    @strip_tracebacks
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

    @strip_tracebacks
    def decrypt(self, private: bytes, public: bytes, ciphertext: Sm2Ciphertext) -> bytes:
        """Decrypt with a key pair that is checked first; see :meth:`Sm2Engine.decrypt`."""
        return self._decrypt(private, public, ciphertext, self._lib.EVP_PKEY_check)

    @strip_tracebacks
    def decrypt_sealed(self, private: bytes, public: bytes, ciphertext: Sm2Ciphertext) -> bytes:
        """Decrypt with a key pair that :meth:`generate` has proved; see :class:`Sm2Engine`.

        EVP_PKEY_check takes 1.7 times as long as the decryption itself (field note 59). Of its
        parts, the range is checked here; the curve by :func:`decode_point`, and its order is prime,
        so every point on it has that order; that the halves belong together was proved when the
        pair was made. So libcrypto gets the scalar alone, and reads no point that it does not use.
        """
        return self._decrypt(private, public, ciphertext, None)

    def _decrypt(
        self,
        private: bytes,
        public: bytes,
        ciphertext: Sm2Ciphertext,
        check: Callable[[int], int] | None,
    ) -> bytes:
        try:
            # fromdata takes d = 0, n-1 and n, and a public key of another pair.
            if len(private) != FIELD_BYTES or not 1 <= int.from_bytes(private) <= N - 2:
                raise InvalidKeyMaterial
            decode_point(public)
            with self._scope() as scope:
                point = None if check is None else public
                context = self._context(scope, self._import_key(scope, point, private))
                if check is not None:
                    check(context)
                self._lib.EVP_PKEY_decrypt_init(context)
                der = ciphertext.to_der()
                # OpenSSL's own estimate was once too small (CVE-2021-3711); this never is.
                plaintext = self._run(scope, self._lib.EVP_PKEY_decrypt, context, der, len(der))
        except (HsmwrapError, ValueError):
            raise InvalidKeyMaterial from None
        if len(plaintext) != len(ciphertext.c2):
            raise InvalidKeyMaterial
        return plaintext

    def _scope(self) -> Scope:
        return Scope(self._lib)

    def _context_by_name(self, scope: Scope) -> int:
        context = self._lib.EVP_PKEY_CTX_new_from_name(None, _ALGORITHM, None)
        return scope.own(context, self._lib.EVP_PKEY_CTX_free)

    def _context(self, scope: Scope, key: c_void_p) -> int:
        context = self._lib.EVP_PKEY_CTX_new_from_pkey(None, key, None)
        return scope.own(context, self._lib.EVP_PKEY_CTX_free)

    def _import_key(
        self, scope: Scope, public: bytes | None, private: bytes | None = None
    ) -> c_void_p:
        """Make an EVP_PKEY of raw bytes. ValueError: ``public`` is not a point of the curve."""
        fields = [(b"group", _UTF8_STRING, _ALGORITHM)]
        if public is not None:
            decode_point(public)
            fields.append((b"pub", _OCTET_STRING, public))
        if private is not None:
            native = private if sys.byteorder == "big" else private[::-1]
            fields.append((b"priv", _UNSIGNED_INTEGER, native))
        params = (Param * (len(fields) + 1))(  # the last one, all zero, ends the list
            *(
                Param(name, kind, ctypes.addressof(scope.buffer(len(data), data)), len(data))
                for name, kind, data in fields
            )
        )
        context, key = self._context_by_name(scope), scope.out(self._lib.EVP_PKEY_free)
        self._lib.EVP_PKEY_fromdata_init(context)
        selection = _PUBLIC_KEY if private is None else _KEYPAIR
        self._lib.EVP_PKEY_fromdata(context, byref(key), selection, params)
        return key

    @staticmethod
    def _run(
        scope: Scope, function: Callable[..., int], context: int, data: bytes, capacity: int
    ) -> bytes:
        """Call EVP_PKEY_encrypt or EVP_PKEY_decrypt with an output buffer of ``capacity`` bytes."""
        output, length = scope.buffer(capacity), c_size_t(capacity)
        function(context, output, byref(length), data, len(data))
        return ctypes.string_at(output, length.value)

    def _private(self, scope: Scope, key: c_void_p) -> bytes:
        number, output = scope.out(self._lib.BN_clear_free), scope.buffer(FIELD_BYTES)
        self._lib.EVP_PKEY_get_bn_param(key, b"priv", byref(number))
        self._lib.BN_bn2binpad(number, output, FIELD_BYTES)
        return output.raw

    def _public(self, scope: Scope, key: c_void_p) -> bytes:
        output, length = scope.buffer(POINT_BYTES), c_size_t()
        self._lib.EVP_PKEY_get_octet_string_param(key, b"pub", output, POINT_BYTES, byref(length))
        decode_point(output.raw)
        return output.raw
