"""From a configuration to a running KMS."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

from hsmwrap.backend import Backend
from hsmwrap.catalog import ProtectionLevel
from hsmwrap.errors import ConfigurationError, HsmwrapError, ServiceUnavailable
from hsmwrap.imports import ResidentBounds
from hsmwrap.keypool import KeyPool, PoolSettings
from hsmwrap.kms.access import AccessKeys, FileAccessKeys
from hsmwrap.kms.anchors import AnchoredLog
from hsmwrap.kms.audit import SYSTEM, AuditEntry, AuditLog
from hsmwrap.kms.config import BackendConfig, ServerConfig, require_table_name
from hsmwrap.kms.core import by_name
from hsmwrap.kms.database import Database
from hsmwrap.kms.keysets import Progress, StoredKeys
from hsmwrap.kms.service import Kms
from hsmwrap.observe import Observer, observed
from hsmwrap.privatefile import PrivateFile
from hsmwrap.registry import open_backend

_MIN_AUDIT_KEY = 32
_RESEALED_BY_A_SWEEP = 1000
# Seconds between attempts to start while a dependency is unavailable.
_FIRST_PAUSE = 0.25
_LONGEST_PAUSE = 4.0

_T = TypeVar("_T")

_log = logging.getLogger(__name__)


def open_kms(
    config: ServerConfig,
    *,
    access_keys: AccessKeys | None = None,
    observer: Observer | None = None,
) -> Kms:
    """Open backends and database, migrate the schema if it is old, clean up, start the sweeper.

    If a backend or the database is unavailable, or no slot lists the HSM token, the call retries
    for ``startup_wait``, so that a process that restarts during an outage survives it like the
    running ones.

    Args:
        config: The configuration.
        access_keys: Used in place of the configuration's file of access keys.
        observer: Receives each call of a backend.

    Raises:
        ConfigurationError: The configuration is wrong or names something that cannot be used.
        HsmwrapError: A backend or the database cannot be opened; nothing is left open.
    """
    deadline = time.monotonic() + config.startup_wait.total_seconds()
    with ExitStack() as opened:
        backends, former = _open_backends(config, observer, opened, deadline)
        key_pool = KeyPool(
            PoolSettings(
                config.key_pool, config.key_pool // 2, token_lifetime=config.token_lifetime
            )
        )
        opened.callback(key_pool.close)
        database = open_database(config)
        opened.callback(database.close)
        _with_retries(database.prepare, deadline)
        kms = Kms(
            database,
            backends,
            config.deployment(),
            former_backends=former,
            access_keys=access_keys or _access_keys(config),
            audit_log=open_audit_log(config),
            anchor_lines=config.audit_anchor_lines,
            arn_prefix=f"acs:kms:{config.region}:{config.account_id}:key/",
            token_lifetime=config.token_lifetime,
            single_use=config.single_use,
            max_failed_imports=config.max_failed_imports,
            resident_bounds=ResidentBounds(
                config.max_resident_keys_of_cmk, config.max_resident_keys
            ),
            required_exposure=config.required_exposure,
            refused_algorithms=config.refused_algorithms,
            key_pool=key_pool,
            reseal_at_once=_RESEALED_BY_A_SWEEP if config.reseal else 0,
            sweep_seconds=config.sweep_interval.total_seconds() or None,
        )
        opened.pop_all()
        return kms


def try_kms(config: ServerConfig) -> None:
    """Open a KMS as a server would, wait until it is ready, and close it again.

    It waits for ``startup_wait`` at most. A wrong PIN costs one try.

    Raises:
        HsmwrapError: It does not open, or is not ready then; the text says which part is not.
    """
    deadline = time.monotonic() + config.startup_wait.total_seconds()
    quiet = {"key_pool": 0, "sweep_interval": timedelta()}
    with open_kms(config.model_copy(update=quiet)) as kms:
        while not (health := kms.health()).ready:
            if time.monotonic() > deadline:
                said = "; ".join(f"{part}: {state}" for part, state in health.facts.items())
                raise ServiceUnavailable(f"{health.detail} ({said})")
            time.sleep(_FIRST_PAUSE)


@contextmanager
def opened_stored_keys(
    config: ServerConfig, backend: Backend, *, moves: bool = False
) -> Iterator[StoredKeys]:
    """The stored keys of one backend of a server, beside its processes; with an audit log.

    Args:
        config: The server's.
        backend: The backend.
        moves: Whether keys will be moved, so that the audit log has to be writable.

    Raises:
        ConfigurationError: The configuration names something that cannot be used.
        UnsupportedOperation: The backend does not re-seal keys.
        ServiceUnavailable: The database is unavailable.
        AuditFailed: The audit log cannot be written, and keys will be moved.
    """
    database = open_database(config)
    try:
        database.prepare()
        log = AnchoredLog(database, open_audit_log(config), config.audit_anchor_lines)
        if moves:
            log.log.check()

        def audit(action: str, key_id: str) -> None:
            log.append(AuditEntry("", SYSTEM, action, key_id, "ok"))

        yield StoredKeys(database, backend, audit)
        log.try_to_anchor()
    finally:
        database.close()


@contextmanager
def audited_command(config: ServerConfig, action: str, facts: Mapping[str, str]) -> Iterator[None]:
    """A line in the audit log of a server for a command: what came of the block.

    A log that is not there yet is made by the user alone to whom its directory belongs: what root
    makes, the server cannot write. Without it no line is written.

    Args:
        config: The server's.
        action: The action of the line.
        facts: Its further members, as they are at the end.

    Raises:
        ConfigurationError: The configuration names something that cannot be used.
        AuditFailed: The log cannot be written. Before the block that means that nothing was done.
    """
    log = open_audit_log(config)
    path = log.path.resolve()
    if not path.exists() and path.parent.stat().st_uid != os.geteuid():
        _log.warning("the server has no audit log yet: the command is not in it")
        yield
        return
    log.check()
    outcome = "ok"
    try:
        yield
    except BaseException as error:
        outcome = type(error).__name__
        raise
    finally:
        log.append(AuditEntry("", SYSTEM, action, None, outcome, facts=facts))
        with closing(open_database(config)) as database:
            if database.schema().is_current:
                AnchoredLog(database, log, config.audit_anchor_lines).try_to_anchor()


def try_stored_keys(config: ServerConfig, plugin: str, settings: Mapping[str, Any]) -> Progress:
    """Open each stored key of a server on another HSM; its rows are read and stay as they are.

    Args:
        config: The server's.
        plugin: The backend plug-in.
        settings: Of the other HSM, with key sets that open the keys, and a newer one.

    Raises:
        ConfigurationError: The configuration names something that cannot be used.
        UnsupportedOperation: The backend does not re-seal keys.
        ServiceUnavailable: The backend or the database is unavailable.
    """
    database = open_database(config)
    try:
        with open_backend(plugin, settings) as backend:
            return StoredKeys(database, backend, lambda _action, _key_id: None).try_each()
    finally:
        database.close()


def open_database(config: ServerConfig) -> Database:
    """The configured database; neither connected nor migrated yet.

    Raises:
        ConfigurationError: The URL is neither SQLite nor PostgreSQL.
    """
    url = config.database_url.get_secret_value()
    return Database(url, pool_size=config.limits.database_pool_size)


def open_audit_log(config: ServerConfig) -> AuditLog:
    """The configured audit log.

    Raises:
        ConfigurationError: Its key file cannot be read, or is open to others.
    """
    return AuditLog(
        config.audit_file,
        lambda: datetime.now(UTC),
        audit_key(config.audit_key_file),
        config.audit_sync,
        config.audit_log_id,
        max_bytes=config.audit_max_bytes,
    )


def audit_key(path: Path | None) -> bytes | None:
    """The HMAC key in a file; None without one.

    Raises:
        ConfigurationError: The file is not private, or too short.
    """
    if path is None:
        return None
    key = PrivateFile(path, "audit_key_file").read_bytes()
    if len(key) < _MIN_AUDIT_KEY:
        raise ConfigurationError(f"{path}: an audit key has at least {_MIN_AUDIT_KEY} bytes")
    return key


def _access_keys(config: ServerConfig) -> AccessKeys:
    if config.access_key_file is None:
        raise ConfigurationError("access_key_file: required; set it to the file of access keys")
    return FileAccessKeys(config.access_key_file)


def _open_backends(
    config: ServerConfig, observer: Observer | None, opened: ExitStack, deadline: float
) -> tuple[dict[ProtectionLevel, Backend], list[Backend]]:
    """The backends of the levels, and the former ones; equal configurations share one."""
    known: list[tuple[BackendConfig, Backend]] = []

    def opened_once(wanted: BackendConfig) -> Backend:
        same = next((backend for config, backend in known if config == wanted), None)
        if same is None:
            same = _with_retries(_opening(wanted), deadline)
            opened.callback(same.close)
            same = observed(same, observer) if observer else same
            known.append((wanted, same))
            by_name(backend for _, backend in known)
        return same

    levels = {level: opened_once(wanted) for level, wanted in config.backends.items()}
    former = []
    for name, wanted in config.former_backends.items():
        backend = opened_once(wanted)
        require_table_name(name, backend.name)
        former.append(backend)
    return levels, former


def _opening(wanted: BackendConfig) -> Callable[[], Backend]:
    # Not a partial: its repr shows the settings, and so a PIN in them.
    return lambda: open_backend(wanted.plugin, wanted.settings)


def _with_retries(call: Callable[[], _T], deadline: float) -> _T:
    """Repeat the call with growing pauses on retryable errors, until the monotonic deadline."""
    pause = _FIRST_PAUSE
    while True:
        try:
            return call()
        except HsmwrapError as error:
            if not error.retryable or time.monotonic() + pause > deadline:
                raise
            facts = {"code": error.code, "why": str(error), "seconds": pause}
            _log.warning("cannot start yet; retrying", extra=facts)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
