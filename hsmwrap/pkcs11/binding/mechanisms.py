"""The mechanism of a failed call, noted on python-pkcs11's exception.

python-pkcs11 raises a class for each return code and says no more. The function can be read from
the traceback; the mechanism cannot (field note 85). So the methods that take one note it on each
PKCS11Error that passes. Nothing else changes, for other code of this process neither.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pkcs11 import _pkcs11
from pkcs11.defaults import DEFAULT_GENERATE_MECHANISMS
from pkcs11.exceptions import PKCS11Error
from pkcs11.types import Session

from hsmwrap.pkcs11.binding import traits

_METHODS = (
    ("EncryptMixin", "_encrypt"),
    ("DecryptMixin", "_decrypt"),
    ("SignMixin", "_sign"),
    ("WrapMixin", "wrap_key"),
    ("UnwrapMixin", "unwrap_key"),
    ("DeriveMixin", "derive_key"),
    ("Object", "copy"),
)


@contextmanager
def noted(what: str, value: Any) -> Iterator[None]:
    """Note ``what`` on a PKCS11Error of the ``with`` block: its ``mechanism`` or ``function``."""
    try:
        yield
    except PKCS11Error as error:
        setattr(error, what, value)
        raise


def note_mechanisms() -> None:
    """Let python-pkcs11's methods note their mechanism; a second call does nothing."""
    methods = ((getattr(_pkcs11, kind), name) for kind, name in _METHODS)
    for kind, name in (*methods, (Session, "generate_keypair")):
        method = getattr(kind, name)
        if not hasattr(method, "__wrapped__"):
            setattr(kind, name, _noting(method))


def _noting(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        mechanism = named.get("mechanism")
        if mechanism is None and isinstance(self, Session):
            mechanism = DEFAULT_GENERATE_MECHANISMS.get(arguments[0]) if arguments else None
        templates = (each for each in (*arguments, *named.values()) if isinstance(each, dict))
        traits.require_sent(mechanism, *templates)
        with noted("mechanism", mechanism):
            return method(self, *arguments, **named)

    return call
