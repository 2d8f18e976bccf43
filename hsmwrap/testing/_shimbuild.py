"""Building the fault shim from the C sources that come with hsmwrap."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hsmwrap.testing._control import SOURCES

LIBRARY_NAME = "faultshim.so"
_GCC_FLAGS = (
    *("-std=c11", "-O2", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden"),
    *("-Wall", "-Wextra", "-Werror"),
    "-Wl,-z,nodelete",  # threads may be inside when the host unloads it
)


class ShimBuildError(RuntimeError):
    """The shim could not be built; the text says what to do."""


def build(output_dir: str | Path) -> Path:
    """Compile the shim into ``output_dir`` unless an up-to-date one is there.

    Returns:
        Path of the library, for the ``library`` argument of :class:`FaultShim`.

    Raises:
        ShimBuildError: gcc is missing or failed.
    """
    output = Path(output_dir).resolve() / LIBRARY_NAME
    sources = sorted(SOURCES.glob("*.[ch]"))
    newest = max(source.stat().st_mtime_ns for source in sources)
    if not output.exists() or output.stat().st_mtime_ns < newest:
        output.parent.mkdir(parents=True, exist_ok=True)
        _compile([source for source in sources if source.suffix == ".c"], output)
    return output


def _compile(sources: Sequence[Path], output: Path) -> None:
    gcc = shutil.which("gcc")
    if gcc is None:
        raise ShimBuildError("gcc is missing: apt-get install --yes gcc libc6-dev")
    # Built beside and moved: a process that has the old library loaded keeps it whole.
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:
        fresh = Path(scratch) / output.name
        command = [gcc, *_GCC_FLAGS, "-o", str(fresh), *map(str, sources)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  fixed arguments
        if done.returncode != 0:
            raise ShimBuildError(f"gcc failed; libc6-dev may be missing:\n{done.stderr}")
        fresh.replace(output)
