"""What a fast run leaves out."""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from support import fast
from support.http.gunicorn_runner import running_command
from support.http.kms_over_http import running_kms
from support.services.nss import make_nss
from support.services.p11kit import p11kit_server
from support.services.postgres import PrivateCluster
from support.services.softhsm import make_softhsm
from support.skips import SkipList

STARTERS = {
    "SoftHSM": make_softhsm,
    "NSS": make_nss,
    "p11-kit": lambda path: ExitStack().enter_context(p11kit_server(None, path)),
    "PostgreSQL": lambda path: ExitStack().enter_context(PrivateCluster()),
    "a server": lambda path: ExitStack().enter_context(running_command([], path, {})),
    "a KMS": lambda path: ExitStack().enter_context(running_kms(path, None)),
}


@pytest.fixture
def fast_run(monkeypatch):
    monkeypatch.setattr(fast, "_run", {"fast": True})


def item(*fixtures, marker=None):
    return SimpleNamespace(
        fixturenames=fixtures, get_closest_marker=lambda name: marker if name == marker else None
    )


def selected(*items, fast_run=True):
    hook = SimpleNamespace(pytest_deselected=lambda items: None)
    left = list(items)
    fast.select(SimpleNamespace(option=SimpleNamespace(fast=fast_run), hook=hook), left)
    return left


@pytest.mark.parametrize("fixture", sorted(fast.SERVICES))
def test_who_asks_for_a_service_is_not_selected(fixture):
    other = item("tmp_path")
    assert selected(item("tmp_path", fixture), other) == [other]


def test_what_is_marked_as_slow_is_not_selected():
    assert selected(item(marker="slow")) == []


def test_a_whole_run_selects_everything():
    items = [item("softhsm"), item(marker="slow"), item()]
    assert selected(*items, fast_run=False) == items


@pytest.mark.parametrize("starter", STARTERS)
def test_no_service_starts_in_a_fast_run(fast_run, tmp_path, starter):
    with pytest.raises(pytest.skip.Exception, match=fast.LEFT_OUT):
        STARTERS[starter](tmp_path)


def test_what_is_left_out_is_not_counted_as_a_skip():
    report = SimpleNamespace(
        skipped=True, nodeid="tests/x.py::test_a", longrepr=("x.py", 1, f"Skipped: {fast.LEFT_OUT}")
    )
    plugin = SkipList([], whole_run=False)
    plugin.pytest_runtest_logreport(report)
    assert plugin.skipped == []
