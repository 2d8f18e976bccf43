"""A short, deterministic run of every fuzz target; scripts/fuzz goes on for as long as wanted."""

import pytest
from fuzzing import mutations
from fuzzing.targets import CORPUS, TARGETS

MUTATIONS = 1_000


@pytest.fixture(params=TARGETS.values(), ids=TARGETS)
def target(request):
    return request.param


def test_every_input_of_the_corpus_has_a_right_outcome(target):
    for seed in target.seeds():
        target.run(seed)


def test_changed_inputs_have_a_right_outcome(target):
    for data in mutations.mutated(target.seeds(), MUTATIONS, target.name):
        target.run(data)


def test_the_corpus_has_no_directory_that_no_target_reads():
    assert {each.name for each in CORPUS.iterdir()} == set(TARGETS)


def test_mutations_are_the_same_each_time_and_change_something():
    first, again = (list(mutations.mutated([b"seed"], 50, "x")) for _ in range(2))
    assert first == again
    assert len(set(first) - {b"seed"}) > 40
