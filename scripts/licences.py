"""The licences of locked packages, for scripts/lock.

``union LOCK…`` prints one lock of them all, one version of each and without markers. ``list`` reads
the CycloneDX document of an environment with that, and prints a line ``NAME LICENCE`` for each.
"""

import json
import re
import sys
import tomllib
from pathlib import Path

_ENTRY = re.compile(r"^([a-z0-9-]+)(==\S+)[^\\]*(\\\n(?:    --hash=\S+(?: \\)?\n)+)", re.MULTILINE)


def union(locks: list[str]) -> None:
    """Print the first version that a lock has of each package: that of the oldest Python."""
    entries: dict[str, str] = {}
    for lock in locks:
        for name, version, hashes in _ENTRY.findall(Path(lock).read_text("utf-8")):
            entries.setdefault(name, f"{name}{version} {hashes}")
    print(*entries.values(), sep="", end="")


def listing() -> None:
    """Filter from stdin to stdout."""
    project = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))
    unstated = project["tool"]["hsmwrap"]["licences"]["unstated"]
    for component in json.load(sys.stdin)["components"]:
        name = re.sub("[-_.]+", "-", component["name"].lower())
        found = component.get("licenses", [])
        spdx = {each.get("expression") or each["license"].get("id") for each in found} - {None}
        named = {each["license"]["name"].rpartition(" :: ")[2] for each in found if not spdx}
        print(name, " AND ".join(sorted(spdx | named)) or unstated[name])


if __name__ == "__main__":
    if sys.argv[1] == "union":
        union(sys.argv[2:])
    else:
        listing()
