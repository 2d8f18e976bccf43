"""What of a configuration can be checked without opening HSM and database; and trying to open them.

``hsmwrap config check`` and ``hsmwrap serve`` ask the same function, so neither refuses what the
other takes. Nothing is changed, nothing is connected to, and no PIN is tried by :func:`check`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hsmwrap import registry
from hsmwrap.backend import HasKeySets, KeySetInfo
from hsmwrap.errors import ConfigurationError, HsmwrapError, UnsupportedOperation
from hsmwrap.kms.access import FileAccessKeys
from hsmwrap.kms.config import BackendConfig, LimitsConfig, ServerConfig, name_of, require_own_names
from hsmwrap.kms.keysets import missing_from, usage_of, usage_of_backends
from hsmwrap.kms.opening import audit_key, open_audit_log, open_database
from hsmwrap.kms.tls import open_tls

_WILDCARDS = frozenset({"0.0.0.0", "::"})  # noqa: S104 (compared with, not listened on)
_SERVER_SETTINGS = (
    (ServerConfig.model_fields, "before the first [table] of the file"),
    (LimitsConfig.model_fields, "into the table [limits]"),
)


def check(config: ServerConfig) -> None:
    """Refuse what a server would refuse, as far as it shows without HSM and database.

    Raises:
        ConfigurationError: Everything that is wrong, each with what would be right.
    """
    require_none(find_problems(config))


def require_none(problems: list[str]) -> None:
    """Refuse a configuration in which these were found.

    Raises:
        ConfigurationError: There are some; the text has all of them.
    """
    if problems:
        raise ConfigurationError(f"configuration: {'; '.join(problems)}")


def find_problems(config: ServerConfig) -> list[str]:
    """What a server would refuse, as far as it shows without HSM and database; a text for each."""
    parts: tuple[Callable[[ServerConfig], object], ...] = (
        *(_backend_check(table, backend) for table, backend in _tables(config)),
        require_own_names,
        _check_access_keys,
        open_tls,
        lambda config: audit_key(config.audit_key_file),
        _check_audit_file,
        _check_database,
        _check_written_files,
        _check_addresses,
    )
    found = []
    for part in parts:
        try:
            part(config)
        except HsmwrapError as error:
            found.append(str(error))
    return list(dict.fromkeys(found))


def _tables(config: ServerConfig) -> Iterator[tuple[str, BackendConfig]]:
    yield from ((f"backends.{level}", backend) for level, backend in config.backends.items())
    for name, backend in config.former_backends.items():
        yield f"former_backends.{name}", backend


def _backend_check(table: str, backend: BackendConfig) -> Callable[[ServerConfig], None]:
    def check_backend(_config: ServerConfig) -> None:
        try:
            levels = registry.check_settings(backend.plugin, backend.settings)
        except HsmwrapError as error:
            hint = "".join(
                f"; {name} is a setting of the server: put it {where}"
                for fields, where in _SERVER_SETTINGS
                for name in backend.settings
                if name in fields
            )
            raise ConfigurationError(f"[{table}] {error}{hint}") from None
        kind, _, level = table.partition(".")
        if levels is not None and kind == "backends" and level not in levels:
            raise ConfigurationError(
                f"[{table}] a backend of plug-in {backend.plugin} with these settings serves "
                f"{', '.join(sorted(levels))}, not {level}"
            )

    return check_backend


def _check_access_keys(config: ServerConfig) -> None:
    if config.access_key_file is None:
        raise ConfigurationError("access_key_file: required; set it to the file of access keys")
    FileAccessKeys(config.access_key_file)


def _check_audit_file(config: ServerConfig) -> None:
    file = config.audit_file
    fault = _not_writable(file.resolve().parent, "directory")
    if file.exists():
        fault = _not_writable(file, "file")
    if fault:
        raise ConfigurationError(f"audit_file: {fault}")


def _not_writable(path: Path, kind: str) -> str | None:
    """Why this directory or file cannot be written; None where it can."""
    if not path.exists():
        return f"the directory {path} is not there: make it"
    if not (path.is_dir() if kind == "directory" else path.is_file()):
        return f"{path} is not a {kind}"
    if not os.access(path, os.W_OK | (os.X_OK if kind == "directory" else os.R_OK)):
        return f"the {kind} {path} cannot be written by this user"
    return None


def _check_database(config: ServerConfig) -> None:
    database = open_database(config)
    try:
        file = database.file
        if file is None:
            database.check_options()
            return
        if fault := _not_writable(file.parent, "directory"):
            raise ConfigurationError(f"database_url: {fault}")
        if file.exists() and (fault := _not_writable(file, "file")):
            raise ConfigurationError(f"database_url: {fault}")
        database.check_files()
    finally:
        database.close()


def _check_written_files(config: ServerConfig) -> None:
    """Refuse a file for the audit log or the database that another setting names as well."""
    named = {name: getattr(config, name) for name in ServerConfig.model_fields}
    for table, backend in _tables(config):
        named |= {f"{table}.settings.{name}": value for name, value in backend.settings.items()}
    files = {
        name: Path(file).resolve()
        for name, file in named.items()
        if name.endswith("_file") and isinstance(file, str | Path)
    }
    with closing(open_database(config)) as database:
        if database.file is not None:
            files["database_url"] = database.file
    for written in ("audit_file", "database_url"):
        for other, file in files.items():
            if other != written and file == files.get(written):
                raise ConfigurationError(f"{written}: {other} names that file too; take another")


def _check_addresses(config: ServerConfig) -> None:
    _require_address("host", config.host)
    if not config.metrics_address:
        return
    host, _, port = config.metrics_address.rpartition(":")
    host = host.strip("[]")
    if int(port) > 65_535:  # noqa: PLR2004 (the highest port)
        raise ConfigurationError("metrics_address: a port is at most 65535")
    _require_address("metrics_address", host)
    if int(port) == config.port != 0 and (host == config.host or {host, config.host} & _WILDCARDS):
        raise ConfigurationError("metrics_address: is the address of the API; take another port")


def _require_address(setting: str, host: str) -> None:
    """Refuse what is not an address of this machine: listens on it for a moment, on a free port."""
    if host in ("", "*"):
        raise ConfigurationError(f"{setting}: takes an address; 0.0.0.0 and :: are all of them")
    try:
        family, *_, address = socket.getaddrinfo(
            host, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(address)
    except OSError as error:
        raise ConfigurationError(
            f"{setting}: cannot listen there: {error.strerror}; takes an address of this machine, "
            "such as 127.0.0.1, without a scheme"
        ) from None


@dataclass(frozen=True, slots=True)
class Tried:
    """What came of trying a part of a KMS."""

    part: str
    ok: bool
    detail: str


def try_to_open(config: ServerConfig) -> Iterator[Tried]:
    """Open each backend and the database, once and without waiting for them; closes them again.

    A backend is opened as the server would: it logs in, so a wrong PIN costs a try.
    """
    listed: dict[str, tuple[KeySetInfo, ...]] = {}
    for table, wanted in _tables(config):
        yield _tried(table, partial(_try_backend, wanted, listed))
    yield _tried("database", partial(_try_database, config))
    yield _tried("stored keys", partial(_try_stored_keys, config, listed))
    yield _tried("audit log", partial(_try_audit_log, config))


def _tried(part: str, attempt: Callable[[], str]) -> Tried:
    try:
        return Tried(part, ok=True, detail=attempt())
    except HsmwrapError as error:
        return Tried(part, ok=False, detail=str(error))


def _try_backend(wanted: BackendConfig, listed: dict[str, tuple[KeySetInfo, ...]]) -> str:
    """Use a backend; notes its key sets by its name, where ``hsmwrap keys`` can list them."""
    with registry.open_backend(wanted.plugin, wanted.settings) as backend:
        backend.mac(b"")  # also one that is lazy connects
        key_sets = HasKeySets.of(backend)
        current = f", current key set {key_sets.current_key_set()}" if key_sets else ""
        opened = f"{backend.name}{current}"
    with suppress(UnsupportedOperation):
        manager = registry.KeySetManager(wanted.plugin, wanted.settings)
        listed[name_of(wanted)] = manager.list()
    return opened


def _try_stored_keys(config: ServerConfig, listed: Mapping[str, tuple[KeySetInfo, ...]]) -> str:
    configured = {name_of(backend) for _, backend in _tables(config)}
    with closing(open_database(config)) as database:
        if not database.schema().is_current:
            return "none yet"
        used = usage_of_backends(database)
        usage = {name: usage_of(database, name) for name in listed}
    if missing := sorted({row.backend for row in used} - configured):
        raise ConfigurationError(
            f"some are in backends that are not configured: {', '.join(missing)}; add a table "
            "[former_backends.NAME] for each"
        )
    if lost := [
        f"{keys} need key set {key_set} of backend {name}"
        for name, sets in listed.items()
        for key_set, keys in missing_from(sets, usage[name]).items()
    ]:
        raise ConfigurationError(
            f"{', '.join(lost)}, which it does not have: restore a backup that has it"
        )
    return f"{sum(row.keys for row in used)}, all in backends that are configured"


def _try_audit_log(config: ServerConfig) -> str:
    if not config.audit_file.exists():
        return "is made at the first start"
    return f"goes on after line {open_audit_log(config).head().sequence}"


def _try_database(config: ServerConfig) -> str:
    database = open_database(config)
    try:
        if database.file is not None and not database.file.exists():
            return "is made at the first start"
        schema = database.schema()
        schema.require_not_newer()
        if not schema.is_current:
            return f"{schema}, which makes it at its start, or `hsmwrap db upgrade`"
        if faults := database.faults():
            raise ConfigurationError("; ".join(faults))
        return f"schema {schema.revision}"
    finally:
        database.close()
