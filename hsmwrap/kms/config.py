"""Configuration: one TOML file, and environment variables that outrank it.

A variable is named ``HSMWRAP_SERVER_`` and the key in capitals, with ``__`` between the levels
(``HSMWRAP_SERVER_LIMITS__MAX_REQUEST_BYTES``). A key or variable that nothing reads is an error.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from datetime import timedelta
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from hsmwrap.backend import Exposure
from hsmwrap.catalog import (
    REGIONS,
    ManagedHsm,
    ProtectionLevel,
    WrappingAlgorithm,
    loggable,
)
from hsmwrap.errors import ConfigurationError, strip_tracebacks
from hsmwrap.imports import MAX_FAILED_IMPORTS, MAX_RESIDENT_KEYS, MAX_RESIDENT_KEYS_OF_CMK
from hsmwrap.kms.anchors import ANCHOR_LINES
from hsmwrap.kms.schema import LOG_ID_LENGTH
from hsmwrap.policy import Deployment
from hsmwrap.settings import REQUIRED, Setting, did_you_mean

ENV_PREFIX = "HSMWRAP_SERVER_"

# The text under a setting is its description.
_STRICT = ConfigDict(
    extra="forbid", frozen=True, hide_input_in_errors=True, use_attribute_docstrings=True
)


def _as_seconds(value: Any) -> Any:
    """Variables are text, and pydantic takes text for ISO 8601 only."""
    return (
        float(value) if isinstance(value, str) and value.isascii() and value.isdecimal() else value
    )


def _not_for_ever(value: timedelta) -> timedelta:
    # Times in which it ends have to exist, and threads wait for it.
    if value > _LONGEST:
        raise ValueError
    return value


_LONGEST = timedelta(days=3660)
Seconds = Annotated[timedelta, BeforeValidator(_as_seconds), AfterValidator(_not_for_ever)]
"""A duration: a number of seconds, or ISO 8601 (``PT24H``); at most ten years."""


class _Table(BaseModel):
    """A table of settings, where true and false are not numbers."""

    @field_validator("*", mode="before")
    @classmethod
    def _not_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false but for a switch: pydantic takes them for 1 and 0."""
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and field.annotation is not bool:
            raise ValueError
        return value


class BackendConfig(BaseModel):
    """A backend."""

    model_config = _STRICT

    plugin: str
    """The backend's plug-in, as `hsmwrap backends` names it."""
    settings: dict[str, Any] = Field(default={}, repr=False)  # a PIN may be in it
    """The settings of the backend itself."""


class LimitsConfig(_Table):
    """How much is taken from a client at once."""

    model_config = _STRICT

    max_request_bytes: int = Field(default=131_072, ge=4_096)
    """Longest request, in bytes."""
    max_threads: int = Field(default=16, ge=1)
    """Requests that one process serves at a time, at most; fewer while they compute."""
    max_connections: int = Field(default=1000, ge=1)
    """Open connections of one process; at most half of its file descriptors."""
    max_connections_per_address: int = Field(default=500, ge=0)
    """Open connections of one client address and one process; 0: no limit."""
    database_pool_size: int = Field(default=16, ge=1)
    """Pooled database connections of one process; with PostgreSQL up to `max_threads` more."""
    max_requests: int = Field(default=0, ge=0)
    """After so many requests, and up to half as many more at random, a process ends and another
    takes its place: for HSM modules that leak memory. Pages such as /readyz do not count. 0:
    never."""
    shutdown_seconds: float = Field(default=30, ge=0, le=86_400)
    """How long a shutdown waits for running requests."""
    drain_seconds: float = Field(default=0, ge=0, le=86_400)
    """How long after SIGTERM `/readyz` answers 503 while requests are still served, before the
    shutdown: the time that a load balancer takes to notice."""


class ServerConfig(_Table, BaseSettings):
    """Everything that a KMS server is told. :func:`settings_table` has it as rows."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = Field(default=8443, ge=0, le=65_535)
    """Port to listen on; 0 takes a free one."""
    metrics_address: str = Field(
        default="127.0.0.1:9443",
        pattern=r"^((\[[0-9A-Fa-f:.]+\]|[^\[\]:\s]+):[0-9]{1,5})?$",
        title="ADDRESS:PORT",
    )
    """Address and port of the page /metrics (`[::1]:9443`); empty: no page."""
    tls_certificate_file: Path | None = None
    """PEM file of the server's TLS certificate, then those of the authorities between it and the
    root. Without it: plain HTTP."""
    tls_key_file: Path | None = None
    """Private PEM file of its key, without a passphrase. Both files are read again when they
    change."""
    database_url: SecretStr = SecretStr("sqlite:///hsmwrap.db")
    """SQLAlchemy URL of SQLite or PostgreSQL (`postgresql+psycopg://…`)."""
    backends: dict[ProtectionLevel, BackendConfig]
    """The backend of each protection level: for new keys and imports, and the keys that it has."""
    former_backends: dict[str, BackendConfig] = {}
    """Backends, by their names, that only use the keys that they have, and import under the import
    tokens that they issued."""
    region: str = "cn-hangzhou"
    """Alibaba region id, for ARNs and the compatibility table. One that is not in the table takes
    `managed_hsm` as well."""
    managed_hsm: ManagedHsm | None = None
    """Class of the managed HSM. Without it: what the region has."""
    dedicated: bool = False
    """Whether this is a dedicated KMS instance."""
    account_id: str = Field(default="1000000000000000", pattern=r"^[0-9]{1,20}$")
    """Account id in ARNs: 1 to 20 digits."""
    token_lifetime: Seconds = Field(default=timedelta(hours=24), gt=timedelta(0))
    """Validity of import tokens."""
    single_use: bool = False
    """Whether an import token is for one import only."""
    max_failed_imports: int = Field(default=MAX_FAILED_IMPORTS, ge=1)
    """How many imports under one import token may fail before it is refused."""
    max_resident_keys_of_cmk: int = Field(default=MAX_RESIDENT_KEYS_OF_CMK, ge=1)
    """How many unexpired wrapping keys one CMK may have in the HSM (custody HsmInternal)."""
    max_resident_keys: int = Field(default=MAX_RESIDENT_KEYS, ge=1)
    """The same for all CMKs of this database together."""
    required_exposure: Exposure | None = None
    """`in_hsm` refuses HSM-level imports whose material passes the host."""
    refused_algorithms: frozenset[WrappingAlgorithm] = frozenset()
    """Wrapping algorithms that are turned off."""
    access_key_file: Path | None = None
    """Private TOML file of access keys. Without it the embedder brings them."""
    audit_file: Path = Path("audit.log")
    """The audit log."""
    audit_log_id: str | None = Field(default=None, min_length=1, max_length=LOG_ID_LENGTH)
    """What the database calls this audit log, another for each file. Without it: host and path; set
    it where the host's name changes, as in containers."""
    audit_key_file: Path | None = None
    """Private file with the HMAC key of the audit log's chain, at least 32 bytes. Without it the
    chain is of SHA-256."""
    audit_anchor_lines: int = Field(default=ANCHOR_LINES, ge=1)
    """How many lines of the audit log may be written before the database stores its end again, and
    so how many an attacker can cut off unnoticed; 1 stores it before each answer. Each sweep and
    the end of the server store it too."""
    audit_sync: bool = False
    """Wait for the disk with each line of the audit log; requests at the same time wait once."""
    audit_max_bytes: int = Field(default=0, ge=0)
    """Size in bytes at which the audit log goes on in a new file; 0: only `hsmwrap audit rotate`
    does that."""
    sweep_interval: Seconds = Field(default=timedelta(seconds=60), ge=timedelta(0))
    """Pause between sweeps, and so how long the end of the audit log may stay unstored; 0 switches
    the sweeper off."""
    reseal: bool = False
    """Whether sweeps move sealed keys to the current key set after a rotation. `hsmwrap keys
    reseal` does it at once."""
    startup_wait: Seconds = Field(default=timedelta(seconds=60), ge=timedelta(0))
    """How long the start waits for an HSM or a database that is unavailable, and for an HSM token
    that no slot lists."""
    key_pool: int = Field(default=0, ge=0, le=10_000)
    """Wrapping key pairs of each kind that are made ahead; 0: none."""
    core_dumps: bool = False
    """Whether a crash may write a core dump, and other processes of this user read the memory: for
    debugging, as secrets are in both."""
    limits: LimitsConfig = LimitsConfig()
    """How much is taken from a client at once."""

    @field_validator("backends", mode="before")
    @classmethod
    def _levels_in_capitals(cls, value: Any) -> Any:
        """Take the levels as they are named in variables, which arrive in small letters."""
        if not isinstance(value, dict):
            return value
        merged: dict[str, Any] = {}
        for level in sorted(value):  # capitals first: what the environment says comes after
            merged = _merged(merged, {str(level).upper(): value[level]})
        return merged

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 (the hook's signature)
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 (the hook's signature)
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 (the hook's signature)
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let the environment outrank what the file (given as arguments) says."""
        return env_settings, init_settings

    def deployment(self) -> Deployment:
        """Where this runs, for the policy."""
        if self.managed_hsm is None:
            return Deployment.of_region(self.region, dedicated=self.dedicated)
        return Deployment(self.managed_hsm, dedicated=self.dedicated)


def _require_known_region(config: ServerConfig) -> None:
    """Refuse a region that may be mistyped: it would silently have no managed HSM."""
    if config.managed_hsm is None and config.region not in REGIONS:
        raise ConfigurationError(
            f"configuration: region: {loggable(config.region)} is not known to have a managed HSM; "
            f"{did_you_mean([config.region], list(REGIONS))}For another region say which class of "
            f"managed HSM it has, managed_hsm = one of {', '.join(ManagedHsm)}"
        )


def require_own_names(config: ServerConfig) -> None:
    """Refuse different backends of the same name, without opening them.

    The name is taken to be the setting ``name``, else the plug-in's, as it is with the backends of
    this package. The server asks the backends themselves once they are open.

    Raises:
        ConfigurationError: Two have the same name, or a former one has another than its table.
    """
    named: dict[str, BackendConfig] = {}
    for backend in (*config.backends.values(), *config.former_backends.values()):
        name = name_of(backend)
        if named.setdefault(name, backend) != backend:
            raise same_name(name)
    for table, backend in config.former_backends.items():
        require_table_name(table, name_of(backend))


def name_of(backend: BackendConfig) -> str:
    """The name of a backend that is not open: its setting ``name``, else the plug-in's."""
    return str(backend.settings.get("name", backend.plugin))


def require_table_name(table: str, name: str) -> None:
    """Refuse a former backend that is not the one that its table names: it has other keys.

    Raises:
        ConfigurationError: It is not.
    """
    if table != name:
        raise ConfigurationError(
            f"[former_backends.{table}] the backend's name is {name!r}, in key references too: "
            f"call the table [former_backends.{name}], or correct the setting 'name'"
        )


def same_name(name: str) -> ConfigurationError:
    """What is wrong where different backends have the same name, and what to do."""
    return ConfigurationError(
        f"two backends are named {name!r}; give one another name (the setting 'name', where its "
        "plug-in has one), or give both levels the same plug-in and settings"
    )


@strip_tracebacks
def load_config(path: Path | None = None) -> ServerConfig:
    """Read the file, then the environment.

    Raises:
        ConfigurationError: Each key that is unknown, missing or wrong is listed; no value is.
    """
    _refuse_unknown_variables(os.environ)
    try:
        config = ServerConfig(**read_file(path))
    except ValidationError as error:
        raise ConfigurationError(
            "configuration: " + "; ".join(map(_fault, error.errors()))
        ) from None
    except SettingsError as error:
        # Its text names the field; the JSON error behind it has the value.
        raise ConfigurationError(f"configuration: {error}; it takes JSON") from None
    _require_known_region(config)
    return config


def _fault(error: ErrorDetails) -> str:
    name = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        return f"{name}: unknown setting; {_place_of(error['loc'])}see `hsmwrap config settings`"
    row = _setting_at(error["loc"])
    if error["loc"][-1] == "[key]":
        level = ".".join(map(str, error["loc"][:-1]))
        return f"{level}: is not a protection level; take {' or '.join(ProtectionLevel)}"
    if row is None:  # a table of several
        return f"{name}: required" if error["type"] == "missing" else f"{name}: takes a table"
    if error["type"] == "missing":
        return f"{name}: required; {row.help}"
    return f"{name}: takes {row.takes}; {row.help}"


def _place_of(location: tuple[int | str, ...]) -> str:
    """Where a setting belongs that is in no table, or in the wrong one; a sentence or nothing."""
    *table, key = map(str, location)
    known = [row.name for row in settings_table()]
    for name in known:
        above, _, last = name.rpartition(".")
        if last == key and above != ".".join(table) and "_backends." not in f"_{name}":
            place = f"into the table [{above}]" if above else "before the first [table] of the file"
            return f"{key} belongs {place}; "
    if len(location) == 3 and table[0] in _KEYS:  # noqa: PLR2004 (backends, level, key)
        return f"settings of the plug-in belong into the table [{'.'.join(table)}.settings]; "
    return did_you_mean([".".join(map(str, location))], known)


def _setting_at(location: tuple[int | str, ...]) -> Setting | None:
    """The setting at this place of the document, or above it."""
    table = {row.name: row for row in settings_table()}
    keys = [str(key) for key in location]
    if keys[0] in _KEYS and len(keys) > 1:
        keys[1] = _KEYS[keys[0]].rstrip(".")
    ends = range(len(keys), 0, -1)
    return next((table[name] for end in ends if (name := ".".join(keys[:end])) in table), None)


def settings_table() -> tuple[Setting, ...]:
    """Every setting of the server, with dots between the levels (``backends.LEVEL.plugin``)."""
    return tuple(_rows(ServerConfig, ""))


_KEYS = MappingProxyType({"backends": "LEVEL.", "former_backends": "NAME."})
"""What stands for the keys of the tables whose keys are not settings."""


def _rows(model: type[BaseModel], prefix: str) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        inner = get_args(field.annotation)[-1:] or (field.annotation,)
        if isinstance(inner[0], type) and issubclass(inner[0], BaseModel):
            yield from _rows(inner[0], f"{prefix}{name}.{_KEYS.get(name, '')}")
            continue
        default = REQUIRED if field.is_required() else field.default
        if isinstance(default, SecretStr):
            default = default.get_secret_value()
        yield Setting(
            prefix + name, _takes(field), " ".join((field.description or "").split()), default
        )


_TAKES: Mapping[Any, str] = {
    bool: "true or false",
    dict: "a table",
    float: "a number",
    frozenset: "a list",
    int: "a whole number",
    Path: "a path",
    SecretStr: "text",
    str: "text",
    timedelta: "seconds, or ISO 8601 (PT24H)",
}


def _takes(field: FieldInfo) -> str:
    """What a setting takes, in words, from the annotation and the bounds that pydantic checks."""
    if field.title:
        return field.title
    outer = get_origin(field.annotation)
    kind, *_ = get_args(field.annotation) or (field.annotation,)
    bounds = {
        name: getattr(bound, name)
        for bound in field.metadata
        for name in ("ge", "gt", "le")
        if hasattr(bound, name)
    }
    words = _TAKES.get(outer if outer in _TAKES else kind, "")
    if isinstance(kind, type) and issubclass(kind, Enum) and outer is not dict:
        words = f"{'a list of' if outer is frozenset else 'one of'} {', '.join(kind)}"
    if "le" in bounds:
        return f"{words}, {bounds['ge']} to {bounds['le']}"
    if isinstance(bounds.get("ge"), int):
        return f"{words}, {bounds['ge']} or more"
    return f"{words}, more than 0" if "gt" in bounds else words


def _merged(below: Any, above: Any) -> Any:
    """Tables put over each other, ``above`` outranking ``below`` key by key."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _merged(below.get(key), value) for key, value in above.items()}


@strip_tracebacks
def read_file(path: Path | None) -> dict[str, Any]:
    """The parsed TOML file; empty without one.

    Raises:
        ConfigurationError: It cannot be read or does not parse; the text says where, and quotes
            nothing.
    """
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        why = error.strerror
    except UnicodeDecodeError:
        why = "is not UTF-8"
    except tomllib.TOMLDecodeError as error:
        why = " ".join(["is not TOML", *re.findall(r"\(at [^()]*\)$", str(error))])
    raise ConfigurationError(f"configuration: {path}: {why}")


def _refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    known = {field.upper() for field in ServerConfig.model_fields}
    for name in environ:
        key = name.upper().removeprefix(ENV_PREFIX).split("__")[0]
        if name.upper().startswith(ENV_PREFIX) and key not in known:
            names = [ENV_PREFIX + row.name.upper().replace(".", "__") for row in settings_table()]
            hint = did_you_mean([name.upper()], names)
            raise ConfigurationError(
                f"configuration: nothing reads {name}; {hint}see `hsmwrap config settings`"
            )
