"""``pytest --fast``: the tests that need no HSM module, no server and no database cluster.

One rule, which a new test falls under by itself: what starts such a service calls
``needs_service``, and in a fast run that ends the test. So that a fast run does not begin these
tests, those that ask
for a fixture of ``SERVICES`` are not even selected. The marker ``slow`` is for a test that takes
seconds without a service.
"""

SERVICES = {"hsmwrap_softhsm", "softhsm", "postgres_cluster", "nss", "server"}
LEFT_OUT = "needs a service; not in a fast run"
_run = {"fast": False}


def add_option(parser):
    help_ = "leave out the tests that need an HSM module, a server or a database cluster"
    parser.addoption("--fast", action="store_true", help=help_)


def configure(config):
    _run["fast"] = config.option.fast
    config.addinivalue_line("markers", "slow: takes seconds without a service; not in a fast run")


def select(config, items):
    if not config.option.fast:
        return
    selected, out = [], []
    for item in items:
        slow = SERVICES & set(item.fixturenames) or item.get_closest_marker("slow")
        (out if slow else selected).append(item)
    config.hook.pytest_deselected(items=out)
    items[:] = selected


def needs_service():
    """To be called before a service is started or an HSM module is loaded for a test."""
    if _run["fast"]:
        import pytest  # scripts/bench has none

        pytest.skip(LEFT_OUT)
