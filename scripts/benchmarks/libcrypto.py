"""Raw SM2 by libcrypto, as the reference for the software backend."""

from __future__ import annotations

import ctypes
import subprocess
from ctypes import byref, c_char_p, c_int, c_long, c_size_t, c_void_p


class RawSm2:
    """One key pair with its contexts, and raw calls on it."""

    def __init__(self) -> None:
        self._lib = lib = ctypes.CDLL("libcrypto.so.3")
        for name in ("EVP_PKEY_CTX_new_from_name", "EVP_PKEY_CTX_new_from_pkey"):
            getattr(lib, name).restype = c_void_p
        lib.d2i_AutoPrivateKey.restype = c_void_p
        made = ["openssl", "genpkey", "-algorithm", "SM2", "-outform", "DER"]
        der = subprocess.run(made, capture_output=True, check=True).stdout
        key = lib.d2i_AutoPrivateKey(None, byref(c_char_p(der)), c_long(len(der)))
        public = ["openssl", "pkey", "-inform", "DER", "-pubout", "-outform", "DER"]
        self.public_key = subprocess.run(public, input=der, capture_output=True, check=True).stdout
        self._decryption = c_void_p(lib.EVP_PKEY_CTX_new_from_pkey(None, c_void_p(key), None))
        self._generation = c_void_p(lib.EVP_PKEY_CTX_new_from_name(None, b"SM2", None))
        self._require(lib.EVP_PKEY_decrypt_init(self._decryption))
        self._require(lib.EVP_PKEY_keygen_init(self._generation))

    def generate(self) -> None:
        """EVP_PKEY_generate."""
        key = c_void_p()
        self._require(self._lib.EVP_PKEY_generate(self._generation, byref(key)))
        self._lib.EVP_PKEY_free(key)

    def decrypt(self, ciphertext: bytes) -> bytes:
        """EVP_PKEY_decrypt of a ciphertext in DER; returns the plaintext."""
        output, length = ctypes.create_string_buffer(len(ciphertext)), c_size_t(len(ciphertext))
        size = c_size_t(len(ciphertext))
        self._require(
            self._lib.EVP_PKEY_decrypt(self._decryption, output, byref(length), ciphertext, size)
        )
        return output.raw[: length.value]

    @staticmethod
    def _require(result: int | c_int) -> None:
        if result != 1:
            raise RuntimeError("libcrypto has no SM2 here")
