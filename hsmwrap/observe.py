"""Trace hooks: what a backend was asked, how it ended and how long it took.

``observed(backend, observer)`` is the same backend with each call observed. An observer is any
callable that takes an :class:`Operation`: a metrics exporter
(:class:`hsmwrap.metrics.PrometheusObserver`), a tracer's span, a line in a log. It is told no
secret and changes nothing: what it raises is logged once and otherwise ignored.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, NoReturn

from hsmwrap.backend import (
    CONTRACT_VERSION,
    Backend,
    Capabilities,
    Health,
    ImportedKey,
    KeyRef,
    Mac,
    PrivateKeyRef,
    ReapReport,
    WrappingKey,
)
from hsmwrap.catalog import KeySpec, WrappingAlgorithm, WrappingKeySpec

OK = "ok"
"""The outcome of an operation that raised nothing."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of a backend that has ended.

    Attributes:
        name: The method of :class:`Backend`.
        backend: Name of the backend.
        outcome: ``ok``, or the name of the exception's class (``InvalidKeyMaterial``).
        seconds: How long it took.
        spec: Wrapping key spec, where the call says one.
        algorithm: Wrapping algorithm, where the call says one.
        key_spec: Key spec of the imported key, where the call says one.
    """

    name: str
    backend: str
    outcome: str
    seconds: float
    spec: WrappingKeySpec | None = None
    algorithm: WrappingAlgorithm | None = None
    key_spec: KeySpec | None = None


Observer = Callable[[Operation], None]
"""Told of each operation as it ends, in the thread that made it; should not take long."""


def observed(
    backend: Backend, observer: Observer, *, timer: Callable[[], float] = time.perf_counter
) -> Backend:
    """Return ``backend`` with ``observer`` told of each call that may reach the HSM.

    ``name`` and ``health`` never do and are not told. The backend's own keys are managed through
    its class, as before.
    """
    return _ObservedBackend(backend, observer, timer)


class _ObservedBackend(Backend):
    """Passes every call of the contract on, unchanged, and tells how it went."""

    contract_version: ClassVar[int] = CONTRACT_VERSION

    def __init__(self, backend: Backend, observer: Observer, timer: Callable[[], float]) -> None:
        self._backend = backend
        self._observer = observer
        self._timer = timer
        self._complained = False

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> NoReturn:  # noqa: ARG003  # refused
        raise TypeError("open the backend itself, then give it to observed()")

    def __repr__(self) -> str:
        return f"<observed {self._backend!r}>"

    @property
    def name(self) -> str:
        return self._backend.name

    def health(self) -> Health:
        return self._backend.health()

    def capabilities(self) -> Capabilities:
        with self._told("capabilities"):
            return self._backend.capabilities()

    def generate_wrapping_key(
        self, spec: WrappingKeySpec, algorithm: WrappingAlgorithm, *, expires_at: datetime
    ) -> WrappingKey:
        with self._told("generate_wrapping_key", spec=spec, algorithm=algorithm):
            return self._backend.generate_wrapping_key(spec, algorithm, expires_at=expires_at)

    def discard_wrapping_key(self, private_key: PrivateKeyRef) -> None:
        with self._told("discard_wrapping_key"):
            self._backend.discard_wrapping_key(private_key)

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
        with self._told("unwrap_material", algorithm=algorithm, key_spec=key_spec):
            return self._backend.unwrap_material(
                private_key,
                algorithm,
                encrypted_material,
                key_spec=key_spec,
                expected_check_value=expected_check_value,
                object_id=object_id,
            )

    def encrypt(self, key: KeyRef, plaintext: bytes, additional_data: bytes = b"") -> bytes:
        with self._told("encrypt", key_spec=key.key_spec):
            return self._backend.encrypt(key, plaintext, additional_data)

    def decrypt(self, key: KeyRef, ciphertext: bytes, additional_data: bytes = b"") -> bytes:
        with self._told("decrypt", key_spec=key.key_spec):
            return self._backend.decrypt(key, ciphertext, additional_data)

    def destroy_key(self, key: KeyRef) -> None:
        with self._told("destroy_key", key_spec=key.key_spec):
            self._backend.destroy_key(key)

    def mac(self, data: bytes) -> Mac:
        with self._told("mac"):
            return self._backend.mac(data)

    def verify_mac(self, data: bytes, mac: Mac) -> None:
        with self._told("verify_mac"):
            self._backend.verify_mac(data, mac)

    def reap(self, now: datetime) -> ReapReport:
        with self._told("reap"):
            return self._backend.reap(now)

    def close(self) -> None:
        with self._told("close"):
            self._backend.close()

    @contextmanager
    def _told(self, name: str, **labels: Any) -> Iterator[None]:
        outcome, started = OK, self._timer()
        try:
            yield
        except BaseException as error:
            outcome = type(error).__name__
            raise
        finally:
            seconds = self._timer() - started
            self._tell(name, outcome, seconds, labels)

    def _tell(self, name: str, outcome: str, seconds: float, labels: dict[str, Any]) -> None:
        try:
            self._observer(Operation(name, self.name, outcome, seconds, **labels))
        except Exception as error:  # noqa: BLE001  # an observer changes nothing, whatever it raises
            if not self._complained:
                self._complained = True
                _log.warning(
                    "observer failed; not saying so again",
                    extra={"operation": name, "error": type(error).__name__},
                )
