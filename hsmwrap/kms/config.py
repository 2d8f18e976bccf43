"""Configuration: one TOML file, and environment variables that outrank it.

A variable is named ``HSMWRAP_SERVER_`` and the key in capitals, with ``__`` between the levels
(``HSMWRAP_SERVER_LIMITS__MAX_REQUEST_BYTES``). A key or variable that nothing reads is an error.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from hsmwrap.backend import Exposure
from hsmwrap.catalog import ManagedHsm, ProtectionLevel, WrappingAlgorithm
from hsmwrap.errors import ConfigurationError
from hsmwrap.kms.schema import LOG_ID_LENGTH
from hsmwrap.policy import Deployment

ENV_PREFIX = "HSMWRAP_SERVER_"

_STRICT = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


def _as_seconds(value: Any) -> Any:
    """Variables are text, and pydantic takes text for ISO 8601 only."""
    return (
        float(value) if isinstance(value, str) and value.isascii() and value.isdecimal() else value
    )


Seconds = Annotated[timedelta, BeforeValidator(_as_seconds)]
"""A duration: a number of seconds, or ISO 8601 (``PT24H``)."""


class BackendConfig(BaseModel):
    """The backend of one protection level: the plug-in's name and its own settings."""

    model_config = _STRICT

    plugin: str
    settings: dict[str, Any] = Field(default_factory=dict)


class LimitsConfig(BaseModel):
    """How much is taken from a client at once."""

    model_config = _STRICT

    max_request_bytes: int = Field(default=131_072, ge=4_096)
    max_threads: int = Field(default=16, ge=1)
    database_pool_size: int = Field(default=16, ge=1)
    shutdown_seconds: float = Field(default=30, ge=0)


class ServerConfig(BaseSettings):
    """Everything that a KMS server is told.

    Attributes:
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.
        database_url: SQLAlchemy URL of SQLite or PostgreSQL (``postgresql+psycopg://…``).
        backends: The backend of each protection level.
        region: Alibaba region id, for ARNs and the policy.
        managed_hsm: Class of the managed HSM; None: what the region has.
        dedicated: True for a dedicated KMS instance.
        account_id: Account id in ARNs.
        token_lifetime: Validity of import tokens.
        single_use: True makes import tokens single-use.
        required_exposure: ``in_hsm`` refuses HSM-level imports through the host.
        refused_algorithms: Wrapping algorithms that are turned off.
        access_key_file: TOML file of access keys, mode 600; None: the embedder brings them.
        audit_file: The audit log.
        audit_log_id: What the database calls this audit log, another for each file; None: host
            and path. Say it where the host's name changes, as in containers.
        audit_key_file: File with the HMAC key of the audit log's chain, mode 600; None: SHA-256.
        audit_sync: True waits for the disk with each line.
        sweep_interval: Pause between sweeps; 0 switches the sweeper off.
        startup_wait: How long to wait at start for an unavailable HSM or database; 0: not at all.
        key_pool: Wrapping key pairs of each kind that are made ahead; 0: none.
        limits: How much is taken from a client at once.
    """

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
    )

    host: str = "127.0.0.1"
    port: int = Field(default=8443, ge=0, le=65_535)
    database_url: SecretStr = SecretStr("sqlite:///hsmwrap.db")
    backends: dict[ProtectionLevel, BackendConfig]
    region: str = "cn-hangzhou"
    managed_hsm: ManagedHsm | None = None
    dedicated: bool = False
    account_id: str = Field(default="1000000000000000", pattern=r"^[0-9]{1,20}$")
    token_lifetime: Seconds = Field(default=timedelta(hours=24), gt=timedelta(0))
    single_use: bool = False
    required_exposure: Exposure | None = None
    refused_algorithms: frozenset[WrappingAlgorithm] = frozenset()
    access_key_file: Path | None = None
    audit_file: Path = Path("audit.log")
    audit_log_id: str | None = Field(default=None, min_length=1, max_length=LOG_ID_LENGTH)
    audit_key_file: Path | None = None
    audit_sync: bool = False
    sweep_interval: Seconds = Field(default=timedelta(seconds=60), ge=timedelta(0))
    startup_wait: Seconds = Field(default=timedelta(seconds=60), ge=timedelta(0))
    key_pool: int = Field(default=0, ge=0, le=10_000)
    limits: LimitsConfig = LimitsConfig()

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


def require_own_names(config: ServerConfig) -> None:
    """Refuse different backends of the same name, without opening them.

    The name is taken to be the setting ``name``, else the plug-in's, as it is with the backends of
    this package. The server asks the backends themselves once they are open.

    Raises:
        ConfigurationError: Two have the same name.
    """
    named: dict[str, BackendConfig] = {}
    for backend in config.backends.values():
        name = str(backend.settings.get("name", backend.plugin))
        if named.setdefault(name, backend) != backend:
            raise same_name(name)


def same_name(name: str) -> ConfigurationError:
    """What is wrong where different backends have the same name, and what to do."""
    return ConfigurationError(
        f"two backends are named {name!r}; give one another name (the setting 'name', where its "
        "plug-in has one), or give both levels the same plug-in and settings"
    )


def load_config(path: Path | None = None) -> ServerConfig:
    """Read the file, then the environment.

    Raises:
        ConfigurationError: Each key that is unknown, missing or wrong is listed; no value is.
    """
    _refuse_unknown_variables(os.environ)
    try:
        return ServerConfig(**read_file(path))
    except ValidationError as error:
        lines = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigurationError("configuration: " + "; ".join(lines)) from None


def _merged(below: Any, above: Any) -> Any:
    """Tables put over each other, ``above`` outranking ``below`` key by key."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _merged(below.get(key), value) for key, value in above.items()}


def read_file(path: Path | None) -> dict[str, Any]:
    """The parsed TOML file; empty without one.

    Raises:
        ConfigurationError: It cannot be read or does not parse.
    """
    if path is None:
        return {}
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"configuration: {path}: {error}") from None


def _refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    known = set(ServerConfig.model_fields)
    for name in environ:
        key = name.removeprefix(ENV_PREFIX).lower().split("__")[0]
        if name.upper().startswith(ENV_PREFIX) and key not in known:
            raise ConfigurationError(f"configuration: nothing reads {name}")
