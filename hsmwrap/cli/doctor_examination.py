"""The doctor's examination: what a backend reports, compared with what it does.

By the contract alone, so every plug-in can be examined. What is made is destroyed at once. The
guard compares exposure and custody with the report; the rest is compared here.
"""

from __future__ import annotations

import os
import secrets
import signal
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from hsmwrap import checkvalue
from hsmwrap.backend import (
    Backend,
    Capabilities,
    Exposure,
    FailedTrial,
    ImportedKey,
    KeyCapability,
    WrappingCapability,
    WrappingKey,
)
from hsmwrap.catalog import (
    COMPATIBILITY_TABLE,
    KeySpec,
    WrappingAlgorithm,
    WrappingKeySpec,
)
from hsmwrap.errors import HsmwrapError, InvalidKeyMaterial, UnsupportedOperation
from hsmwrap.sm2 import decode_spki, open_engine
from hsmwrap.testing.clients import (
    ClientFailed,
    decrypt_message,
    encrypt_message,
    pyca_encrypt,
)

THREADS = 8
_RUNS, _SECONDS = 20, 0.5  # of one operation: so many, or for so long
_FORK_SECONDS = 60.0
_KEEP = timedelta(minutes=10)  # until a reaper removes what a killed doctor left
_DATA = _ADDITIONAL_DATA = b"purpose=doctor"

_T = TypeVar("_T")


@dataclass(slots=True)
class Row:
    """One row of the compatibility table.

    Attributes:
        spec: The wrapping key spec.
        algorithm: The wrapping algorithm.
        capability: What the backend reports; None where it does not serve the row.
        reason: Why the exposure is not in_hsm, or why the row is not served.
        tried: What was tried instead, and failed.
        failure: What went wrong with a real import; None if nothing, or if there was none.
        issue_ms: Milliseconds to make the wrapping key.
        import_ms: Milliseconds to import under it.
    """

    spec: WrappingKeySpec
    algorithm: WrappingAlgorithm
    capability: WrappingCapability | None
    reason: str = ""
    tried: tuple[FailedTrial, ...] = ()
    failure: str | None = None
    issue_ms: float | None = None
    import_ms: float | None = None


@dataclass(slots=True)
class Key:
    """One key spec: imported, used by backend and pyca in turn, and destroyed.

    Attributes:
        capability: What the backend reports.
        outcome: ``used``, ``stored`` or ``not tried``.
        failure: What went wrong; None if nothing.
    """

    capability: KeyCapability
    outcome: str = "not tried"
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Duration:
    """How long an operation takes: the median of so many runs, in milliseconds."""

    operation: str
    median_ms: float
    runs: int


@dataclass(slots=True)
class Findings:
    """What the examination found.

    Attributes:
        capabilities: The backend's report.
        rows: One for each row of the compatibility table.
        keys: One for each key spec.
        durations: One for each operation.
        threads: Calls per second of one thread and of :data:`THREADS`, and what went wrong.
        import_tokens: What went wrong with their authentication; None if nothing.
        fork: What went wrong in a forked child or after it; None if nothing.
        health: The backend's own facts, at the end.
    """

    capabilities: Capabilities
    rows: list[Row] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    durations: list[Duration] = field(default_factory=list)
    threads: dict[str, Any] = field(default_factory=dict)
    import_tokens: str | None = None
    fork: str | None = None
    health: dict[str, Any] = field(default_factory=dict)

    def broken(self) -> list[str]:
        """Each promise that was not kept, as a sentence."""
        broken = [f"{r.spec} {r.algorithm}: {r.failure}" for r in self.rows if r.failure]
        broken += [f"{k.capability.key_spec}: {k.failure}" for k in self.keys if k.failure]
        if self.import_tokens is not None:
            broken.append(f"import tokens: {self.import_tokens}")
        if self.threads.get("failure"):
            broken.append(f"{THREADS} threads: {self.threads['failure']}")
        if self.fork is not None:
            broken.append(f"fork: {self.fork}")
        return broken


class _Wrong(Exception):
    """What was seen is not what was reported; the text says both."""


def say(line: str) -> None:
    """Tell on stderr what is under way."""
    print(line, file=sys.stderr, flush=True)


def examine(backend: Backend) -> Findings:
    """Do what the backend reports that it can, and compare.

    Raises:
        HsmwrapError: The backend cannot report.
    """
    say("asking for the capability report")
    capabilities, probe_ms = timed(backend.capabilities)
    findings = Findings(capabilities)
    findings.durations.append(Duration("first capability report (the probe)", probe_ms, 1))
    for row in COMPATIBILITY_TABLE:
        findings.rows.append(_row(backend, capabilities, row.spec, row.algorithm))
    for capability in capabilities.keys:
        findings.keys.append(_key(backend, capability, findings))
    findings.import_tokens = _failure(lambda: _authenticate(backend, findings))
    say(f"{THREADS} threads")
    findings.threads = _threads(backend)
    say("fork")
    findings.fork = _fork(backend)
    findings.health = dict(backend.health().facts)
    return findings


def timed(call: Callable[[], _T]) -> tuple[_T, float]:
    """The result of ``call``, and its duration in milliseconds."""
    started = time.perf_counter()
    result = call()
    return result, round((time.perf_counter() - started) * 1000, 3)


# --- rows and keys -------------------------------------------------------------------------------


def _row(
    backend: Backend,
    capabilities: Capabilities,
    spec: WrappingKeySpec,
    algorithm: WrappingAlgorithm,
) -> Row:
    capability = capabilities.wrapping_for(spec, algorithm)
    if capability is None:
        missing = next(
            (m for m in capabilities.missing if (m.spec, m.algorithm) == (spec, algorithm)), None
        )
        reason = (
            missing.reason
            if missing
            else "Neither wrapping nor missing of its capabilities has this pair."
        )
        return Row(spec, algorithm, None, reason, missing.tried if missing else ())
    row = Row(spec, algorithm, capability, capability.reason, capability.tried)
    say(f"importing by {spec} {algorithm}")
    key_spec = capabilities.keys[0].key_spec if capabilities.keys else KeySpec.ALIYUN_AES_256
    row.failure = _failure(lambda: _import_by(backend, capability, key_spec, row))
    return row


def _import_by(
    backend: Backend, capability: WrappingCapability, key_spec: KeySpec, row: Row
) -> None:
    pair, row.issue_ms = timed(lambda: _wrapping_key(backend, capability))
    try:
        material = secrets.token_bytes(key_spec.material_length)
        imported, row.import_ms = timed(lambda: _import(backend, pair, key_spec, material))
        try:
            _require_check_value(imported, material)
        finally:
            backend.destroy_key(imported.key)
        _require_refusal(backend, pair, key_spec)
    finally:
        backend.discard_wrapping_key(pair.private_key)


def _require_refusal(backend: Backend, pair: WrappingKey, key_spec: KeySpec) -> None:
    if pair.algorithm is WrappingAlgorithm.RSAES_PKCS1_V1_5:
        return  # it has no integrity: what is random may pass for a key
    ciphertext = bytearray(_encrypt(pair, secrets.token_bytes(key_spec.material_length)))
    ciphertext[-1] ^= 1
    try:
        imported = _unwrap(backend, pair, bytes(ciphertext), key_spec)
    except InvalidKeyMaterial:
        return
    backend.destroy_key(imported.key)
    raise _Wrong("a changed ciphertext was imported")


def _key(backend: Backend, capability: KeyCapability, findings: Findings) -> Key:
    key = Key(capability)
    good = [row.capability for row in findings.rows if row.capability and row.failure is None]
    if not good:
        return key
    say(f"using {capability.key_spec}")

    def use() -> None:
        pair = _wrapping_key(backend, good[0])
        try:
            material = secrets.token_bytes(capability.key_spec.material_length)
            imported = _import(backend, pair, capability.key_spec, material)
            try:
                _require_check_value(imported, material)
                key.outcome = _use(backend, capability, imported, material, findings)
            finally:
                backend.destroy_key(imported.key)
        finally:
            backend.discard_wrapping_key(pair.private_key)

    key.failure = _failure(use)
    return key


def _use(
    backend: Backend,
    capability: KeyCapability,
    imported: ImportedKey,
    material: bytes,
    findings: Findings,
) -> str:
    key, spec, plaintext = imported.key, imported.key.key_spec, secrets.token_bytes(64)
    if not capability.usable:
        with suppress(UnsupportedOperation):
            backend.encrypt(key, plaintext, _ADDITIONAL_DATA)
            raise _Wrong("encrypts, though the report says that it cannot")
        return "stored"
    message = backend.encrypt(key, plaintext, _ADDITIONAL_DATA)
    if decrypt_message(spec, material, message, _ADDITIONAL_DATA) != plaintext:
        raise _Wrong("pyca decrypts the message to another plaintext")
    version = message[0]
    message = encrypt_message(spec, material, plaintext, _ADDITIONAL_DATA, version)
    if backend.decrypt(key, message, _ADDITIONAL_DATA) != plaintext:
        raise _Wrong("pyca's message is decrypted to another plaintext")
    findings.durations += [
        _median(f"encrypt 64 bytes, {spec}", lambda: backend.encrypt(key, plaintext)),
        _median(
            f"decrypt 64 bytes, {spec}", lambda: backend.decrypt(key, message, _ADDITIONAL_DATA)
        ),
    ]
    return "used"


def _wrapping_key(backend: Backend, capability: WrappingCapability) -> WrappingKey:
    expires_at = datetime.now(UTC) + _KEEP
    return backend.generate_wrapping_key(
        capability.spec, capability.algorithm, expires_at=expires_at
    )


def _import(backend: Backend, pair: WrappingKey, spec: KeySpec, material: bytes) -> ImportedKey:
    return _unwrap(backend, pair, _encrypt(pair, material), spec)


def _unwrap(backend: Backend, pair: WrappingKey, ciphertext: bytes, spec: KeySpec) -> ImportedKey:
    return backend.unwrap_material(pair.private_key, pair.algorithm, ciphertext, key_spec=spec)


def _encrypt(pair: WrappingKey, material: bytes) -> bytes:
    if pair.algorithm is not WrappingAlgorithm.SM2PKE:
        return pyca_encrypt(pair.algorithm, pair.public_key, material)
    return open_engine("libcrypto").encrypt(decode_spki(pair.public_key), material).to_c1c3c2()


def _require_check_value(imported: ImportedKey, material: bytes) -> None:
    method = imported.check_value[0]
    common = method in checkvalue.METHODS
    if common and imported.check_value != checkvalue.check_value(material, method):
        raise _Wrong("the check value is not that of the key material")


def _failure(check: Callable[[], object]) -> str | None:
    """What went wrong, in a line; None if nothing."""
    try:
        check()
    except (_Wrong, ClientFailed) as error:
        return str(error)
    except HsmwrapError as error:
        return f"{type(error).__name__}: {error}"
    return None


# --- how it does it ------------------------------------------------------------------------------


def _median(operation: str, call: Callable[[], object]) -> Duration:
    taken: list[float] = []
    end = time.monotonic() + _SECONDS
    while len(taken) < _RUNS and (not taken or time.monotonic() < end):
        taken.append(timed(call)[1])
    return Duration(operation, round(statistics.median(taken), 3), len(taken))


def _authenticate(backend: Backend, findings: Findings) -> None:
    mac = backend.mac(_DATA)
    findings.durations += [
        _median("authenticate an import token", lambda: backend.mac(_DATA)),
        _median("verify an import token", lambda: backend.verify_mac(_DATA, mac)),
    ]


def _threads(backend: Backend) -> dict[str, Any]:
    """The same by one thread and by several: all right, and how fast."""

    def work(number: int) -> int:
        done, data = 0, number.to_bytes(2, "big")
        end = time.monotonic() + _SECONDS
        while time.monotonic() < end:
            backend.verify_mac(data, backend.mac(data))
            done += 2
        return done

    found: dict[str, Any] = {"threads": THREADS, "failure": None}

    def both() -> None:
        found["calls_per_second_of_one"] = round(work(0) / _SECONDS)
        with ThreadPoolExecutor(THREADS) as pool:
            found["calls_per_second_of_all"] = round(sum(pool.map(work, range(THREADS))) / _SECONDS)

    found["failure"] = _failure(both)
    return found


def _fork(backend: Backend) -> str | None:
    """A child verifies what its parent made, while the parent goes on."""
    if not hasattr(os, "fork"):
        return None
    try:
        mac = backend.mac(_DATA)
    except HsmwrapError as error:
        return f"not tried: {type(error).__name__}: {error}"
    sys.stdout.flush()
    with warnings.catch_warnings():  # Python 3.12 warns where threads run: that is the trial
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        failed = _failure(lambda: backend.verify_mac(_DATA, mac))
        os._exit(0 if failed is None else 1)
    failed = _failure(lambda: backend.verify_mac(_DATA, backend.mac(_DATA)))
    status = _wait(child)
    if status is None:
        return f"the child did not end within {_FORK_SECONDS:.0f} seconds"
    if status:
        return f"the child ended with status {status}: it could not verify its parent's MAC"
    return failed and f"the parent failed meanwhile: {failed}"


def _wait(child: int) -> int | None:
    end = time.monotonic() + _FORK_SECONDS
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


# --- requirements --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Requirement:
    """A row that has to be served, and with this exposure if one is given."""

    spec: WrappingKeySpec
    algorithm: WrappingAlgorithm
    exposure: Exposure | None

    def __str__(self) -> str:
        return ":".join(filter(None, (self.spec, self.algorithm, self.exposure)))

    def unmet(self, rows: list[Row]) -> str | None:
        """Why it is not met; None if it is."""
        row = next(r for r in rows if (r.spec, r.algorithm) == (self.spec, self.algorithm))
        if row.capability is None:
            return f"{self} is required, but not served: {row.reason}"
        if row.failure is not None:
            return f"{self} is required, but the import failed: {row.failure}"
        if self.exposure is Exposure.IN_HSM and row.capability.exposure is not Exposure.IN_HSM:
            return f"{self} is required, but the exposure is host: {row.reason}"
        return None
