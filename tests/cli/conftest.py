import json

import pytest

from hsmwrap.cli import main


@pytest.fixture
def run_json(capsys):
    """Run a subcommand with --json; returns its exit code and the JSON document of stdout."""

    def run(*argv):
        status = main([*argv, "--json"])
        return status, json.loads(capsys.readouterr().out)

    return run
