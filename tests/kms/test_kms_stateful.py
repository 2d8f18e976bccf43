"""Random sequences of calls on two processes, against a model; ``scripts/fuzz`` runs more."""

import pytest
from support.kms import stateful

pytestmark = pytest.mark.slow


def test_two_processes_do_what_the_model_does(tmp_path):
    with stateful.TwoProcesses(tmp_path) as processes:
        stateful.run(processes, examples=15)
