"""Prometheus metrics of backends, key-pair pools and API requests (extra ``metrics``).

Counted as it happens: operations by outcome and their latency, by a :class:`PrometheusObserver`
given to :func:`hsmwrap.observe.observed`, and API requests, by :func:`count_request`. Read at each
scrape: what backends say of their health and pools of their stocks, by a :class:`FactsCollector`.

One process: everything is in one registry. Several, under ``PROMETHEUS_MULTIPROC_DIR`` (set
before this module is imported): the page is that of all processes together, whichever answers
(:mod:`hsmwrap.workermetrics`). Each has to call :func:`publish` at intervals.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from hsmwrap.backend import Backend
from hsmwrap.errors import ConfigurationError
from hsmwrap.forks import ForkTurn
from hsmwrap.keypool import KeyPool
from hsmwrap.locks import ReadWriteLock
from hsmwrap.observe import Operation

try:
    from prometheus_client import (
        REGISTRY,
        CollectorRegistry,
        Counter,
        Histogram,
        generate_latest,
        values,
    )
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.multiprocess import MultiProcessCollector
    from prometheus_client.registry import Collector

    from hsmwrap.workermetrics import Rule, SharedMetrics
except ImportError:
    raise ConfigurationError(
        "metrics need the extra 'metrics' (prometheus_client is missing): "
        "pip install '.[metrics]' in a clone of hsmwrap"
    ) from None

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""What :func:`render` returns."""

_MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"
PUBLISH_SECONDS = 5
"""Pause between two calls of :func:`publish`, and so how old the facts of other processes are."""
_LABELS = ("backend", "operation", "spec", "algorithm", "key_spec", "outcome")
# Sealing takes 0.1 ms, an RSA pair 25 to 250 ms, a lost HSM seconds.
_BUCKETS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_IMPORTS = frozenset({"unwrap_material", "ImportKeyMaterial"})
_FINEST_IMPORT = 0.01

# A child inherits prometheus_client's own locks as they are; so no fork while one may be held.
_UPDATING = ReadWriteLock(fork_turn=ForkTurn.METRICS)


@dataclass(frozen=True, slots=True)
class _Instruments:
    operations: Counter
    seconds: Histogram


@functools.cache
def _instruments(registry: CollectorRegistry) -> _Instruments:
    return _Instruments(
        Counter(
            "hsmwrap_backend_operations",
            "Calls of a backend by outcome (ok, or the error's name).",
            _LABELS,
            registry=registry,
        ),
        Histogram(
            "hsmwrap_backend_operation_seconds",
            "Time that a call of a backend took, whatever its outcome.",
            ("backend", "operation"),
            registry=registry,
            buckets=_BUCKETS,
        ),
    )


def coarse(operation: str, seconds: float) -> float:
    """The time that is counted for an operation: the upper end of its bucket.

    The page must not be a clock for single requests: the time of an import may tell whether a
    ciphertext had a valid padding, and the difference of two exact sums is that time. So a sum
    tells no more than the buckets do, and all imports under 10 ms are in one bucket.
    """
    finest = _FINEST_IMPORT if operation in _IMPORTS else 0.0
    return next((end for end in _BUCKETS if end >= max(seconds, finest)), _BUCKETS[-1] * 2)


class PrometheusObserver:
    """An :data:`hsmwrap.observe.Observer` that counts and times; one serves any backends."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        """Count in ``registry``; a second observer on the same one adds to the same metrics."""
        self._instruments = _instruments(registry)
        # Looking one up by its labels takes longer than to count.
        self._counters: dict[tuple[str, ...], Counter] = {}
        self._timers: dict[tuple[str, ...], Histogram] = {}

    def __call__(self, operation: Operation) -> None:
        """Count one call."""
        o = operation
        labels = (o.backend, o.name, o.spec or "", o.algorithm or "", o.key_spec or "", o.outcome)
        with _UPDATING.write():
            counter = self._counters.get(labels)
            if counter is None:
                counter = self._instruments.operations.labels(*labels)
                self._counters[labels] = counter
            timer = self._timers.get(labels[:2])
            if timer is None:
                timer = self._instruments.seconds.labels(*labels[:2])
                self._timers[labels[:2]] = timer
            counter.inc()
            timer.observe(coarse(o.name, o.seconds))


@functools.cache
def _requests() -> tuple[Counter, Histogram]:
    return (
        Counter("hsmwrap_http_requests", "API requests by action and code.", ("action", "code")),
        Histogram(
            "hsmwrap_http_request_seconds",
            "Time to answer an API request.",
            ("action",),
            buckets=_BUCKETS,
        ),
    )


@functools.cache
def _request(action: str, code: str) -> tuple[Counter, Histogram]:
    """What counts such a request; to look it up by its labels takes longer than to count."""
    requests, latency = _requests()
    return requests.labels(action, code), latency.labels(action)


def count_request(action: str, code: str, seconds: float) -> None:
    """Count an API request; ``action`` comes from a closed list, or the labels grow for ever."""
    with _UPDATING.write():
        requests, latency = _request(action, code)
        requests.inc()
        latency.observe(coarse(action, seconds))


_Family = GaugeMetricFamily | CounterMetricFamily

_BACKEND_GAUGES: Mapping[str, str] = MappingProxyType(
    {
        "sessions_in_use": "HSM sessions lent to running calls.",
        "sessions_idle": "HSM sessions open and idle.",
        "sessions_waiting": "Calls that wait for an HSM session.",
        "sessions_cap": "Most HSM sessions that the pool opens.",
        "in_flight": "Calls inside the backend.",
        "generation": "Number of initialisations of the PKCS#11 module in this process.",
        "pending_objects": "Objects of failed calls that could not be destroyed yet.",
        "implicit_rejection": "1 where wrong PKCS#1 v1.5 padding becomes random bytes (tried).",
        "one_at_a_time": "1 where the PKCS#11 module is called by one thread at a time.",
    }
)
"""Facts of :meth:`Backend.health` that become gauges, where a backend has them."""

_BREAKER_STATES = ("closed", "half-open", "open")

_POOL_GAUGES: Mapping[str, str] = MappingProxyType(
    {
        "level": "Wrapping key pairs ready.",
        "stopped": "1 where making pairs ahead was given up.",
    }
)
_POOL_COUNTERS: Mapping[str, str] = MappingProxyType(
    {
        "hits": "Calls that were given a ready pair.",
        "misses": "Calls for which no pair was ready.",
        "generated": "Pairs made ahead.",
        "discarded": "Pairs that were never used.",
        "errors": "Calls of the backend that failed in the background.",
    }
)


_KMS: Mapping[str, tuple[Callable[..., _Family], str, tuple[str, ...]]] = MappingProxyType(
    {
        "access_keys_current": (
            GaugeMetricFamily,
            "1 where the access keys are those of their file as it is now.",
            (),
        ),
        "audit_failures": (CounterMetricFamily, "Failed attempts to write the audit log.", ()),
        "audit_log_whole": (
            GaugeMetricFamily,
            "0 where the anchored line of the audit log is missing.",
            (),
        ),
        "key_set": (
            GaugeMetricFamily,
            "1 for each key set that was in use, with its use at the last sweep.",
            ("backend", "key_set", "use"),
        ),
        "keys": (GaugeMetricFamily, "CMKs by state at the last sweep.", ("state",)),
        "keys_unusable": (GaugeMetricFamily, "Keys that are known not to be usable.", ()),
        "last_sweep_timestamp_seconds": (
            GaugeMetricFamily,
            "When the last sweep ended, in seconds since 1970.",
            (),
        ),
        "processes_ready": (GaugeMetricFamily, "Processes of which /readyz says ready.", ()),
        "sweep_failures": (CounterMetricFamily, "Parts of sweeps that failed.", ()),
    }
)
KmsFacts = Mapping[str, float | Mapping[tuple[str, ...], float]]
"""What :meth:`hsmwrap.kms.service.Kms.gauges` says: a value, or one for each tuple of labels."""

_RULES: Mapping[str, Rule] = MappingProxyType(
    dict.fromkeys(
        (
            "hsmwrap_access_keys_current",
            "hsmwrap_audit_log_whole",
            "hsmwrap_backend_ready",
            "hsmwrap_last_sweep_timestamp_seconds",
        ),
        min,
    )
    | dict.fromkeys(
        (
            "hsmwrap_backend_generation",
            "hsmwrap_backend_implicit_rejection",
            "hsmwrap_backend_one_at_a_time",
            "hsmwrap_key_set",
            "hsmwrap_keypool_stopped",
            "hsmwrap_keys",
            "hsmwrap_keys_unusable",
        ),
        max,
    )
)
"""How the facts of several processes become one, where they are not added up: the worst counts."""

_SHARED = (
    SharedMetrics(Path(os.environ[_MULTIPROCESS]), _RULES) if _MULTIPROCESS in os.environ else None
)
if _SHARED:
    values.ValueClass = values.MultiProcessValue(_SHARED.slot)  # type: ignore[no-untyped-call]


class FactsCollector(Collector):
    """Reads the health of backends and the stocks of pools at each scrape."""

    def __init__(
        self,
        backends: Iterable[Backend],
        pools: Iterable[KeyPool] = (),
        kms: Callable[[], KmsFacts] = dict,
    ) -> None:
        """Take what to read; a backend that is given twice is read once.

        ``kms`` returns the reference KMS's own gauges (:meth:`hsmwrap.kms.service.Kms.gauges`).

        Raises:
            ConfigurationError: Two backends have the same name, so that their numbers would mix.
        """
        self._backends = tuple({id(backend): backend for backend in backends}.values())
        self._pools = tuple(pools)
        self._kms = kms
        names = [backend.name for backend in self._backends]
        if len(set(names)) < len(names):
            raise ConfigurationError(f"backends with the same name cannot be told apart: {names}")

    def collect(self) -> Iterator[Metric]:
        """The metrics now."""
        yield from self._of_backends()
        yield from self._of_pools()
        yield from self._of_kms()

    def describe(self) -> list[Metric]:
        """Nothing: a registry that asks at registration must not read the health yet."""
        return []

    def _of_backends(self) -> Iterator[Metric]:
        health = {backend.name: backend.health() for backend in self._backends}
        ready = _gauge("hsmwrap_backend_ready", "1 where calls can succeed.", "backend")
        breaker = _gauge("hsmwrap_backend_breaker", "1 at the breaker's state.", "backend", "state")
        recoveries = _counter(
            "hsmwrap_backend_recoveries", "Recoveries by return code.", "backend", "ckr"
        )
        for name, state in health.items():
            _add(ready, state.ready, name)
            if "breaker" in state.facts:
                for each in _BREAKER_STATES:
                    _add(breaker, each == state.facts["breaker"], name, each)
            for ckr, count in state.facts.get("recoveries", {}).items():
                _add(recoveries, count, name, ckr)
        yield from (ready, breaker, recoveries)
        for fact, text in _BACKEND_GAUGES.items():
            gauge = _gauge(f"hsmwrap_backend_{fact}", text, "backend")
            for name, state in health.items():
                if fact in state.facts:
                    _add(gauge, state.facts[fact], name)
            yield gauge

    def _of_kms(self) -> Iterator[Metric]:
        facts = self._kms()
        for name, (make, text, labels) in _KMS.items():
            family = make(f"hsmwrap_{name}", text, labels=labels)
            fact = facts.get(name, {})
            for where, value in fact.items() if isinstance(fact, Mapping) else [((), fact)]:
                family.add_metric(where, value)
            yield family
        processes = _gauge("hsmwrap_processes", "Processes that serve.")
        processes.add_metric((), 1)
        yield processes

    def _of_pools(self) -> Iterator[Metric]:
        kinds = [kind for pool in self._pools for kind in pool.facts()]
        labels = ("backend", "spec", "algorithm")
        families = [
            (make(f"hsmwrap_keypool_{fact}", text, *labels), fact)
            for make, table in ((_gauge, _POOL_GAUGES), (_counter, _POOL_COUNTERS))
            for fact, text in table.items()
        ]
        for family, fact in families:
            for kind in kinds:
                _add(family, getattr(kind, fact), kind.backend, kind.spec, kind.algorithm)
            yield family


def render(*collectors: Collector) -> bytes:
    """Everything in the text format: what was counted, then what ``collectors`` read now.

    Collectors that are given here need not be in a registry, and must not be in the default one.
    """
    counted, facts = REGISTRY, [each for one in collectors for each in one.collect()]
    if _SHARED:
        counted, facts = CollectorRegistry(), _SHARED.of_all(facts)
        MultiProcessCollector(counted)  # type: ignore[no-untyped-call]  # the library's
    read = CollectorRegistry()
    read.register(_Collected(facts))
    with _UPDATING.write():
        text = generate_latest(counted)
    return text + generate_latest(read)


def publish(*collectors: Collector) -> None:
    """Write what the collectors say for the pages of other processes; nothing with only one."""
    if _SHARED:
        _SHARED.publish(each for one in collectors for each in one.collect())


class _Collected(Collector):
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> list[Metric]:
        return self._metrics


def _gauge(name: str, text: str, *labels: str) -> _Family:
    return GaugeMetricFamily(name, text, labels=labels)


def _counter(name: str, text: str, *labels: str) -> _Family:
    return CounterMetricFamily(name, text, labels=labels)


def _add(family: _Family, value: float, *labels: str) -> None:
    family.add_metric(labels, value)
