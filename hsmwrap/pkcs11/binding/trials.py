"""Trying what an HSM token can do: what it refuses, it refuses twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pkcs11.exceptions import PKCS11Error

from hsmwrap.pkcs11.binding.returncodes import recovery_of

_T = TypeVar("_T")


def unless_refused(attempt: Callable[[], _T]) -> _T | None:
    """The result, or None where the HSM token refuses twice.

    What fails once may work again, and must pass neither for missing nor for a protection.

    Raises:
        PKCS11Error: A return code that says something about the connection, not the token.
    """
    for _ in range(2):
        try:
            return attempt()
        except PKCS11Error as error:
            if recovery_of(error) is not None:
                raise
    return None
