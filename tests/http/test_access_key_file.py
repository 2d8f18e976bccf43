import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from hsmwrap.catalog import ProtectionLevel
from hsmwrap.errors import ConfigurationError
from hsmwrap.http.app import _render
from hsmwrap.kms import Kms
from hsmwrap.kms.access import FileAccessKeys
from hsmwrap.kms.audit import AuditLog
from hsmwrap.kms.database import Database
from hsmwrap.policy import Deployment
from hsmwrap.testing import MemoryBackend

ENTRY = "[[access_key]]\nid = '{}'\nsecret = 's'\nallow = []\n"


def test_a_change_within_the_clocks_tick_is_seen_by_its_size(tmp_path):
    """As on file systems that keep whole seconds only."""
    file = tmp_path / "access-keys.toml"
    file.touch(mode=0o600)
    file.write_text(ENTRY.format("old"))
    before = file.stat()
    keys = FileAccessKeys(file)
    file.write_text(ENTRY.format("newer"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_ino == before.st_ino
    assert keys.lookup("newer") is not None
    assert keys.lookup("old") is None


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "access-keys.toml"
    file.touch(mode=0o600)
    file.write_text(ENTRY.format("good"))
    return file


HALF = {
    "empty": b"",
    "half a table": b"[[access_k",
    "half a secret": ENTRY.format("good").encode()[:-20],
    "no secret yet": b"[[access_key]]\nid = 'good'\n",
    "half a character": ENTRY.format("good").encode() + b"# \xe5",
    "blanks": b"\n\n",
}


@pytest.mark.parametrize("half", HALF.values(), ids=HALF)
def test_a_half_written_file_keeps_the_keys_of_before(file, half, caplog):
    keys = FileAccessKeys(file)
    assert keys.fault() is None
    file.write_bytes(half)
    for _ in range(3):
        assert keys.lookup("good") is not None
    assert str(file) in keys.fault()
    assert [record.message for record in caplog.records] == [
        "a changed file does not parse: what it held before stays in use"
    ]
    file.write_text(ENTRY.format("next"))
    assert keys.lookup("good") is None
    assert keys.lookup("next") is not None
    assert keys.fault() is None


@pytest.mark.parametrize("half", HALF.values(), ids=HALF)
def test_a_server_does_not_start_with_a_half_written_file(file, half):
    file.write_bytes(half)
    with pytest.raises(ConfigurationError):
        FileAccessKeys(file)


def opened_to_others(file):
    file.chmod(0o644)


def given_away(file):
    if os.geteuid() != 0:
        pytest.skip("capability: only root can change the owner of files")
    os.chown(file, 12345, -1)


@pytest.mark.parametrize("change", [opened_to_others, given_away, Path.unlink])
def test_a_file_that_is_not_private_any_more_is_refused(file, change):
    keys = FileAccessKeys(file)
    change(file)
    for call in (keys.fault, lambda: keys.lookup("good")):
        with pytest.raises(ConfigurationError, match="access_key_file"):
            call()


def test_what_is_not_private_is_refused_although_it_does_not_parse(file):
    keys = FileAccessKeys(file)
    file.write_text("half")
    file.chmod(0o644)
    with pytest.raises(ConfigurationError, match="open to others"):
        keys.lookup("good")


def test_health_and_metrics_say_so(file, tmp_path):
    database = Database(f"sqlite:///{tmp_path}/kms.db", sync=False)
    database.migrate()
    log = AuditLog(tmp_path / "audit.log", lambda: datetime.now(UTC))
    keys = FileAccessKeys(file)
    backends = {ProtectionLevel.HSM: MemoryBackend()}
    with Kms(database, backends, Deployment(), access_keys=keys, audit_log=log) as kms:

        def page():
            return _render(*kms.watched(), kms.gauges).decode()

        assert kms.health().facts["access keys"] == "ready"
        assert "hsmwrap_access_keys_current 1.0" in page()
        file.write_text("half")
        health = kms.health()
        assert health.ready
        assert "the keys of before" in health.facts["access keys"]
        assert "not TOML" in health.facts["access keys"]
        assert "hsmwrap_access_keys_current 0.0" in page()
        file.chmod(0o644)
        health = kms.health()
        assert (health.ready, health.detail) == (False, "not ready: access keys")
        assert "hsmwrap_access_keys_current 0.0" in page()
