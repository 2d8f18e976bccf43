"""The fault shim, compiled once for all tests of this checkout."""

from pathlib import Path

from hsmwrap.testing.faults import FaultShim, build

_BUILT = Path(__file__).parents[3] / "build" / "faultshim"


def fault_shim(module, directory):
    """A shim in ``directory`` in front of ``module``."""
    return FaultShim(module, directory, library=build(_BUILT))
