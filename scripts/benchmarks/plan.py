"""The amount of measuring: the default, ``--quick`` and ``--full``."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

_STARTED = time.monotonic()
_SERVERS = (("sqlite", 1), ("sqlite", 2), ("postgresql", 1), ("postgresql", 2))


@dataclass(frozen=True, slots=True)
class Plan:
    """Amounts.

    Attributes:
        name: Name of the plan.
        seconds: Seconds for one comparison of single calls.
        least: Minimum number of calls of each side in a comparison.
        threads: Numbers of threads.
        turns: Slices of each side at each number of threads.
        slice: Seconds of a slice.
        issue_slice: Seconds of a slice that generates RSA pairs.
        cold: Issues with inline key generation.
        warm: Issues from an idle pool.
        burst: Issues from one filling of the idle pool.
        busy: Issues from a busy pool.
        requests: Calls in a burst of imports, over HTTP and in process; there are ``turns`` bursts.
        uses: Calls in a burst that uses a key.
        clients: Numbers of concurrent clients.
        servers: Databases and numbers of worker processes.
        sealed: Numbers of outstanding sealed tokens.
        resident: Numbers of outstanding resident wrapping keys.
        fill_seconds: Time limit for making all resident wrapping keys.
    """

    name: str
    seconds: float
    least: int
    threads: tuple[int, ...]
    turns: int
    slice: float
    issue_slice: float
    cold: int
    warm: int
    burst: int
    busy: int
    requests: int
    uses: int
    clients: tuple[int, ...]
    servers: tuple[tuple[str, int], ...]
    sealed: tuple[int, ...]
    resident: tuple[int, ...]
    fill_seconds: float


QUICK = Plan(
    "quick",
    seconds=0.8,
    least=3,
    threads=(1, 2, 4),
    turns=2,
    slice=0.3,
    issue_slice=0.5,
    cold=10,
    warm=30,
    burst=16,
    busy=10,
    requests=20,
    uses=200,
    clients=(1, 16),
    servers=(("sqlite", 1), ("postgresql", 2)),
    sealed=(100, 1_000),
    resident=(100, 1_000),
    fill_seconds=5,
)
DEFAULT = Plan(
    "default",
    seconds=4,
    least=20,
    threads=(1, 2, 4, 8, 16),
    turns=5,
    slice=1.0,
    issue_slice=2.0,
    cold=100,
    warm=400,
    burst=50,
    busy=100,
    requests=100,
    uses=1_000,
    clients=(1, 4, 16),
    servers=_SERVERS,
    sealed=(100, 10_000, 100_000),
    resident=(100, 1_000, 10_000),
    fill_seconds=180,
)
FULL = Plan(
    "full",
    seconds=20,
    least=100,
    threads=(1, 2, 4, 8, 16),
    turns=11,
    slice=2.0,
    issue_slice=5.0,
    cold=400,
    warm=2_000,
    burst=100,
    busy=400,
    requests=200,
    uses=4_000,
    clients=(1, 4, 16),
    servers=_SERVERS,
    sealed=(100, 10_000, 100_000),
    resident=(100, 1_000, 10_000, 100_000),
    fill_seconds=7_200,
)


def say(line: str) -> None:
    """Print progress on stderr."""
    print(f"bench: {time.monotonic() - _STARTED:5.0f} s  {line}", file=sys.stderr, flush=True)
