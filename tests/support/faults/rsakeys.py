"""``rsakeys.c``: RSA pairs that take time only at first, for processes that make many."""

import subprocess
from pathlib import Path

_SOURCE = Path(__file__).with_suffix(".c")


def preloaded(directory):
    """The environment of such a process; the library is compiled into ``directory``."""
    library = directory / f"{_SOURCE.stem}.so"
    flags = ["-std=c11", "-O2", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["gcc", *flags, "-o", library, _SOURCE, "-l:libcrypto.so.3"], check=True)
    return {"LD_PRELOAD": str(library)}
