"""Project Wycheproof's vectors, from tests/vectors/wycheproof."""

import json
from functools import cache
from pathlib import Path
from typing import Any

_DIRECTORY = Path(__file__).parents[1] / "vectors" / "wycheproof"


@cache
def wycheproof(name: str) -> dict[str, Any]:
    """Return the parsed file ``<name>.json``."""
    return json.loads((_DIRECTORY / f"{name}.json").read_bytes())
