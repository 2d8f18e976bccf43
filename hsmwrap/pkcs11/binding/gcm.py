"""GCM with an imported key, inside the HSM token: by CKM_AES_GCM or a vendor's mechanism for SM4.

python-pkcs11 asks the module how long the ciphertext will be and offers just that. NSS forgets the
tag in its answer, and then has no room for it (field note 38). The length is known anyway: that of
the plaintext, and the tag. So the module is called directly, which saves the call for the length.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pkcs11.mechanisms import Mechanism

from hsmwrap.backend import MESSAGE_VERSION, TAG_LENGTH
from hsmwrap.ckr import CKR
from hsmwrap.errors import InvalidCiphertext
from hsmwrap.pkcs11.binding import traits
from hsmwrap.pkcs11.binding.client_errors import map_client_errors
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


@dataclass(frozen=True)
class Gcm:
    """GCM by keys of one module; the tag (16 bytes) follows the ciphertext.

    Attributes:
        module: Path of a module that is loaded already.
        mechanism: GCM's number there.
    """

    name: ClassVar[str] = "GCM"
    version: ClassVar[int] = MESSAGE_VERSION

    module: str
    mechanism: Mechanism = Mechanism.AES_GCM
    _functions: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_functions", shared_function_list(self.module))

    def encrypt(self, key: Any, nonce: bytes, plaintext: bytes, additional_data: bytes) -> bytes:
        """Encrypt under a key object; returns ciphertext ‖ tag.

        Raises:
            PKCS11Error: The HSM token refuses.
        """
        parameters = _parameters(nonce, additional_data)
        if self._functions is None:  # only python-pkcs11 reaches this function table
            made = key.encrypt(
                plaintext, mechanism=self.mechanism, mechanism_param=bytes(parameters)
            )
            return bytes(made)
        self._begin("C_EncryptInit", self._functions.c_encrypt_init, key, parameters)
        call = self._functions.c_encrypt
        return self._end("C_Encrypt", call, key, plaintext, len(plaintext) + TAG_LENGTH)

    def _begin(self, function: str, call: Any, key: Any, parameters: _GcmParams) -> None:
        traits.require_sent(self.mechanism)
        mechanism = _Mechanism(
            self.mechanism, ctypes.addressof(parameters), ctypes.sizeof(parameters)
        )
        code = call(key.session.handle, ctypes.byref(mechanism), key.handle)
        if code != CKR.OK:
            raise CryptokiError(function, code, self.mechanism)

    def _end(self, function: str, call: Any, key: Any, data: bytes, room: int) -> bytes:
        result = ctypes.create_string_buffer(room)
        length = ctypes.c_ulong(room)
        code = call(key.session.handle, data, len(data), result, ctypes.byref(length))
        if code != CKR.OK:
            raise CryptokiError(function, code, self.mechanism)
        return result.raw[: length.value]

    def decrypt(self, key: Any, nonce: bytes, sealed: bytes, additional_data: bytes) -> bytes:
        """Decrypt ciphertext ‖ tag under a key object.

        Raises:
            InvalidCiphertext: The tag does not fit, or the HSM token refuses.
            PKCS11Error: The connection does not work.
        """
        parameters = _parameters(nonce, additional_data)
        # python-pkcs11 reads the key's type before it uses it.
        read = (key,) if self._functions is None else ()
        with map_client_errors(*read, error=InvalidCiphertext):
            if self._functions is None:
                opened = key.decrypt(
                    sealed, mechanism=self.mechanism, mechanism_param=bytes(parameters)
                )
                return bytes(opened)
            self._begin("C_DecryptInit", self._functions.c_decrypt_init, key, parameters)
            # Room for the tag as well: some modules ask for as much as they are given.
            call = self._functions.c_decrypt
            return self._end("C_Decrypt", call, key, sealed, len(sealed))


def _parameters(nonce: bytes, additional_data: bytes) -> _GcmParams:
    """They point to what is given: keep them for as long as their bytes are in use."""
    return _GcmParams(
        nonce,
        len(nonce),
        len(nonce) * 8,
        additional_data,
        len(additional_data),
        TAG_LENGTH * 8,
    )
