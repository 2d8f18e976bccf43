"""Trying what an HSM token can do: what it refuses, it refuses twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pkcs11.constants import Attribute, MechanismFlag
from pkcs11.exceptions import PKCS11Error
from pkcs11.mechanisms import Mechanism
from pkcs11.types import Session

from hsmwrap.pkcs11.binding import traits
from hsmwrap.pkcs11.binding.returncodes import recovery_of
from hsmwrap.pkcs11.binding.templates import Template

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


def generate_trial_key(
    session: Session,
    template: Template,
    length: int,
    mechanism: Mechanism,
    *,
    uses: MechanismFlag = MechanismFlag(0),  # noqa: B008  # it does not change
) -> Any:
    """Generate a secret key for a trial: unlike :mod:`.objects` does, it is not read back.

    Args:
        session: The session.
        template: With the key's type; without CKA_TOKEN it is a session object.
        length: In bytes.
        mechanism: Of key generation.
        uses: Besides those of the template.

    Raises:
        PKCS11Error: The HSM token refuses, or the profile forbids to ask.
    """
    traits.require_sent(mechanism, template)
    return session.generate_key(
        template[Attribute.KEY_TYPE],
        8 * length,
        mechanism=mechanism,
        store=template.get(Attribute.TOKEN, False),
        capabilities=uses,
        template=template,
    )


def refuses_changed(blob: bytes, unwrap: Callable[[bytes], Any]) -> bool:
    """Whether a wrapped key with one bit changed does not unwrap, at either end.

    A mechanism by a vendor's number may be one that does not authenticate. What seals has to: a
    blob is kept outside the HSM.

    Args:
        blob: A wrapped key that unwraps.
        unwrap: Unwraps.

    Raises:
        PKCS11Error: A return code that says something about the connection, not the token, or the
            blob does not unwrap.
    """

    def refused(changed: bytes) -> bool:
        try:
            unwrap(changed)
        except PKCS11Error as error:
            if recovery_of(error) is not None:
                raise
            unwrap(blob)  # or it is not the change that is refused
            return True
        return False

    first, last = bytes([blob[0] ^ 1]) + blob[1:], blob[:-1] + bytes([blob[-1] ^ 1])
    return refused(first) and refused(last)
