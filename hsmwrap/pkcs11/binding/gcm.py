"""AES-GCM with an imported key, inside the HSM token.

python-pkcs11 asks the module how long the ciphertext will be and offers just that. NSS forgets the
tag in its answer, and then has no room for it (field note 38). The length is known anyway: that of
the plaintext, and the tag. So the module is called directly, which saves the call for the length.
"""

from __future__ import annotations

import ctypes
from typing import Any

from pkcs11 import GCMParams
from pkcs11.mechanisms import Mechanism

from hsmwrap.backend import TAG_LENGTH
from hsmwrap.ckr import CKR
from hsmwrap.pkcs11.binding import traits
from hsmwrap.pkcs11.binding.module import shared_function_list
from hsmwrap.pkcs11.binding.returncodes import CryptokiError


class _GcmParams(ctypes.Structure):
    """CK_GCM_PARAMS (PKCS#11 v2.40, 2.12.3)."""

    _fields_ = (
        ("iv", ctypes.c_char_p),
        ("iv_length", ctypes.c_ulong),
        ("iv_bits", ctypes.c_ulong),
        ("aad", ctypes.c_char_p),
        ("aad_length", ctypes.c_ulong),
        ("tag_bits", ctypes.c_ulong),
    )


class _Mechanism(ctypes.Structure):
    """CK_MECHANISM (PKCS#11 v2.40, 3.6)."""

    _fields_ = (
        ("mechanism", ctypes.c_ulong),
        ("parameter", ctypes.c_void_p),
        ("parameter_length", ctypes.c_ulong),
    )


class AesGcm:
    """AES-GCM by keys of one module; the tag (16 bytes) follows the ciphertext."""

    def __init__(self, module: str) -> None:
        """Take the path of a module that is loaded already."""
        self._functions = shared_function_list(module)

    def read_through(self, key: Any) -> tuple[Any, ...]:
        """The keys of which python-pkcs11 reads attributes before it uses them."""
        return (key,) if self._functions is None else ()

    def encrypt(self, key: Any, nonce: bytes, plaintext: bytes, additional_data: bytes) -> bytes:
        """Encrypt under a key object; returns ciphertext ‖ tag.

        Raises:
            PKCS11Error: The HSM token refuses.
        """
        if self._functions is None:  # only python-pkcs11 reaches this function table
            sealed = key.encrypt(
                plaintext,
                mechanism=Mechanism.AES_GCM,
                mechanism_param=_parameters(nonce, additional_data),
            )
            return bytes(sealed)
        begin, call = self._functions.c_encrypt_init, self._functions.c_encrypt
        self._begin("C_EncryptInit", begin, key, nonce, additional_data)
        return self._end("C_Encrypt", call, key, plaintext, len(plaintext) + TAG_LENGTH)

    @staticmethod
    def _begin(function: str, call: Any, key: Any, nonce: bytes, additional_data: bytes) -> None:
        traits.require_sent(Mechanism.AES_GCM)
        parameters = _GcmParams(
            nonce,
            len(nonce),
            len(nonce) * 8,
            additional_data,
            len(additional_data),
            TAG_LENGTH * 8,
        )
        mechanism = _Mechanism(
            Mechanism.AES_GCM, ctypes.addressof(parameters), ctypes.sizeof(parameters)
        )
        code = call(key.session.handle, ctypes.byref(mechanism), key.handle)
        if code != CKR.OK:
            raise CryptokiError(function, code, Mechanism.AES_GCM)

    @staticmethod
    def _end(function: str, call: Any, key: Any, data: bytes, room: int) -> bytes:
        result = ctypes.create_string_buffer(room)
        length = ctypes.c_ulong(room)
        code = call(key.session.handle, data, len(data), result, ctypes.byref(length))
        if code != CKR.OK:
            raise CryptokiError(function, code, Mechanism.AES_GCM)
        return result.raw[: length.value]

    def decrypt(self, key: Any, nonce: bytes, sealed: bytes, additional_data: bytes) -> bytes:
        """Decrypt ciphertext ‖ tag under a key object.

        Raises:
            PKCS11Error: The tag does not fit, or the HSM token refuses.
        """
        if self._functions is None:
            opened = key.decrypt(
                sealed,
                mechanism=Mechanism.AES_GCM,
                mechanism_param=_parameters(nonce, additional_data),
            )
            return bytes(opened)
        begin, call = self._functions.c_decrypt_init, self._functions.c_decrypt
        self._begin("C_DecryptInit", begin, key, nonce, additional_data)
        # Room for the tag as well: some modules ask for as much as they are given.
        return self._end("C_Decrypt", call, key, sealed, len(sealed))


def _parameters(nonce: bytes, additional_data: bytes) -> GCMParams:
    return GCMParams(nonce, additional_data, TAG_LENGTH * 8)
