"""Backends around a backend: what the guard, the observer and a test's recorder are built on.

A composition passes each call on through one method, :meth:`Composition._forward`, and overrides
that. The optional interfaces (:class:`hsmwrap.backend.Ability`) pass through it as well, so a new
one needs no change here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, ClassVar, Concatenate, NoReturn, ParamSpec, TypeVar

from hsmwrap.backend import (
    CONTRACT_VERSION,
    Backend,
    Capabilities,
    Health,
    ImportedKey,
    KeyRef,
    Mac,
    PrivateKeyRef,
    WrappingKey,
)
from hsmwrap.catalog import KeySpec, WrappingAlgorithm, WrappingKeySpec

_P = ParamSpec("_P")
_T = TypeVar("_T")
_A = TypeVar("_A")

Declared = Callable[Concatenate[Any, _P], _T]
"""A method as the contract declares it: ``Backend.encrypt``, ``ReapsWrappingKeys.reap``."""


class Composition(Backend):
    """Passes every call of the contract on, unchanged: override :meth:`_forward` or a method."""

    contract_version: ClassVar[int] = CONTRACT_VERSION

    def __init__(self, backend: Backend) -> None:
        """Go around ``backend``."""
        self._backend = backend

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> NoReturn:  # noqa: ARG003  # refused
        """Refuse: a composition is put around a backend that is open.

        Raises:
            TypeError: Always.
        """
        raise TypeError(f"open the backend itself, then put {cls.__name__} around it")

    def _forward(
        self, asked: object, declared: Declared[_P, _T], *arguments: _P.args, **named: _P.kwargs
    ) -> _T:
        """Call a method of the contract.

        Args:
            asked: What has the method: the backend, or one of its abilities.
            declared: The method as the contract declares it.
            arguments: Its arguments.
            named: Its arguments by name.
        """
        answer: _T = getattr(asked, declared.__name__)(*arguments, **named)
        return answer

    def ability(self, kind: type[_A]) -> _A | None:
        """The backend's ability, with its calls going through this composition.

        A plug-in's own class is found too, but its calls do not go through this.
        """
        if isinstance(self, kind):
            return self
        found = self._backend.ability(kind)
        if issubclass(kind, Backend):
            return found
        through: _A | None = None if found is None else _through(kind)(self, found)
        return through

    @property
    def name(self) -> str:
        """The backend's name."""
        return self._backend.name

    def capabilities(self) -> Capabilities:
        """See :meth:`Backend.capabilities`."""
        return self._forward(self._backend, Backend.capabilities)

    def generate_wrapping_key(
        self, spec: WrappingKeySpec, algorithm: WrappingAlgorithm, *, expires_at: datetime
    ) -> WrappingKey:
        """See :meth:`Backend.generate_wrapping_key`."""
        declared = Backend.generate_wrapping_key
        return self._forward(self._backend, declared, spec, algorithm, expires_at=expires_at)

    # What is returned by a method that should return nothing is passed on too: a guard around this
    # refuses it. A plug-in may say by False what it should say by an error.

    def discard_wrapping_key(self, private_key: PrivateKeyRef) -> None:
        """See :meth:`Backend.discard_wrapping_key`."""
        return self._forward(self._backend, Backend.discard_wrapping_key, private_key)

    def unwrap_material(
        self,
        private_key: PrivateKeyRef,
        algorithm: WrappingAlgorithm,
        encrypted_material: bytes,
        *,
        key_spec: KeySpec,
        expected_check_value: bytes | None = None,
        object_id: bytes | None = None,
    ) -> ImportedKey:
        """See :meth:`Backend.unwrap_material`."""
        return self._forward(
            self._backend,
            Backend.unwrap_material,
            private_key,
            algorithm,
            encrypted_material,
            key_spec=key_spec,
            expected_check_value=expected_check_value,
            object_id=object_id,
        )

    def encrypt(self, key: KeyRef, plaintext: bytes, additional_data: bytes = b"") -> bytes:
        """See :meth:`Backend.encrypt`."""
        return self._forward(self._backend, Backend.encrypt, key, plaintext, additional_data)

    def decrypt(self, key: KeyRef, ciphertext: bytes, additional_data: bytes = b"") -> bytes:
        """See :meth:`Backend.decrypt`."""
        return self._forward(self._backend, Backend.decrypt, key, ciphertext, additional_data)

    def destroy_key(self, key: KeyRef) -> None:
        """See :meth:`Backend.destroy_key`."""
        return self._forward(self._backend, Backend.destroy_key, key)

    def mac(self, data: bytes) -> Mac:
        """See :meth:`Backend.mac`."""
        return self._forward(self._backend, Backend.mac, data)

    def verify_mac(self, data: bytes, mac: Mac) -> None:
        """See :meth:`Backend.verify_mac`."""
        return self._forward(self._backend, Backend.verify_mac, data, mac)

    def health(self) -> Health:
        """See :meth:`Backend.health`."""
        return self._backend.health()

    def close(self) -> None:
        """See :meth:`Backend.close`."""
        return self._forward(self._backend, Backend.close)


def _forwarding(kind: Any) -> Callable[[Composition, Any], Any]:
    """Makes an ability of a backend one of the composition around it."""

    def passed_on(name: str) -> Callable[..., Any]:
        declared = getattr(kind, name)

        def call(self: Any, *arguments: Any, **named: Any) -> Any:
            return self._around._forward(self._forwarded, declared, *arguments, **named)  # noqa: SLF001  # of this module

        return call

    def start(self: Any, around: Composition, asked: Any) -> None:
        self._around, self._forwarded = around, asked

    names = getattr(kind, "__abstractmethods__", ())
    return type(kind.__name__, (kind,), {n: passed_on(n) for n in names} | {"__init__": start})


_through: Callable[[Any], Callable[[Composition, Any], Any]] = functools.cache(_forwarding)
