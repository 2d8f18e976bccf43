"""Telling a client's bad ciphertext from a bad connection, by operation and not by code alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pkcs11.constants import Attribute
from pkcs11.exceptions import FunctionFailed, PKCS11Error, SessionHandleInvalid

from hsmwrap.ckr import CKR
from hsmwrap.errors import HsmwrapError, InvalidKeyMaterial
from hsmwrap.pkcs11.binding import traits
from hsmwrap.pkcs11.binding.returncodes import answer_of, recovery_of, return_code, said

_log = logging.getLogger(__name__)


class map_client_errors:  # noqa: N801  # read as a statement: with map_client_errors(key)
    """Map what the HSM token answers to a client's input to one error that says no more.

    Tokens answer many codes to a bad ciphertext (SoftHSM: GENERAL_ERROR to bad padding, field note
    11), and each difference would be an oracle. The operator finds the answer in the log, at level
    DEBUG. Codes of the recovery table speak of the connection and pass through.
    """

    __slots__ = ("_error", "_used")

    def __init__(self, *used: Any, error: type[HsmwrapError] = InvalidKeyMaterial) -> None:
        """Say what is used, and what the client is told.

        Args:
            used: The key objects that the operation uses. python-pkcs11 reads their type at the
                first use; it is read before, so that a failure of that is not the client's.
            error: What the client is told.
        """
        self._used, self._error = used, error

    def __enter__(self) -> None:
        for key in self._used:
            with attribute_reads():
                _ = key.key_type

    def __exit__(self, _type: object, fault: BaseException | None, _traceback: object) -> None:
        if isinstance(fault, PKCS11Error) and recovery_of(fault) is None:
            if _log.isEnabledFor(logging.DEBUG):
                _log.debug("refused", extra={"said": said(fault), "error": self._error.__name__})
            raise self._error from None


_DAMAGED = frozenset(
    {
        CKR.WRAPPED_KEY_INVALID,
        CKR.WRAPPED_KEY_LEN_RANGE,
        CKR.ENCRYPTED_DATA_INVALID,
        CKR.ENCRYPTED_DATA_LEN_RANGE,
        CKR.DATA_INVALID,
        CKR.DATA_LEN_RANGE,
    }
)
"""What the standard has for a wrapped key that does not unwrap."""


@contextmanager
def map_damage(error: HsmwrapError, control: Callable[[], None]) -> Iterator[None]:
    """Map what the HSM token answers to a damaged blob of ours to one error; nothing else.

    A blob of ours is authentic, and no client chose it: no oracle is to be feared, and another
    answer is the HSM's fault, which is said with its code.

    Args:
        error: What is raised if the blob is damaged.
        control: Unwraps a blob that is not; asked where the answer is GENERAL_ERROR, which is
            SoftHSM's word for a damaged blob and every module's for trouble.
    """
    try:
        yield
    except PKCS11Error as fault:
        code = return_code(fault)
        if code == CKR.FUNCTION_FAILED and answer_of(fault) is None:
            raise SessionHandleInvalid(said(fault)) from None  # of reading attributes
        if code == CKR.GENERAL_ERROR:
            control()
        elif code not in _DAMAGED:
            raise
        raise error from None


def may_leave_an_object(error: HsmwrapError) -> bool:
    """Whether this error of :class:`map_client_errors` may hide an object without a handle.

    FUNCTION_FAILED may come from python-pkcs11's reading of the attributes of what was just made
    (field note 33): then only closing the session removes the object.
    """
    return isinstance(error.__context__, FunctionFailed)


@contextmanager
def attribute_reads() -> Iterator[None]:
    """Take FUNCTION_FAILED for the connection's, where python-pkcs11 reads attributes.

    Every return code becomes that one there (field note 33).

    Raises:
        SessionHandleInvalid: It is the connection.
    """
    try:
        yield
    except FunctionFailed as fault:
        raise SessionHandleInvalid(said(fault)) from None


def read(key: Any, attribute: Attribute) -> Any:
    """An attribute of an object that must have it."""
    with attribute_reads():
        return key[attribute]


def read_if_known(key: Any, attribute: Attribute) -> Any:
    """An attribute, or None where the HSM token does not have it.

    A token without it is told from a connection that fails for a moment: it refuses twice, and
    answers for another attribute in between.

    Raises:
        SessionHandleInvalid: It is the connection.
    """
    if attribute in traits.here().never_attributes:
        return None
    for _ in range(2):
        try:
            return key[attribute]
        except PKCS11Error as fault:
            if recovery_of(fault) is not None:
                raise
        read(key, Attribute.CLASS)
    return None
