"""The names that ``import hsmwrap`` gives, and the libraries that it does not load."""

import subprocess
import sys

import hsmwrap
from hsmwrap import errors

HEAVY = ("alembic", "cryptography", "pkcs11", "pydantic", "sqlalchemy", "werkzeug")


def test_every_listed_name_is_there():
    assert len(set(hsmwrap.__all__)) == len(hsmwrap.__all__)
    for name in hsmwrap.__all__:
        assert getattr(hsmwrap, name)


def test_every_error_is_exported():
    public = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.HsmwrapError)
    }
    assert public <= set(hsmwrap.__all__)


def test_importing_the_package_loads_nothing_heavy():
    code = f"import sys, hsmwrap; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
