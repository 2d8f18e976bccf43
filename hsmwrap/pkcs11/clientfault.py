"""Telling a client's bad ciphertext from a bad connection, by operation and not by code alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pkcs11.exceptions import PKCS11Error

from hsmwrap.errors import HsmwrapError, InvalidKeyMaterial
from hsmwrap.pkcs11.returncodes import recovery_of


@contextmanager
def blame(error: type[HsmwrapError] = InvalidKeyMaterial) -> Iterator[None]:
    """Turn what the HSM token says of the client's input into one error that says nothing.

    Tokens have many words for a bad ciphertext (SoftHSM: GENERAL_ERROR for bad padding, field
    note 11), and each different word would be an oracle. Codes of the recovery table speak of
    the connection and pass through.
    """
    try:
        yield
    except PKCS11Error as fault:
        if recovery_of(fault) is not None:
            raise
        raise error from None
