"""Telling a client's bad ciphertext from a bad connection, by operation and not by code alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pkcs11.constants import Attribute
from pkcs11.exceptions import FunctionFailed, PKCS11Error, SessionHandleInvalid

from hsmwrap.errors import HsmwrapError, InvalidKeyMaterial
from hsmwrap.pkcs11.returncodes import recovery_of


@contextmanager
def blame(*used: Any, error: type[HsmwrapError] = InvalidKeyMaterial) -> Iterator[None]:
    """Turn what the HSM token says of the client's input into one error that says nothing.

    Tokens have many words for a bad ciphertext (SoftHSM: GENERAL_ERROR for bad padding, field
    note 11), and each different word would be an oracle. Codes of the recovery table speak of
    the connection and pass through.

    Args:
        used: The key objects that the operation uses. python-pkcs11 reads their type at the first
            use; it is read before, so that a failure of that is not the client's.
        error: What the client is told.
    """
    for key in used:
        with _read():
            _ = key.key_type
    try:
        yield
    except PKCS11Error as fault:
        if recovery_of(fault) is not None:
            raise
        raise error from None


def read(key: Any, attribute: Attribute) -> Any:
    """An attribute of an object that must have it."""
    with _read():
        return key[attribute]


@contextmanager
def _read() -> Iterator[None]:
    # Where python-pkcs11 reads an attribute, every return code becomes FUNCTION_FAILED (measured).
    try:
        yield
    except FunctionFailed:
        raise SessionHandleInvalid from None
