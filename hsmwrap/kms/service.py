"""The KMS: one entry point for API requests, and the typed operations below it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Self

from hsmwrap.arguments import checked, of_a_setting, of_the_api
from hsmwrap.backend import Backend, Exposure, Health
from hsmwrap.catalog import ProtectionLevel, WrappingAlgorithm
from hsmwrap.errors import (
    ConfigurationError,
    HsmwrapError,
    InvalidParameter,
    MissingParameter,
    ServiceUnavailable,
)
from hsmwrap.guard import guard_all, guarded
from hsmwrap.imports import (
    MAX_FAILED_IMPORTS,
    TOKEN_LIFETIME,
    ImportService,
    ResidentBounds,
    generate_inline,
)
from hsmwrap.keypool import KeyPool
from hsmwrap.kms.access import AccessKeys, Caller, FileAccessKeys
from hsmwrap.kms.anchors import ANCHOR_LINES, AnchoredLog
from hsmwrap.kms.api import OPERATIONS, Operations, Uses
from hsmwrap.kms.audit import SYSTEM, AuditEntry, AuditFailed, AuditLog
from hsmwrap.kms.core import Core, by_name, no_step
from hsmwrap.kms.database import Database
from hsmwrap.kms.errors import (
    AccessDeniedError,
    DryRunOperationError,
    InvalidAction,
    NoPermission,
    ValidationError,
)
from hsmwrap.kms.nonces import NonceStore
from hsmwrap.kms.objects import LEASE, Objects
from hsmwrap.kms.once import (
    FailedImportTokens,
    OnceStore,
    ResidentWrappingKeys,
    UsedImportTokens,
)
from hsmwrap.kms.rows import key_rows
from hsmwrap.kms.sweeper import Sweep, Sweeper
from hsmwrap.kms.unusable import UnusableKeys
from hsmwrap.policy import Deployment

_HEALTH_LOCK_SECONDS = 1.0
_CLOSING_LOCK_SECONDS = 1.0
_KEYS = frozenset({"KeyId", "DestinationKeyId"})
# Lines that cannot be written after this look are owed, and nothing else is done meanwhile.
_CHECK_AGE_SECONDS = 0.05

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Audited:
    """The facts of a request for its audit lines: one for each use of a key."""

    uses: Uses
    alias: str | None = None
    outcome: str = "ok"


class Kms:
    """A KMS on a database and backends. Safe to share between threads, and after ``fork()``.

    Attributes:
        access_keys: The access keys, for the protocol layer.
        nonces: The used nonces, for the protocol layer.
        operations: The typed operations, without permissions and audit.
    """

    @checked(of_a_setting)
    def __init__(
        self,
        database: Database,
        backends: Mapping[ProtectionLevel, Backend],
        deployment: Deployment,
        *,
        former_backends: Collection[Backend] = (),
        access_keys: AccessKeys,
        audit_log: AuditLog,
        anchor_lines: int = ANCHOR_LINES,
        arn_prefix: str = "acs:kms:cn-hangzhou:1000000000000000:key/",
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        token_lifetime: timedelta = TOKEN_LIFETIME,
        single_use: bool = False,
        max_failed_imports: int = MAX_FAILED_IMPORTS,
        resident_bounds: ResidentBounds | None = None,
        required_exposure: Exposure | None = None,
        refused_algorithms: Collection[WrappingAlgorithm] = (),
        key_pool: KeyPool | None = None,
        import_lease: timedelta = LEASE,
        sweep_seconds: float | None = None,
        reseal_at_once: int = 0,
        step: Callable[[str], None] = no_step,
    ) -> None:
        """Build the KMS, clean up after crashes, and start the sweeper.

        Args:
            database: The database, with an up-to-date schema. The KMS closes it.
            backends: The backend of each protection level. The KMS closes them.
            deployment: Where this runs, for the policy.
            former_backends: Backends of which only the keys are used that they have, and the import
                tokens honoured that they issued. The KMS closes them.
            access_keys: The access keys, for the protocol layer.
            audit_log: Gets a line for each operation.
            anchor_lines: How many lines of it may be behind its anchor; 1: each line is anchored
                before its operation is answered.
            arn_prefix: The part of an ARN before the key id.
            clock: Returns the current aware time.
            token_lifetime: Validity of import tokens.
            single_use: True makes import tokens single-use, in all processes on the database.
            max_failed_imports: How many imports under one import token may fail before it is
                refused, in all processes on the database.
            resident_bounds: How many resident wrapping keys may be outstanding, by the rows of the
                database and not by the objects in the HSM: those of other KMSs do not count.
            required_exposure: ``Exposure.IN_HSM`` refuses HSM-level imports through the host.
            refused_algorithms: Wrapping algorithms that are turned off.
            key_pool: Makes wrapping key pairs ahead; None: generate at each call. The KMS closes
                it.
            import_lease: How long an import may take before other processes treat it as dead.
            sweep_seconds: Pause between sweeps; None: only :meth:`sweep` sweeps.
            reseal_at_once: How many sealed keys one sweep moves to the current key set; 0: none.
            step: Called with the name of each step after which a crash matters; for tests.

        Raises:
            ConfigurationError: Two backends have the same name.
            UnsupportedProtectionLevel: A backend does not serve the level it is configured for.
        """
        self.access_keys = access_keys
        self._database = database
        self._backends = backends = guard_all(backends)
        self._former = tuple(guarded(backend) for backend in former_backends)
        named = by_name((*backends.values(), *self._former))
        self._key_pool = key_pool
        self._audit = AnchoredLog(database, audit_log, anchor_lines)
        self._clock = clock
        self._arn_prefix = arn_prefix
        once = OnceStore(database, clock)
        self.nonces = NonceStore(database, clock)
        used_tokens = UsedImportTokens(once) if single_use else None
        imports = ImportService(
            backends,
            deployment,
            former_backends=self._former,
            clock=clock,
            token_lifetime=token_lifetime,
            required_exposure=required_exposure,
            refused_algorithms=refused_algorithms,
            used_tokens=used_tokens,
            failed_imports=FailedImportTokens(database),
            max_failed_imports=max_failed_imports,
            resident_keys=ResidentWrappingKeys(database, clock),
            resident_bounds=resident_bounds,
            key_source=key_pool or generate_inline,
        )
        self._unusable = UnusableKeys(database, named)
        objects = Objects(database, named, clock, import_lease, step)
        self._rows = key_rows(database)
        core = Core(
            database,
            self._backends,
            named,
            deployment,
            imports,
            objects,
            clock,
            arn_prefix,
            self._rows,
            self._audit_system,
            self._unusable,
            used_tokens,
            step,
        )
        self.operations = Operations(core)
        self._sweep = Sweep(
            core, (once.purge, self.nonces.purge), self._audit.anchor, reseal_at_once
        )
        self.sweep()
        self._sweeper = Sweeper(self.sweep, sweep_seconds) if sweep_seconds else None

    @checked(of_the_api)
    def execute(
        self, action: str, parameters: Mapping[str, str], caller: Caller, request_id: str
    ) -> dict[str, Any]:
        """Run an API request: validate, check the permission, run the operation, audit.

        Args:
            action: The API's action (``CreateKey``).
            parameters: The operation's own parameters as text, without the protocol's common ones
                (Action, Version, Format, Signature…).
            caller: The authenticated caller.
            request_id: The request's id in the answer, the log and the audit log.

        Returns:
            The fields of the answer, with RequestId; serialisable as JSON.

        Raises:
            AuditFailed: The audit log cannot be written. The operation was not run, unless the log
                failed after the check at the start.
            AuditLocked: Another process held the audit log's lock for too long; as AuditFailed.
            HsmwrapError: ``code``, ``http_status`` and ``api_message`` are the answer.
        """
        self._audit.log.check(max_age=_CHECK_AGE_SECONDS)
        named = self._without_arns(parameters)
        with self._audited(action, named, caller, request_id) as audited:
            operation = OPERATIONS.get(action)
            if operation is None:
                raise InvalidAction("the API has no such action")
            request = operation.request(self.operations, named, caller.access_key_id)
            audited.alias = request.arguments.get("AliasName", request.alias)
            # Each once: an alias may be given to the key that has it.
            uses = operation.uses(request) if operation.uses else ((action, request.key_id),)
            audited.uses = dict.fromkeys(uses)
            for use, key_id in audited.uses:
                if not caller.permissions.allows(use, key_id):
                    raise NoPermission(f"{caller.access_key_id} may not {use} this key")
            request.require_alias()
            fields = operation.run(self.operations, request)
            if made := fields.get("KeyMetadata"):
                audited.uses = ((action, made["KeyId"]),)
            if request.arguments.get("DryRun"):
                raise DryRunOperationError("the request would have succeeded without DryRun")
        return fields | {"RequestId": request_id}

    @checked(of_the_api)
    def record_refusal(self, action: str, caller: Caller, request_id: str, code: str) -> None:
        """Audit a request that the protocol refused; the caller is who it claims to be."""
        self._audit.append(
            AuditEntry(request_id, caller.access_key_id, action, None, code, client=caller.address)
        )

    @checked(of_the_api)
    def sweep(self, now: datetime | None = None) -> None:
        """Process due work: expired material, key deletions, orphaned objects, old nonces."""
        self._sweep(now or self._clock())

    def health(self) -> Health:
        """Report the state without waiting for a lost HSM.

        ``facts`` has the state of each part (``database``, ``audit log``, ``backend HSM`` …).
        """
        parts, failed = {}, []
        for part, backend in (
            *((f"backend {level}", backend) for level, backend in self._backends.items()),
            *((f"former backend {backend.name}", backend) for backend in self._former),
        ):
            health = backend.health()
            parts[part] = health.detail
            if not health.ready:
                failed.append(part)
        for part, check in (
            ("access keys", self._check_access_keys),
            ("database", self._check_database),
            ("audit log", self._check_audit_log),
            ("keys", self._unusable.said),
        ):
            try:
                parts[part] = check() or "ready"
            except (ServiceUnavailable, AuditFailed, ConfigurationError) as error:
                parts[part] = str(error)
                failed.append(part)
        detail = f"not ready: {', '.join(failed)}" if failed else "ready"
        return Health(not failed, detail, parts)

    def _check_access_keys(self) -> str | None:
        keys = self.access_keys
        fault = keys.fault() if isinstance(keys, FileAccessKeys) else None
        return fault and f"ready with the keys of before, not with those of the file: {fault}"

    def _check_database(self) -> str | None:
        self._database.ping()
        schema = self._database.schema()
        if schema.is_newer:
            return f"ready, but {schema}: update this process"
        if not schema.is_current:
            raise ConfigurationError(str(schema))
        return None

    def _check_audit_log(self) -> str | None:
        self._audit.log.check(lock_seconds=_HEALTH_LOCK_SECONDS)
        return None if self._audit.whole else "ready, but a line is missing: hsmwrap audit verify"

    def gauges(self) -> dict[str, float | Mapping[tuple[str, ...], float]]:
        """Facts of the KMS itself, for metrics: a value, or one for each tuple of labels."""
        try:
            current = self._check_access_keys() is None
        except ConfigurationError:
            current = False
        return {
            "access_keys_current": current,
            "audit_failures": self._audit.log.failures,
            "audit_log_whole": self._audit.whole,
            "keys_unusable": self._unusable.number,
            "last_sweep_timestamp_seconds": self._sweep.ended,
            "processes_ready": self.health().ready,  # they are added up
            "sweep_failures": self._sweep.failures,
            **self._sweep.counted,
        }

    def watched(self) -> tuple[tuple[Backend, ...], tuple[KeyPool, ...]]:
        """Backends and key-pair pools, for metrics."""
        pools = () if self._key_pool is None else (self._key_pool,)
        return (*self._backends.values(), *self._former), pools

    def close(self) -> None:
        """Stop sweeper and key-pair pool, write owed audit lines, close backends and database.

        The audit log is anchored. A line that still cannot be written is lost, and logged.
        Safe to call again.
        """
        if self._sweeper is not None:
            self._sweeper.stop()
        if self._key_pool is not None:
            self._key_pool.close()
        for backend in (*self._backends.values(), *self._former):
            backend.close()
        self._audit.log.write_owed(_CLOSING_LOCK_SECONDS)
        self._audit.try_to_anchor()
        self.nonces.close()
        self._rows.close()
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _without_arns(self, parameters: Mapping[str, str]) -> Mapping[str, str]:
        return {
            name: text.removeprefix(self._arn_prefix) if name in _KEYS else text
            for name, text in parameters.items()
        }

    @contextmanager
    def _audited(
        self, action: str, named: Mapping[str, str], caller: Caller, request_id: str
    ) -> Iterator[_Audited]:
        audited = _Audited(((action, named.get("KeyId")),))
        try:
            yield audited
        except HsmwrapError as error:
            answered = _of_dry_run(error, action, named)
            audited.outcome = answered.code
            if answered is not error:
                raise answered from error
            raise
        except BaseException:
            audited.outcome = HsmwrapError.code
            raise
        finally:
            entries = (
                AuditEntry(
                    request_id,
                    caller.access_key_id,
                    use,
                    key_id,
                    audited.outcome,
                    audited.alias,
                    caller.address,
                )
                for use, key_id in audited.uses
            )
            self._audit.append(*entries)

    def _audit_system(self, action: str, key_id: str) -> None:
        self._audit.append(AuditEntry("", SYSTEM, action, key_id, "ok"))


def _of_dry_run(error: HsmwrapError, action: str, named: Mapping[str, str]) -> HsmwrapError:
    """The error that answers the request: a dry run has codes of its own for some."""
    operation = OPERATIONS.get(action)
    if operation is None or "DryRun" not in operation.parameters:
        return error
    if named.get("DryRun", "").lower() != "true":
        return error
    if isinstance(error, InvalidParameter | MissingParameter):
        return ValidationError(str(error))
    return AccessDeniedError(str(error)) if isinstance(error, NoPermission) else error
