"""Checks that an optional dependency (extra) is installed."""

from __future__ import annotations

from importlib.util import find_spec

from hsmwrap.errors import ConfigurationError

_SERVER = ("sqlalchemy", "alembic", "pydantic_settings", "gunicorn", "httptools")


def require_server() -> None:
    """Check that the extra ``server`` is installed.

    Raises:
        ConfigurationError: It is not installed; the text says how to install it.
    """
    missing = [name for name in _SERVER if find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"this needs the extra 'server' ({', '.join(missing)} missing): "
            "pip install '.[server]' in a clone of hsmwrap"
        )
