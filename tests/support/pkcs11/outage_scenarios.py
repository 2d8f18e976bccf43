"""Outages that have to end, behind the fault shim, each in a process and on a token of its own.

Usage: python -m support.pkcs11.outage_scenarios SCENARIO SHIM_DIRECTORY SETTINGS
"""

import gc
import json
import os
import tempfile
import threading
from datetime import UTC, datetime

from hsmwrap.http import logs
from hsmwrap.pkcs11 import Pkcs11Backend
from hsmwrap.testing.faults import CKR
from support.pkcs11 import scenarios
from support.pkcs11.engine_scenarios import outcome

# --- what is written between the lines of the log ------------------------------------------------


SECRET = os.urandom(8).hex()


class Unlucky:
    def __del__(self):
        raise ValueError(SECRET)


def no_raw_line_in_the_log(shim, settings):
    """python-pkcs11 ended a search that could not begin in a destructor, and failed again."""
    with tempfile.TemporaryFile("w+") as lines:
        stderr = os.dup(2)
        os.dup2(lines.fileno(), 2)
        try:
            write_log(shim, settings)
        finally:
            os.dup2(stderr, 2)
        lines.seek(0)
        records = [json.loads(line) for line in lines]
    assert any(each["message"] == "recovering" for each in records)
    last = [each for each in records if each["logger"] == "hsmwrap.http.logs"]
    assert [each["message"] for each in last] == ["exception ignored", "thread ended"], last
    assert SECRET not in json.dumps(records)


def write_log(shim, settings):
    logs.configure()
    with Pkcs11Backend.from_settings(settings) as backend:
        for function in ("C_FindObjectsInit", "C_FindObjects", "C_FindObjectsFinal"):
            for code in (CKR.SESSION_HANDLE_INVALID, CKR.DEVICE_ERROR, CKR.GENERAL_ERROR):
                shim.fail(function, code)
                outcome(backend.reap, datetime.now(UTC))
                shim.clear()
        shim.remove_device()
        outcome(backend.reap, datetime.now(UTC))
        shim.restore_device()
    gc.collect()
    Unlucky()
    thread = threading.Thread(target=[].pop)
    thread.start()
    thread.join()


if __name__ == "__main__":
    scenarios.main(globals())
