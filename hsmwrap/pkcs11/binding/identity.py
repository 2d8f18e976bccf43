"""Whether a handle still means an object, asked in one call.

python-pkcs11 reads an attribute in two: for its length, then for its value.
"""

from __future__ import annotations

import ctypes
from typing import Any

from pkcs11.constants import Attribute
from pkcs11.exceptions import KeyHandleInvalid, ObjectHandleInvalid

from hsmwrap.ckr import CKR
from hsmwrap.pkcs11.binding.client_errors import attribute_reads
from hsmwrap.pkcs11.binding.module import shared_function_list
from hsmwrap.pkcs11.binding.returncodes import CryptokiError
from hsmwrap.pkcs11.binding.templates import CkAttribute

_NOT_THIS = frozenset({CKR.OBJECT_HANDLE_INVALID, CKR.KEY_HANDLE_INVALID, CKR.BUFFER_TOO_SMALL})


class ObjectIds:
    """Compares the CKA_ID of objects of one module."""

    def __init__(self, module: str) -> None:
        """Take the path of a module that is loaded already."""
        self._functions = shared_function_list(module)

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
