"""The fault shim, compiled once for all tests of this checkout."""

from contextlib import contextmanager
from pathlib import Path

from hsmwrap.testing.faults import FaultShim, build

_BUILT = Path(__file__).parents[3] / "build" / "faultshim"


def fault_shim(module, directory):
    """A shim in ``directory`` in front of ``module``."""
    return FaultShim(module, directory, library=build(_BUILT))


@contextmanager
def nothing_left(shim):
    """The block leaves no object and no session behind, and does not misuse the module."""
    before = shim.counters().held
    yield
    assert shim.counters().held == before, "an object or a session is left"
    assert not shim.counters().violations
