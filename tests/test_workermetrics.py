"""Metrics of several processes: slots, and facts that are joined."""

import multiprocessing
import warnings
from contextlib import contextmanager

import pytest

pytest.importorskip("prometheus_client", reason="capability: no prometheus_client")

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from hsmwrap.workermetrics import SharedMetrics

RULES = {"ready": min, "generation": max}


def facts(ready, sessions, hits, generation=1, backend="b"):
    found = [
        GaugeMetricFamily("ready", "r", labels=["backend"]),
        GaugeMetricFamily("generation", "g", labels=["backend"]),
        GaugeMetricFamily("sessions", "s", labels=["backend"]),
        CounterMetricFamily("hits", "h", labels=["backend"]),
    ]
    for family, value in zip(found, (ready, generation, sessions, hits), strict=True):
        family.add_metric([backend], value)
    return found


def values(metrics, backend="b"):
    return {
        metric.name: sample.value
        for metric in metrics
        for sample in metric.samples
        if sample.labels == {"backend": backend}
    }


@contextmanager
def process(shared, published):
    """A forked process that has published these facts, and goes on."""
    context = multiprocessing.get_context("fork")
    pipe, its_pipe = context.Pipe()

    def run():
        shared.publish(published)
        its_pipe.send(shared.slot())
        its_pipe.recv()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = context.Process(target=run)
        child.start()
    assert pipe.poll(60)
    try:
        yield pipe.recv()
    finally:
        pipe.send("end")
        child.join(60)
    assert child.exitcode == 0


@pytest.fixture
def shared(tmp_path):
    return SharedMetrics(tmp_path, RULES)


def test_one_process_has_its_own(shared):
    assert values(shared.of_all(facts(1, 2, 3))) == {
        "ready": 1,
        "generation": 1,
        "sessions": 2,
        "hits": 3,
    }


def test_facts_of_all_are_joined_whoever_answers(shared):
    with process(shared, facts(0, 5, 7, generation=4)) as slot:
        assert (shared.slot(), slot) == ("0", "1")
        joined = values(shared.of_all(facts(1, 2, 3)))
        assert joined == {"ready": 0, "generation": 4, "sessions": 7, "hits": 10}
        with process(shared, facts(1, 1, 1, backend="c")) as another:
            assert another == "2"
            assert values(shared.of_all(facts(1, 2, 3))) == joined
            assert values(shared.of_all(facts(1, 2, 3)), "c")["hits"] == 1


def test_of_processes_that_ended_only_counters_remain_and_they_never_go_down(shared):
    for ended in range(3):
        with process(shared, facts(0, 5, 7)) as slot:
            assert slot == "1"  # the same files each time
        joined = values(shared.of_all(facts(1, 2, 3)))
        assert joined == {"ready": 1, "generation": 1, "sessions": 2, "hits": 3 + 7 * (ended + 1)}


def test_labels_that_a_successor_does_not_have_stay(shared):
    with process(shared, facts(1, 1, 5, backend="old")):
        pass
    with process(shared, facts(1, 1, 6, backend="new")):
        joined = shared.of_all(facts(1, 2, 3))
        assert values(joined, "old") == {"hits": 5}
        assert values(joined, "new")["hits"] == 6


def test_a_half_written_file_is_never_read(shared, tmp_path):
    shared.publish(facts(1, 2, 3))
    assert [path.name for path in tmp_path.glob("*facts*")] == ["facts-0.json"]
