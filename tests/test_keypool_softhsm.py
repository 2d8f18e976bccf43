"""The key-pair pool over a real HSM token: resident pairs, forks, and a process that is killed."""

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from keypool_fakes import OAEP, SM2, Child, wait_for

from hsmwrap import registry
from hsmwrap.keypool import KeyPool, PoolSettings

DAY = timedelta(hours=24)
SETTINGS = PoolSettings(pairs=(SM2,), high_water=3, low_water=1)

pytestmark = pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")


@pytest.fixture
def backend(softhsm):
    with registry.open_backend("pkcs11", softhsm.settings("keypool")) as backend:
        backend.reap(datetime.now(UTC) + 9 * DAY)
        yield backend


def resident(backend):
    """How many resident pairs there are; removes none."""
    return backend.reap(datetime(2000, 1, 1, tzinfo=UTC)).examined


def take(pool, backend):
    return pool(backend, *SM2, datetime.now(UTC) + DAY)


def fill(pool, backend):
    pool.prepare(backend, [SM2])
    wait_for(pool, lambda p: p.facts()[0].level == SETTINGS.high_water)


def test_close_leaves_only_what_was_given_away(backend):
    with KeyPool(SETTINGS) as pool:
        fill(pool, backend)
        key = take(pool, backend)
    assert resident(backend) == 1
    backend.discard_wrapping_key(key.private_key)
    assert resident(backend) == 0


def test_a_pair_lasts_as_long_as_its_import_token(backend):
    with KeyPool(SETTINGS) as pool:
        fill(pool, backend)
        take(pool, backend)
    assert backend.reap(datetime.now(UTC) + DAY).removed == ()
    assert len(backend.reap(datetime.now(UTC) + 9 * DAY).removed) == 1


def test_parent_and_children_never_share_a_pair(backend):
    with KeyPool(SETTINGS) as pool:
        fill(pool, backend)

        def child():
            keys = [take(pool, backend).public_key for _ in range(4)]
            pool.close()
            return keys

        children = [Child(child) for _ in range(3)]
        keys = [take(pool, backend).public_key for _ in range(4)]
        for each in children:
            keys += each.result()
    assert len(set(keys)) == 16


def test_an_empty_pool_generates_inline(backend):
    with KeyPool(PoolSettings(high_water=0)) as pool:
        assert len(pool(backend, *OAEP, datetime.now(UTC) + DAY).public_key) == 294
        assert pool.facts() == []


KILLED = """
import json, sys, time
from hsmwrap import registry
from hsmwrap.catalog import WrappingAlgorithm, WrappingKeySpec
from hsmwrap.keypool import KeyPool, PoolSettings
pair = WrappingKeySpec.EC_SM2, WrappingAlgorithm.SM2PKE
pool = KeyPool(PoolSettings(pairs=(pair,), high_water=3, low_water=1))
pool.prepare(registry.open_backend("pkcs11", json.loads(sys.argv[1])), [pair])
while pool.facts()[0].level < 3:
    time.sleep(0.01)
print("full", flush=True)
time.sleep(60)
"""


def test_what_a_killed_process_made_is_reaped_once_it_has_expired(backend, softhsm):
    import json

    settings = json.dumps(softhsm.settings("keypool"))
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, settings], stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "full\n"
        os.kill(process.pid, signal.SIGKILL)
    assert resident(backend) == 3
    assert backend.reap(datetime.now(UTC) + DAY).removed == ()
    assert len(backend.reap(datetime.now(UTC) + 9 * DAY).removed) == 3
