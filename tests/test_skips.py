"""The list of expected skips can fail a run."""

from support.skips import Expected, SkipList

ENTRY = Expected("tests/x.py::*", "capability: no *", always=True)


def skip_list(*skipped, whole_run=True):
    made = SkipList([ENTRY], whole_run=whole_run)
    made.skipped = list(skipped)
    return made


def test_an_expected_skip_passes():
    made = skip_list(("tests/x.py::test_a", "capability: no SM2"))
    assert (made.unexpected(), made.lost()) == ([], [])


def test_another_reason_is_unexpected():
    skip = ("tests/x.py::test_a", "too lazy")
    assert skip_list(skip).unexpected() == [skip]


def test_another_test_is_unexpected():
    skip = ("tests/y.py::test_a", "capability: no SM2")
    assert skip_list(skip).unexpected() == [skip]


def test_a_skip_that_should_always_happen_is_missed():
    assert skip_list().lost() == [ENTRY]


def test_a_selection_misses_nothing():
    assert skip_list(whole_run=False).lost() == []
