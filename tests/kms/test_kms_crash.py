"""kill -9 at each step of the operations that make or destroy objects: each is atomic."""

import json
import signal

import pytest
from sqlalchemy import text
from support.kms.crasher import run_elsewhere
from support.kms.fakes import AES_MATERIAL, Client, import_request

from hsmwrap.kms.objects import LEASE

pytestmark = pytest.mark.slow

SCHEDULED, IMPORTED, COMMITTED = "destruction scheduled", "material imported", "row committed"
STARTED, DESTROYED = "destruction started", "object destroyed"

# Scenario → its steps, and from which step on it has happened.
SCENARIOS = {
    "first import": ([SCHEDULED, IMPORTED, COMMITTED], COMMITTED),
    "re-import": ([SCHEDULED, IMPORTED, COMMITTED, STARTED, DESTROYED], COMMITTED),
    "refused import": ([SCHEDULED, STARTED, DESTROYED], None),
    "delete material": ([COMMITTED, STARTED, DESTROYED], COMMITTED),
    "delete key": ([STARTED, DESTROYED], STARTED),
    "own material": ([SCHEDULED, IMPORTED, COMMITTED], COMMITTED),
}


def prepare(client, scenario):
    """Bring the key into the state before; returns its id and the crasher's request."""
    key_id = client.create()
    request = import_request(client.parameters(key_id), AES_MATERIAL)
    if scenario not in ("first import", "own material"):
        client("ImportKeyMaterial", **request)
    if scenario == "delete key":
        client("ScheduleKeyDeletion", KeyId=key_id, PendingWindowInDays="7")
    if scenario == "refused import":
        request = import_request(client.parameters(key_id), bytes(32))
    return key_id, {
        "first import": ("ImportKeyMaterial", request),
        "re-import": ("ImportKeyMaterial", request),
        "refused import": ("ImportKeyMaterial", request),
        "delete material": ("DeleteKeyMaterial", {"KeyId": key_id}),
        "delete key": (None, {}),
        "own material": ("CreateKey", {"ProtectionLevel": "HSM"}),
    }[scenario]


@pytest.fixture
def crash(database_url, tmp_path):
    def run(scenario, request, die_at):
        action, parameters = request
        settings = {"directory": str(tmp_path / "objects")}
        arguments = {
            "url": database_url,
            "backend": ("file", settings),
            "audit_file": str(tmp_path / "audit.log"),
            "die_at": die_at,
            "sweep_days": 7 if scenario == "delete key" else 0,
            "action": action,
            "parameters": parameters,
        }
        return run_elsewhere(arguments)

    return run


def keys_and_destructions(kms):
    with kms._database.read() as transaction:
        rows = transaction.execute(text("SELECT reference FROM keys")).all()
        destructions = transaction.execute(
            text("SELECT count(*) FROM scheduled_destructions")
        ).scalar()
    return len(rows), sum(reference is not None for (reference,) in rows), destructions


def check_outcome(client, scenario, key_id, happened):
    keys, _, _ = keys_and_destructions(client.kms)
    if scenario == "delete key":
        assert keys == 0
    elif scenario == "own material":
        assert keys == (2 if happened else 1)
    elif scenario == "delete material":
        assert client.state(key_id) == ("PendingImport" if happened else "Enabled")
    else:
        enabled = happened or scenario in ("re-import", "refused import")
        assert client.state(key_id) == ("Enabled" if enabled else "PendingImport")
        if enabled:
            client.usable(key_id)
        # A crashed operation can be repeated at once, not only after the lease.
        client.import_material(key_id)
        client.usable(key_id)


CASES = [(name, step) for name, (steps, _) in SCENARIOS.items() for step in steps]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}, {case[1]}")
def test_killed_at(open_kms, clock, objects, crash, case):
    scenario, die_at = case
    steps, commit = SCENARIOS[scenario]
    happened = commit is not None and steps.index(die_at) >= steps.index(commit)
    before = open_kms()
    key_id, request = prepare(Client(before), scenario)
    before.close()
    died = crash(scenario, request, die_at)
    assert died.returncode == -signal.SIGKILL, died.stderr
    client = Client(open_kms())
    check_outcome(client, scenario, key_id, happened)
    clock.advance(seconds=LEASE.total_seconds())
    if scenario == "delete key":
        clock.advance(days=7)
    client.kms.sweep()
    _, with_material, _ = keys_and_destructions(client.kms)
    assert objects() == with_material
    # Objects that the dead process may have made later are destroyed once more.
    clock.advance(seconds=LEASE.total_seconds())
    client.kms.sweep()
    _, with_material, destructions = keys_and_destructions(client.kms)
    assert (objects(), destructions) == (with_material, 0)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_steps_are_all_listed(open_kms, crash, scenario):
    before = open_kms()
    _, request = prepare(Client(before), scenario)
    before.close()
    done = crash(scenario, request, None)
    if scenario == "refused import":
        assert "InvalidKeyMaterial" in done.stderr
    else:
        assert json.loads(done.stdout) == SCENARIOS[scenario][0], done.stderr
