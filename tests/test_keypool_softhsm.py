"""The pool on a real token: sealed RSA and resident SM2 pairs, forks, kills, two processes."""

import json
import secrets
import signal
import subprocess
import sys
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
from support.keypool.fakes import DAY, OAEP, SM2, Child, wait_for
from support.pkcs11.objects import token_objects

from hsmwrap import registry
from hsmwrap.backend import Custody, ReapsWrappingKeys
from hsmwrap.catalog import KeySpec, ProtectionLevel
from hsmwrap.imports import Cmk, ImportService
from hsmwrap.keypool import KeyPool, PoolSettings
from hsmwrap.keypool import _pool as pool_module
from hsmwrap.pkcs11.wrapping.reaper import GRACE
from hsmwrap.policy import Deployment
from hsmwrap.testing.clients import openssl_encrypt

SETTINGS = PoolSettings(high_water=4, low_water=2)
RESIDENT = SETTINGS.max_age + SETTINGS.token_lifetime
SECOND = timedelta(seconds=1)


@pytest.fixture(scope="module")
def settings(softhsm):
    return softhsm.settings("keypool")


@pytest.fixture
def backend(settings):
    with registry.open_backend("pkcs11", settings) as backend:
        backend.capabilities()  # the probe's objects have come and gone before anything is counted
        yield backend
        ReapsWrappingKeys.of(backend).reap(_now() + 10 * DAY)


@pytest.fixture
def count_objects(softhsm, backend):
    with token_objects(softhsm) as count:
        yield count


@pytest.fixture
def pool(backend):
    with KeyPool(SETTINGS) as pool:
        pool.prepare(backend, [OAEP, SM2])
        yield pool


def _now():
    return datetime.now(UTC)


def _full(pool):
    return [facts.level for facts in pool.facts()] == [4] * len(pool.facts())


def _take(pool, backend, pair=SM2):
    return pool(backend, *pair, _now() + DAY)


@contextmanager
def other_process(settings, count):
    """A process with a pool of its own; yields it and the public keys that it took."""
    process = subprocess.Popen(
        [sys.executable, "-m", "support.keypool.process", json.dumps(settings), str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        lines = [process.stdout.readline().strip() for _ in range(count + 1)]
        assert lines.pop() == "full"
        yield process, lines


def test_sealed_pairs_leave_nothing_and_resident_ones_are_discarded_at_close(
    pool, backend, count_objects
):
    wait_for(pool, _full)
    filled = count_objects()
    sealed, resident = (_take(pool, backend, pair).private_key for pair in (OAEP, SM2))
    assert [facts.hits for facts in pool.facts()] == [1, 1]
    assert sealed.custody is Custody.HSM_ENCRYPTED_DATABASE
    assert resident.custody is Custody.HSM_INTERNAL
    pool.close()
    assert count_objects() == filled - 3  # of four SM2 pairs, the one that was taken stays
    backend.discard_wrapping_key(resident)
    assert count_objects() == filled - 4
    assert ReapsWrappingKeys.of(backend).reap(_now() + 10 * DAY).examined == 0


@pytest.mark.parametrize("pair", [OAEP, SM2])
def test_a_pooled_pair_imports_like_any_other(pool, backend, pair):
    wait_for(pool, _full)
    service = ImportService({ProtectionLevel.HSM: backend}, Deployment(), key_source=pool)
    cmk = Cmk("key-1", KeySpec.ALIYUN_AES_256, ProtectionLevel.HSM)
    parameters = service.get_parameters_for_import(cmk, *pair)
    assert sum(facts.hits for facts in pool.facts()) == 1
    ciphertext = openssl_encrypt(pair[1], parameters.public_key, secrets.token_bytes(32))
    key = service.import_key_material(cmk, ciphertext, parameters.import_token).imported.key
    assert backend.decrypt(key, backend.encrypt(key, b"message")) == b"message"


def test_no_pair_of_a_retired_key_set_is_handed_out(softhsm, monkeypatch):
    """The process had cached the set; its import tokens would be invalid from the start."""
    monkeypatch.setattr(pool_module, "KEY_SET_LIFETIME", 0.0)
    settings = softhsm.settings(f"keypool-{secrets.token_hex(4)}")
    prefix = settings["key_prefix"]
    with registry.open_backend("pkcs11", settings) as backend, KeyPool(SETTINGS) as pool:
        pool.prepare(backend, [OAEP])
        wait_for(pool, _full)
        softhsm.run_keys("rotate", prefix)
        softhsm.run_keys("retire", prefix, "1", "--force")
        key = _take(pool, backend, OAEP)
        ciphertext = openssl_encrypt(OAEP[1], key.public_key, secrets.token_bytes(32))
        assert backend.unwrap_material(
            key.private_key, OAEP[1], ciphertext, key_spec=KeySpec.ALIYUN_AES_256
        ).check_value
        assert pool.facts()[0].discarded == 4


def test_no_pair_twice_in_children_of_a_process_whose_pool_is_being_filled(
    pool, backend, count_objects
):
    before = count_objects()

    def child():
        with backend, pool:
            taken = [_take(pool, backend) for _ in range(6)]
            wait_for(pool, lambda p: p.facts()[1].level == 4)
            assert pool.facts()[1].hits + pool.facts()[1].misses == 6
            pool.close()
            for key in taken:
                backend.discard_wrapping_key(key.private_key)
        return [key.public_key for key in taken]

    taken, children = [], []
    for _ in range(4):
        taken.append(_take(pool, backend))
        children.append(Child(child))
    theirs = [key for each in children for key in each.result()]
    taken += [_take(pool, backend) for _ in range(6)]
    ours = [key.public_key for key in taken]
    assert len({*ours, *theirs}) == len(ours) + len(theirs) == 10 + 24
    for key in taken:  # what the parent had is still there: no child discarded it
        assert ReapsWrappingKeys.of(backend).reap(_now()).removed == ()
        backend.discard_wrapping_key(key.private_key)
    pool.close()
    assert count_objects() <= before


def test_a_child_takes_nothing_of_the_parents_pairs_along(pool, backend, count_objects):
    wait_for(pool, _full)
    filled = count_objects()
    assert Child(pool.close).result() is None
    assert count_objects() == filled
    assert _take(pool, backend).private_key
    assert pool.facts()[1].hits == 1


def test_pairs_of_a_killed_process_are_reaped_when_they_expire(settings, backend, count_objects):
    before = count_objects()
    started = _now()
    with other_process(settings, 0) as (process, _):
        process.send_signal(signal.SIGKILL)
    assert count_objects() == before + 4
    assert ReapsWrappingKeys.of(backend).reap(started + RESIDENT + GRACE - SECOND).removed == ()
    assert len(ReapsWrappingKeys.of(backend).reap(_now() + RESIDENT + GRACE + SECOND).removed) == 4
    assert count_objects() == before


def test_two_processes_never_give_the_same_pair(settings, backend, pool, count_objects):
    wait_for(pool, _full)
    with other_process(settings, 10) as (one, ones), other_process(settings, 10) as (two, twos):
        ours = [_take(pool, backend).public_key.hex() for _ in range(10)]
        assert len({*ours, *ones, *twos}) == 30
        one.stdin.close()
        two.stdin.close()
        assert (one.wait(60), two.wait(60)) == (0, 0)
    pool.close()
    # What was given out; no process left a pooled pair.
    # Asked in a child, which reads the token anew: this process has written, and overlooks what
    # others made before that (field note 93).
    assert Child(lambda: ReapsWrappingKeys.of(backend).reap(_now()).examined).result() == 30


def test_close_after_the_backend_leaves_the_pairs_to_the_reaper(settings, count_objects, caplog):
    before = count_objects()
    closed = registry.open_backend("pkcs11", settings)
    pool = KeyPool(SETTINGS)
    pool.prepare(closed, [SM2])
    wait_for(pool, _full)
    closed.close()
    pool.close()
    assert caplog.records[-1].left_for_the_reaper == 4
    assert count_objects() == before + 4
