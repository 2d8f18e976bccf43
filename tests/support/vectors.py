"""Project Wycheproof's vectors, read in place: from HSMWRAP_VECTORS or beside the checkout."""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

_BESIDE_CHECKOUT = Path(__file__).resolve().parents[3] / "shared" / "vectors"

SKIP_REASON = "Wycheproof vectors not found: set HSMWRAP_VECTORS"


def wycheproof(name: str) -> dict[str, Any]:
    """Return the parsed file ``wycheproof/<name>.json``; skip the test where it is absent."""
    directory = Path(os.environ.get("HSMWRAP_VECTORS") or _BESIDE_CHECKOUT)
    path = directory / "wycheproof" / f"{name}.json"
    if not path.is_file():
        pytest.skip(SKIP_REASON)
    return _load(path)


@cache
def _load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes())
