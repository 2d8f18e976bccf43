"""The names that ``import hsmwrap`` gives, and the libraries that it does not load."""

import re
import subprocess
import sys
from pathlib import Path

import hsmwrap
from hsmwrap import errors

ROOT = Path(hsmwrap.__file__).parents[1]
PRIVATE = re.compile(r"^from (hsmwrap(?:\.\w+)*?)(?:\.| import )_[a-z]", re.MULTILINE)
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


def test_private_modules_are_imported_by_their_own_package_only():
    checked = 0
    for path in (ROOT / "hsmwrap").rglob("*.py"):
        importer = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in PRIVATE.findall(path.read_text("utf-8")):
            checked += 1
            assert f"{importer}.".startswith(f"{package}."), f"{importer} reaches into {package}"
    assert checked
