"""docs/architecture.md has every room, and every layer of the import contracts."""

import re
import tomllib

import pytest
from support.documents import ROOT, section_of

ARCHITECTURE = ROOT / "docs" / "architecture.md"
NOT_ROOMS = {"__init__.py", "__pycache__", "py.typed"}


def rooms():
    """Paths in the first column of the tables of rooms."""
    rows = re.findall(r"^\| (`hsmwrap/.*?) \|", section_of(ARCHITECTURE, "The rooms"), re.MULTILINE)
    return [path for row in rows for path in re.findall(r"`([^`]+)`", row)]


@pytest.mark.parametrize("place", ["hsmwrap", "hsmwrap/pkcs11"])
def test_every_room_is_in_the_table(place):
    inside = {
        f"{place}/{each.name}{'/' if each.is_dir() else ''}"
        for each in (ROOT / place).iterdir()
        if each.name not in NOT_ROOMS and not each.name.startswith("_")
    }
    assert {room for room in rooms() if room.rstrip("/").rpartition("/")[0] == place} == inside


def layers(container, innermost):
    """The layers of the import contract in ``container``, outermost first, as sets of paths."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    for contract in project["tool"]["importlinter"]["contracts"]:
        found = [re.split(r"[ :|]+", layer) for layer in contract.get("layers", [])]
        if found and innermost in found[-1]:
            names = [{each.removeprefix("hsmwrap.") for each in layer} for layer in found]
            return [{f"{container}/{name}" for name in layer} for layer in names]
    raise LookupError(innermost)


@pytest.mark.parametrize(
    ("container", "innermost"), [("hsmwrap", "hsmwrap.errors"), ("hsmwrap/pkcs11", "binding")]
)
def test_the_rooms_are_in_the_order_of_the_layers(container, innermost):
    expected = layers(container, innermost)
    listed = [room.removesuffix(".py").rstrip("/") for room in rooms()]
    places = [
        next((number for number, layer in enumerate(expected) if room in layer), None)
        for room in listed
        if room.rpartition("/")[0] == container
    ]
    assert None not in places
    assert places == sorted(places)
    assert set().union(*expected) <= set(listed)
