"""The plug-in builds on what PLUGINS.md calls stable, and on nothing else of hsmwrap."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
IMPORT = re.compile(
    r"^(?:from (hsmwrap[\w.]*) import (\w+)|import (hsmwrap\b[\w.]*))", re.MULTILINE
)


def test_it_imports_stable_modules_only():
    text = (ROOT / "PLUGINS.md").read_text("utf-8").split("## What is stable")[1]
    stable = set(re.findall(r"`(hsmwrap\.\w+)`", text))
    found = set()
    for path in (ROOT / "examples/sdf/src").rglob("*.py"):
        for module, name, plain in IMPORT.findall(path.read_text("utf-8")):
            whole = plain or (f"hsmwrap.{name}" if module == "hsmwrap" else module)
            if not whole.startswith("hsmwrap_sdf"):
                found.add(whole)
    assert found
    assert found <= stable
