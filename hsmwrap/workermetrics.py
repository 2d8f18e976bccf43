"""Metrics of several processes as those of one server.

The processes share a directory. Each has a *slot* in it, a number with a lock, and takes the first
one that is free: a process that follows another goes on with its counters, so they never go down,
and there are as many files as processes at a time. In its slot's file a process writes what it
would answer to a scrape; the one that is asked adds up the files of all.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from prometheus_client.core import Metric

from hsmwrap import forks
from hsmwrap.forks import ForkAware

Rule = Callable[[float, float], float]
"""Makes one value of those of two processes."""


class SharedMetrics(ForkAware):
    """The slot of this process, and the facts of all. Safe after ``fork()``: a child has its own.

    Attributes:
        directory: The processes' directory.
    """

    def __init__(self, directory: Path, rules: Mapping[str, Rule]) -> None:
        """Take the directory, and for each metric that is not to be added up how to join it."""
        self.directory = directory
        self._rules = rules
        self._lock = -1
        self._take_slot()
        forks.register(self)

    def after_fork_in_child(self) -> None:
        """Take another slot."""
        os.close(self._lock)  # the parent goes on having it
        self._take_slot()

    def _take_slot(self) -> None:
        for self._slot in itertools.count():
            self._lock = os.open(self._lock_of(self._slot), _OPEN, 0o600)
            if _try_to_lock(self._lock):
                break
            os.close(self._lock)
        self._before = _counters(self._read(self._slot))

    def slot(self) -> str:
        """The name of this process's slot, which no other running process has."""
        return str(self._slot)

    def publish(self, facts: Iterable[Metric]) -> None:
        """Write this process's facts for the others.

        Raises:
            OSError: The file cannot be written.
        """
        file = self.directory / f"facts-{self._slot}.json"
        written = [
            {
                "name": metric.name,
                "type": metric.type,
                "help": metric.documentation,
                "samples": [[each.name, each.labels, each.value] for each in metric.samples],
            }
            for metric in self._joined([self._before, facts])
        ]
        beside = file.with_name(f".{file.name}.{threading.get_ident()}")
        beside.write_text(json.dumps(written), encoding="utf-8")
        beside.replace(file)

    def of_all(self, facts: Iterable[Metric]) -> list[Metric]:
        """The facts of all processes together; of those that ended, only what they counted."""
        facts = list(facts)
        self.publish(facts)
        others = []
        for file in self.directory.glob("facts-*.json"):
            slot = int(file.stem.removeprefix("facts-"))
            if slot != self._slot:
                read = self._read(slot)
                others.append(read if self._is_taken(slot) else _counters(read))
        return self._joined([self._before, facts, *others])

    def _joined(self, sources: Iterable[Iterable[Metric]]) -> list[Metric]:
        joined: dict[str, Metric] = {}
        values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
        for metric in itertools.chain.from_iterable(sources):
            empty = Metric(metric.name, metric.documentation, metric.type)
            joined.setdefault(metric.name, empty)
            known = values.setdefault(metric.name, {})
            rule = self._rules.get(metric.name, float.__add__)
            for sample in metric.samples:
                key = sample.name, tuple(sorted(sample.labels.items()))
                value = float(sample.value)
                known[key] = rule(known[key], value) if key in known else value
        for name, metric in joined.items():
            for (sample_name, labels), value in values[name].items():
                metric.add_sample(sample_name, dict(labels), value)
        return list(joined.values())

    def _read(self, slot: int) -> list[Metric]:
        try:
            text = (self.directory / f"facts-{slot}.json").read_text("utf-8")
        except FileNotFoundError:
            return []
        found = []
        for each in json.loads(text):
            metric = Metric(each["name"], each["help"], each["type"])
            for name, labels, value in each["samples"]:
                metric.add_sample(name, labels, value)
            found.append(metric)
        return found

    def _lock_of(self, slot: int) -> Path:
        return self.directory / f"slot-{slot}.lock"

    def _is_taken(self, slot: int) -> bool:
        lock = os.open(self._lock_of(slot), _OPEN, 0o600)
        try:
            return not _try_to_lock(lock)
        finally:
            os.close(lock)


_OPEN = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC


def _try_to_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _counters(metrics: Iterable[Metric]) -> list[Metric]:
    return [metric for metric in metrics if metric.type == "counter"]
