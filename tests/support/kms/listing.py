"""The documented table of key states."""

import re

from hsmwrap.kms.states import KeyState
from support.documents import ROOT, text_of

DOCUMENT = ROOT / "docs" / "key-states.md"
ROW = re.compile(r"^\| ([A-Z]\w+) \| (.+) \|$", re.MULTILINE)


def cells():
    """(operation, state, answer, state afterwards) of each cell of the documented table."""
    states = [state.value for state in KeyState]
    for operation, row in ROW.findall(text_of(DOCUMENT)):
        for state, cell in zip(states, row.split(" | "), strict=True):
            answer, _, afterwards = cell.partition(" → ")
            yield operation, state, answer, afterwards or state
