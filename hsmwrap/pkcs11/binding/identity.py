"""Token objects by a handle that this process already has; whether it still means them.

python-pkcs11 makes an object of a handle only where it has searched or made one, and binds it to
that session. It reads an attribute in two calls: for its length, then for its value.
"""

from __future__ import annotations

import ctypes
from typing import Any

from pkcs11._pkcs11 import (  # type: ignore[attr-defined]  # what python-pkcs11's objects are of
    DecryptMixin,
    DeriveMixin,
    PrivateKey,
    UnwrapMixin,
)
from pkcs11.constants import Attribute
from pkcs11.exceptions import KeyHandleInvalid, ObjectHandleInvalid
from pkcs11.mechanisms import KeyType
from pkcs11.types import Session

from hsmwrap.ckr import CKR
from hsmwrap.pkcs11.binding.client_errors import attribute_reads
from hsmwrap.pkcs11.binding.module import shared_function_list
from hsmwrap.pkcs11.binding.returncodes import CryptokiError
from hsmwrap.pkcs11.binding.templates import CkAttribute

_NOT_THIS = frozenset({CKR.OBJECT_HANDLE_INVALID, CKR.KEY_HANDLE_INVALID, CKR.BUFFER_TOO_SMALL})


class KnownPrivateKey(DecryptMixin, UnwrapMixin, DeriveMixin, PrivateKey):  # type: ignore[misc]  # untyped
    """A private key for a session and a handle; its attributes are not read.

    The HSM token says what it may be used for.
    """

    session: Any = None  # hides a property
    handle: Any = None

    def __init__(self, session: Session, handle: int, key_type: KeyType) -> None:
        """Take the three."""
        self.session, self.handle, self.key_type = session, handle, key_type


class ObjectIds:
    """Compares the CKA_ID of objects of one module."""

    def __init__(self, module: str) -> None:
        """Take the path of a module that is loaded already."""
        self._functions = shared_function_list(module)

    @property
    def direct(self) -> bool:
        """Whether the module is called directly: without that, a handle alone is of no use."""
        return self._functions is not None

    def destroy(self, key: KnownPrivateKey) -> None:
        """Destroy an object; the module is called directly.

        Raises:
            PKCS11Error: The HSM token refuses.
        """
        code = self._functions.c_destroy_object(key.session.handle, key.handle)
        if code != CKR.OK:
            raise CryptokiError("C_DestroyObject", code)

    def has(self, key: Any, object_id: bytes) -> bool:
        """Whether the key's handle means an object with this id.

        Raises:
            PKCS11Error: The HSM token does not tell.
        """
        if self._functions is None:  # only python-pkcs11 reaches this function table
            try:
                with attribute_reads():
                    return bool(key[Attribute.ID] == object_id)
            except (KeyHandleInvalid, ObjectHandleInvalid):
                return False
        told = ctypes.create_string_buffer(len(object_id))
        asked = CkAttribute(Attribute.ID, ctypes.addressof(told), len(told))
        code = self._functions.c_get_attribute_value(
            key.session.handle, key.handle, ctypes.byref(asked), 1
        )
        if code in _NOT_THIS:
            return False
        if code != CKR.OK:
            raise CryptokiError("C_GetAttributeValue", code)
        return asked.length == len(told) and told.raw == object_id
