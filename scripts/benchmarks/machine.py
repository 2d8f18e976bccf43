"""The machine and the software versions of a run."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path

from cryptography.hazmat.backends.openssl.backend import backend as pyca

from hsmwrap.pkcs11.binding.module import Module


class Others:
    """Measures the processor time of other processes, from its creation."""

    def __init__(self) -> None:
        self._wall, self._busy, self._own = self._read()

    def share(self) -> float:
        """Processor time of other processes so far, as a fraction of the available time."""
        wall, busy, own = self._read()
        others = busy - self._busy - (own - self._own)
        available = (wall - self._wall) * (os.cpu_count() or 1)
        return max(0.0, others / available)

    @staticmethod
    def _read() -> tuple[float, float, float]:
        # proc(5): user, nice, system, idle, iowait, irq, softirq, steal
        ticks = [int(word) for word in Path("/proc/stat").read_text("ascii").split()[1:9]]
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return time.monotonic(), busy, sum(own[:4])


def describe(module: Module) -> dict[str, str]:
    """Describe the machine and the versions; ``module`` is the measured PKCS#11 module."""
    return {
        "cpu": _cpu(),
        "cores": str(len(os.sched_getaffinity(0))),
        "system": _system(),
        "python": platform.python_version(),
        "openssl": _output("openssl", "version"),
        "openssl_of_pyca": pyca.openssl_version_text(),
        "token_directory": _output("stat", "-f", "-c", "%T", os.environ["HSMWRAP_TOKEN_DIR"]),
        "token": f"{module.manufacturer_id} {_output('softhsm2-util', '--version')}",
        **{name: importlib.metadata.version(name) for name in ("cryptography", "python-pkcs11")},
    }


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _cpu() -> str:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    found = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def _system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except OSError:
        return platform.platform()
