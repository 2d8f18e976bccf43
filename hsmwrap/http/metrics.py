"""Prometheus metrics of the HTTP layer (extra ``metrics``); without the library, nothing.

They are in the library's default registry, beside those of other modules. Under gunicorn with
several workers the library adds the workers up in ``PROMETHEUS_MULTIPROC_DIR``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

from hsmwrap.backend import Backend
from hsmwrap.http.errors import MetricsUnavailable
from hsmwrap.keypool import KeyPool
from hsmwrap.observe import Observer

try:
    import prometheus_client
except ImportError:  # the extra is not installed
    AVAILABLE = False
else:
    AVAILABLE = True

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class _Instruments:
    requests: prometheus_client.Counter
    seconds: prometheus_client.Histogram


@functools.cache
def _instruments() -> _Instruments:
    return _Instruments(
        prometheus_client.Counter(
            "hsmwrap_http_requests", "API requests by action and code.", ("action", "code")
        ),
        prometheus_client.Histogram(
            "hsmwrap_http_request_seconds", "Time to answer an API request.", ("action",)
        ),
    )


def observe(action: str, code: str, seconds: float) -> None:
    """Count one request. ``action`` comes from a closed list, or the labels grow for ever."""
    if AVAILABLE:
        instruments = _instruments()
        instruments.requests.labels(action, code).inc()
        instruments.seconds.labels(action).observe(seconds)


def observer() -> Observer | None:
    """Counts the calls of backends; None without the library."""
    if not AVAILABLE:
        return None
    from hsmwrap.metrics import PrometheusObserver  # noqa: PLC0415 (the extra may be absent)

    return PrometheusObserver()


def render(backends: Iterable[Backend] = (), pools: Iterable[KeyPool] = ()) -> bytes:
    """All metrics in the text format: this layer's, and those of backends and key-pair pools.

    Raises:
        MetricsUnavailable: prometheus_client is not installed.
    """
    if not AVAILABLE:
        raise MetricsUnavailable("prometheus_client is not installed")
    from hsmwrap.metrics import FactsCollector, render  # noqa: PLC0415 (the extra may be absent)

    return render(FactsCollector(backends, pools))
