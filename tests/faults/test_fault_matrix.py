"""Every function that the backend calls × every code of the recovery table × every operation."""

import json
import os
import subprocess
import sys

import pytest
from support.services.softhsm import make_softhsm

from hsmwrap import errors
from hsmwrap.ckr import CKR
from hsmwrap.pkcs11.binding.returncodes import RECOVERY

WORKER = "support.faults.matrix_worker"
OPERATIONS = (
    *("issue_rsa", "issue_sm2", "import_unwrap", "import_raw", "import_sm2"),
    *("encrypt", "decrypt", "token", "reap", "discard", "open_again", "restart"),
    *("capabilities", "keys_init", "keys_rotate", "keys_retire"),
)
SHARES = 2
STARTING = {"open_again", "keys_init", "keys_rotate", "keys_retire"}
ERRORS = {row.error.__name__ for row in RECOVERY.values()}
# An empty list of HSMs at start-up is a wrong setting, not an outage to recover from.
ERRORS_AT_START = ERRORS | {"TokenSelectionError"}


@pytest.fixture(scope="module")
def matrix(tmp_path_factory):
    """All cases by operation, from two processes, each with its own token and share of them."""
    directories = [tmp_path_factory.mktemp("share") for _ in range(SHARES)]
    started = [start(directory, share) for share, directory in enumerate(directories)]
    cases = {operation: [] for operation in (*OPERATIONS, "close")}
    for process, directory in zip(started, directories, strict=True):
        assert process.wait() == 0, (directory / "err").read_text()[-2000:]
        for line in (directory / "out").read_text().splitlines():
            case = json.loads(line)
            cases[case["operation"]].append(case)
    return cases


def start(directory, share):
    token = make_softhsm(directory / "token")
    settings = token.settings("faults", initial_backoff=0.0, max_backoff=0.0, session_wait=5.0)
    command = [sys.executable, "-m", WORKER, directory / "shim", json.dumps(settings)]
    command += [token.environment["HSMWRAP_SO_PIN_FILE"], str(share), str(SHARES), *OPERATIONS]
    environment = os.environ | token.environment
    # Into files: a pipe that is not read yet would block the worker.
    with (directory / "out").open("w") as out, (directory / "err").open("w") as err:
        return subprocess.Popen(command, stdout=out, stderr=err, env=environment)


@pytest.fixture(params=OPERATIONS)
def cases(matrix, request):
    """The cases of one operation in which the fault was met."""
    hit = [case for case in matrix[request.param] if case["hit"]]
    assert len({case["code"] for case in hit}) == len(RECOVERY)
    return hit


def test_the_answer_is_right_or_the_error_is_documented(cases):
    allowed = {"right"} | (ERRORS_AT_START if cases[0]["operation"] in STARTING else ERRORS)
    assert [case for case in cases if case["outcome"] not in allowed] == []


def test_the_error_is_the_one_of_the_table(cases):
    """What the table promises for a code, or a call that succeeded after the recovery."""
    wrong = [
        case
        for case in cases
        if case["outcome"] not in {"right", "TokenSelectionError", "HsmUnavailable"}
        and case["outcome"] != RECOVERY[CKR[case["code"]]].error.__name__
    ]
    assert wrong == []


def test_a_normal_call_works_afterwards_and_nothing_is_left(cases):
    assert [case for case in cases if case["left"] != [0, 0, 0]] == []


def test_the_module_is_never_misused(cases):
    """No session in two threads, no C_Finalize under a call, no call before C_Initialize."""
    assert [case for case in cases if case["misuse"]] == []


def test_a_closed_backend_holds_no_session_and_no_session_object(matrix):
    assert [case["held"][:2] for case in matrix["close"]] == [[0, 0], [0, 0]]


def test_every_error_of_the_table_is_one_of_ours():
    assert all(issubclass(getattr(errors, name), errors.HsmwrapError) for name in ERRORS)
