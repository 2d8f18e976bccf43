"""The simulated device of the tests: its library, built by gcc, and directories as devices.

``python simulated.py DIRECTORY`` sets one up, to try the plug-in by hand, with settings for it.
"""

import ctypes
import json
import os
import subprocess
import sys
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


def settings_in(directory, device):
    """Settings for the device, with their files in an empty directory."""
    state, password = directory / "state", directory / "password"
    state.mkdir(mode=0o700)
    password.write_bytes(PASSWORD + b"\n")
    password.chmod(0o400)
    return {
        "library": device.library,
        "password_file": str(password),
        "state_directory": str(state),
        "pool": [f"{FIRST}-{FIRST + PAIRS - 1}"],
        "storage_index": STORAGE,
        "kek_index": KEK,
        "reuse_pairs": True,
    }


def as_toml(settings):
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())


def main():
    directory = Path(sys.argv[1]).absolute()
    directory.mkdir(parents=True)
    os.environ["SDF_SIMULATOR"] = str(directory / "device")
    device = Device(build(directory), directory / "device")
    (directory / "sdf.toml").write_text(as_toml(settings_in(directory, device)))
    print(f"export SDF_SIMULATOR={directory / 'device'}")


if __name__ == "__main__":
    main()
