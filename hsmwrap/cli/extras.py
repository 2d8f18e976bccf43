"""What the extras bring: a subcommand that needs one says which is missing."""

from __future__ import annotations

from importlib.util import find_spec

from hsmwrap.errors import ConfigurationError

_SERVER = ("sqlalchemy", "alembic", "pydantic_settings", "werkzeug", "gunicorn")


def require_server() -> None:
    """Make sure that the extra ``server`` is installed.

    Raises:
        ConfigurationError: It is not; the text says how to install it.
    """
    missing = [name for name in _SERVER if find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"this needs the extra 'server' ({', '.join(missing)} missing): "
            "pip install 'hsmwrap[server]'"
        )
