"""Every function that the backend calls × every code of the recovery table × every operation."""

import json
import os
import subprocess
import sys
from functools import partial

import pytest
from support.faults import matrix_worker
from support.once import once
from support.services.softhsm import make_softhsm

from hsmwrap import errors
from hsmwrap.ckr import CKR
from hsmwrap.pkcs11.binding.returncodes import RECOVERY

OPERATIONS = (
    *("issue_rsa", "issue_sm2", "import_unwrap", "import_raw", "import_sm2"),
    *("encrypt", "decrypt", "token", "reap", "discard", "open_again", "restart"),
    *("vendor_issue_sm2", "vendor_import_sm2"),
    *("capabilities", "keys_init", "keys_rotate", "keys_retire", "keys_backup", "keys_restore"),
)
STARTING = {"open_again", *(name for name in OPERATIONS if name.startswith("keys_"))}
ERRORS = {row.error.__name__ for row in RECOVERY.values()}
# An empty HSM list at start-up is a wrong setting; there is nothing yet to come back.
ERRORS_AT_START = ERRORS | {"TokenSelectionError"}


@pytest.fixture(params=OPERATIONS, scope="module")
def lines(request, tmp_path_factory):
    """What the process of an operation printed."""
    operation = request.param
    text = once(tmp_path_factory, f"matrix-{operation}", partial(run, operation))
    return [json.loads(line) for line in text.splitlines()]


def run(operation, directory):
    token = make_softhsm(directory / "token")
    settings = token.settings("faults", initial_backoff=0.0, max_backoff=0.0, session_wait=5.0)
    arguments = [directory / "shim", json.dumps(settings), token.environment["HSMWRAP_SO_PIN_FILE"]]
    done = subprocess.run(
        [sys.executable, "-m", matrix_worker.__name__, *arguments, operation],
        env=os.environ | token.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def cases(lines, request):
    """The cases of one operation in which the fault was met; each code was."""
    operation = request.node.callspec.params["lines"]
    hit = [case | {"operation": operation} for case in lines[:-1] if case["hit"]]
    assert {case["code"] for case in hit} == {code.name for code in RECOVERY}
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


def test_a_closed_backend_holds_no_session_and_no_session_object(lines):
    assert lines[-1]["held_after_close"][:2] == [0, 0]


def test_every_error_of_the_table_is_one_of_ours():
    assert all(issubclass(getattr(errors, name), errors.HsmwrapError) for name in ERRORS)
