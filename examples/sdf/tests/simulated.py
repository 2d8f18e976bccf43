"""The simulated device of the tests: its library, built by gcc, and directories as devices."""

import ctypes
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "simulator"
PASSWORD = b"a password of the tests"
STORAGE, NEXT_STORAGE, KEK = 1, 2, 1
FIRST, PAIRS = 10, 60
FLAGS = ("-std=c11", "-O1", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror")


def build(directory, *more):
    """The library; ``-DEDITION=2023`` makes one without the exchange of envelopes."""
    library = Path(directory) / "sdf.so"
    # Debian's package of the headers, and so the name without a version, need not be there.
    command = ["gcc", *FLAGS, *more, "-o", library, SOURCES / "simulator.c", "-l:libcrypto.so.3"]
    subprocess.run(command, check=True)
    return library


class Device:
    """A directory with keys, and the functions of the simulator that are for tests."""

    def __init__(self, library, directory):
        self.library, self.directory = str(library), Path(directory)
        self._functions = ctypes.CDLL(self.library)
        self.directory.mkdir()
        (self.directory / "password").write_bytes(PASSWORD)
        self.make_pairs(STORAGE, 2)
        self.make_pairs(FIRST, PAIRS)
        assert self._functions.SIM_MakeKek(str(directory).encode(), KEK)

    def make_pairs(self, first, count=1):
        """What the device's management tool does; a pair that was there is gone."""
        assert self._functions.SIM_MakePairs(str(self.directory).encode(), first, count)

    def fail(self, function, code, times=1):
        """The next calls of a function in this process answer this code."""
        self._functions.SIM_Fail(function.encode(), code, times)

    def calls(self, function):
        """How often this process has called a function."""
        return self._functions.SIM_Calls(function.encode())

    @property
    def keys(self):
        return self._functions.SIM_Keys()

    @property
    def sessions(self):
        return self._functions.SIM_Sessions()
