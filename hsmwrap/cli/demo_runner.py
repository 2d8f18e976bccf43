"""The demo runner: runs one row of the demo, the import service against an independent client.

A row passes only on observed results: an import passes if pyca and the backend understand each
other's messages under the imported key, and a refusal passes if the expected rule made it and
no key pair was generated.
"""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar

from hsmwrap.backend import Backend, ImportedKey, PrivateKeyRef, WrappingKey
from hsmwrap.catalog import (
    KeySpec,
    ManagedHsm,
    ProtectionLevel,
    WrappingAlgorithm,
    WrappingKeySpec,
)
from hsmwrap.cli.compat import Combination
from hsmwrap.errors import (
    CombinationRefused,
    HsmwrapError,
    UnsupportedOperation,
    UnsupportedProtectionLevel,
)
from hsmwrap.imports import Cmk, ImportService, generate_inline
from hsmwrap.policy import Deployment, Verdict
from hsmwrap.testing.clients import Client, decrypt_message, encrypt_message

DEPLOYMENT = Deployment(ManagedHsm.SCA)
"""The demo's deployment: the only class of region in which every row of the table is reachable."""

_ADDITIONAL_DATA = b"purpose=demo"
_REFUSALS = (CombinationRefused, UnsupportedProtectionLevel)

_T = TypeVar("_T")


class CheckFailed(Exception):
    """A row did not give the expected result; the text says what was seen."""


@dataclass(slots=True)
class Row:
    """The result of one combination with one client.

    Attributes:
        combination: Wrapping key spec, wrapping algorithm, protection level.
        allowed: What the compatibility table says.
        backend: Name of the backend that the protection level selects.
        client: The client that encrypts the key material; None for a refused combination.
        outcome: ``imported``, ``refused``, ``not served`` (allowed, but not by this backend),
            ``issued`` (against the table or the capabilities) or ``failed``.
        code: KMS error code of a refusal or failure.
        exposure: Where the material was in plaintext; None if none was imported.
        rule: The rule that refused.
        key_specs: What was imported, and whether it was then ``used`` or only ``stored``.
        issue_ms: Milliseconds for parameters, of the first key spec.
        import_ms: Milliseconds for the import, of the first key spec.
        failure: Why the result is not what the table says; None if it is.
    """

    combination: Combination
    allowed: bool
    backend: str
    client: str | None = None
    outcome: str = "failed"
    code: str | None = None
    exposure: str | None = None
    rule: str | None = None
    key_specs: dict[KeySpec, str] = field(default_factory=dict)
    issue_ms: float | None = None
    import_ms: float | None = None
    failure: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The row for machines."""
        spec, algorithm, level = self.combination
        return {
            "wrapping_key_spec": spec,
            "wrapping_algorithm": algorithm,
            "protection_level": level,
            "allowed": self.allowed,
            "outcome": self.outcome,
            "code": self.code,
            "exposure": self.exposure,
            "client": self.client,
            "backend": self.backend,
            "key_specs": dict(self.key_specs),
            "issue_ms": self.issue_ms,
            "import_ms": self.import_ms,
        }


class DemoRunner:
    """Runs rows against an import service over the given backends."""

    def __init__(self, backends: Mapping[ProtectionLevel, Backend]) -> None:
        """Build the import service, with a key source that records the pairs it generates."""
        self._backends = backends
        self._source = _RecordingSource()
        self._service = ImportService(backends, DEPLOYMENT, key_source=self._source)

    def run_allowed(self, combination: Combination, client: Client) -> Row:
        """Issue, encrypt as the client, import, use the key; for each key spec of the backend."""
        backend = self._backends[combination[2]]
        row = Row(combination, allowed=True, backend=backend.name, client=client.name)
        with self._recorded(row):
            for key_spec in _key_specs(backend):
                self._import_and_use(row, client, key_spec)
            row.outcome = "imported"
        return row

    def serves(self, combination: Combination) -> bool:
        """Whether the backend says that it serves an allowed combination."""
        spec, algorithm, level = combination
        return self._backends[level].capabilities().wrapping_for(spec, algorithm) is not None

    def run_refused(self, combination: Combination, verdict: Verdict) -> Row:
        """Ask for parameters that the table refuses; nothing may be generated."""
        row = Row(combination, allowed=False, backend=self._backends[combination[2]].name)
        self._ask_in_vain(row, "refused", verdict.error().code, verdict.rule)
        return row

    def run_unserved(self, combination: Combination) -> Row:
        """Ask for parameters that the backend does not serve; nothing may be generated."""
        row = Row(combination, allowed=True, backend=self._backends[combination[2]].name)
        self._ask_in_vain(row, "not served", CombinationRefused.code, "backend-capability")
        return row

    def _ask_in_vain(self, row: Row, outcome: str, code: str, rule: str | None) -> None:
        spec, algorithm, level = row.combination
        with self._recorded(row):
            try:
                self._service.get_parameters_for_import(_cmk(level), spec, algorithm)
            except _REFUSALS as error:
                row.outcome, row.code, row.rule = outcome, error.code, error.rule
            else:
                row.outcome = "issued"
            seen = (row.outcome, row.code, row.rule)
            _expect("refusal", seen, (outcome, code, rule))
            _expect("key pairs generated", self._source.count, 0)

    @contextmanager
    def _recorded(self, row: Row) -> Iterator[None]:
        """Record a failure in the row; destroy the wrapping keys that the row generated."""
        try:
            try:
                yield
            finally:
                self._source.discard_all()
        except HsmwrapError as error:
            row.outcome = "refused" if isinstance(error, _REFUSALS) else "failed"
            row.code, row.failure = error.code, str(error)
        except Exception as error:  # noqa: BLE001 (a bug in a backend fails its row, not the other rows)
            row.failure = f"{type(error).__name__}: {error}"

    def _import_and_use(self, row: Row, client: Client, key_spec: KeySpec) -> None:
        spec, algorithm, level = row.combination
        cmk = _cmk(level, key_spec)
        parameters, issue_ms = _timed(
            lambda: self._service.get_parameters_for_import(cmk, spec, algorithm)
        )
        material = secrets.token_bytes(key_spec.material_length)
        encrypted = client.encrypt(algorithm, parameters.public_key, material)
        result, import_ms = _timed(
            lambda: self._service.import_key_material(cmk, encrypted, parameters.import_token)
        )
        if row.issue_ms is None:
            row.issue_ms, row.import_ms = issue_ms, import_ms
        self._check_key(row, result.imported, material)

    def _check_key(self, row: Row, imported: ImportedKey, material: bytes) -> None:
        spec, algorithm, level = row.combination
        backend, key_spec = self._backends[level], imported.key.key_spec
        try:
            row.exposure = imported.exposure
            promised = backend.capabilities().wrapping_for(spec, algorithm)
            _expect("exposure", imported.exposure, promised and promised.exposure)
            row.key_specs[key_spec] = _use(backend, imported, material)
        finally:
            backend.destroy_key(imported.key)


class _RecordingSource:
    """Generates inline, and records every pair until it is discarded."""

    def __init__(self) -> None:
        self._generated: list[tuple[Backend, PrivateKeyRef]] = []

    def __call__(
        self,
        backend: Backend,
        spec: WrappingKeySpec,
        algorithm: WrappingAlgorithm,
        expires_at: datetime,
    ) -> WrappingKey:
        key = generate_inline(backend, spec, algorithm, expires_at)
        self._generated.append((backend, key.private_key))
        return key

    @property
    def count(self) -> int:
        return len(self._generated)

    def discard_all(self) -> None:
        while self._generated:
            backend, private_key = self._generated.pop()
            backend.discard_wrapping_key(private_key)


def _use(backend: Backend, imported: ImportedKey, material: bytes) -> str:
    """Exchange messages under the key in both directions; pyca is the other side."""
    key, spec, plaintext = imported.key, imported.key.key_spec, secrets.token_bytes(64)
    if not _is_usable(backend, spec):
        return _stored(backend, imported)
    message = backend.encrypt(key, plaintext, _ADDITIONAL_DATA)
    if decrypt_message(spec, material, message, _ADDITIONAL_DATA) != plaintext:
        raise CheckFailed(f"pyca decrypts {backend.name}'s message to another plaintext")
    version = message[0]
    message = encrypt_message(spec, material, plaintext, _ADDITIONAL_DATA, version)
    if backend.decrypt(key, message, _ADDITIONAL_DATA) != plaintext:
        raise CheckFailed(f"{backend.name} decrypts pyca's message to another plaintext")
    return "used"


def _stored(backend: Backend, imported: ImportedKey) -> str:
    """Check that the backend refuses to use a key that its capabilities call unusable."""
    try:
        backend.encrypt(imported.key, b"", _ADDITIONAL_DATA)
    except UnsupportedOperation:
        return "stored"
    raise CheckFailed(f"{backend.name} uses a key that its capabilities call unusable")


def _is_usable(backend: Backend, key_spec: KeySpec) -> bool:
    # An AES-256 key has to work, whatever the capabilities say.
    capability = backend.capabilities().key_for(key_spec)
    return key_spec is KeySpec.ALIYUN_AES_256 or (capability is not None and capability.usable)


def _key_specs(backend: Backend) -> list[KeySpec]:
    """The backend's key specs; AES-256 where it has none, so that this is seen."""
    offered = [capability.key_spec for capability in backend.capabilities().keys]
    return offered or [KeySpec.ALIYUN_AES_256]


def _cmk(level: ProtectionLevel, key_spec: KeySpec = KeySpec.ALIYUN_AES_256) -> Cmk:
    return Cmk(f"demo-{uuid.uuid4()}", key_spec, level)


def _expect(what: str, seen: object, wanted: object) -> None:
    if seen != wanted:
        raise CheckFailed(f"{what}: {seen} instead of {wanted}")


def _timed(call: Callable[[], _T]) -> tuple[_T, float]:
    """The result of ``call``, and its duration in milliseconds."""
    started = time.perf_counter()
    result = call()
    return result, round((time.perf_counter() - started) * 1000, 2)
