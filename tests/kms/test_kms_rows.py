"""Rows of keys in memory: each change by any process is seen at once, and read once."""

import multiprocessing
import threading
from contextlib import contextmanager

import pytest
from sqlalchemy import event
from support.kms.fakes import Client

from hsmwrap.errors import KeyNotFound, ServiceUnavailable
from hsmwrap.kms import RejectedDisabled, RejectedPendingDeletion, RejectedPendingImport
from hsmwrap.kms import rows as rows_module
from hsmwrap.kms.database import Database
from hsmwrap.kms.rows import key_rows

pytestmark = pytest.mark.slow


SEALED = "HsmEncryptedDatabase"


@pytest.fixture
def used(open_kms):
    """A KMS that has the row of a key in memory, another KMS, and the key's id."""
    one, other = Client(open_kms(SEALED)), Client(open_kms(SEALED))
    key_id = one.create()
    one.import_material(key_id)
    one.usable(key_id)
    one.usable(key_id)
    return one, other, key_id


@contextmanager
def counted(kms):
    """The statements; what bare connections ask SQLite is not among them."""
    statements, database = [], kms._database

    def run(statement, values):
        statements.append(statement)
        return Database.run(database, statement, values)

    def note(_connection, _cursor, statement, *_more):
        statements.append(" ".join(statement.split()))

    event.listen(database.engine, "before_cursor_execute", note)
    database.run = run
    yield statements
    del database.run
    event.remove(database.engine, "before_cursor_execute", note)


def test_a_row_is_read_once_for_each_change(used, database_url):
    one, other, key_id = used
    use = one.kms.operations.use

    def encrypt():
        with counted(one.kms) as statements:
            use.encrypt(key_id, b"hello", {})
        return [s for s in statements if not s.startswith("BEGIN")]

    asked = [] if database_url.startswith("sqlite") else [1]
    encrypt()
    for _ in range(3):
        assert len(encrypt()) == len(asked)  # PostgreSQL's: the row's version
    other("UpdateKeyDescription", KeyId=key_id, Description="another")
    assert len(encrypt()) > len(asked)
    assert len(encrypt()) == len(asked)
    other.create()  # another row
    assert len(encrypt()) == len(asked)


def test_reading_takes_no_transaction(used, database_url):
    one, _, key_id = used
    begun, database = [], one.kms._database
    note = begun.append
    event.listen(database.engine, "begin", note)
    one.kms.operations.use.encrypt(key_id, b"hello", {})
    event.remove(database.engine, "begin", note)
    assert begun == []
    bare = [idle.connection.autocommit for idle in database._bare._idle]
    assert bare == ([] if database_url.startswith("sqlite") else [True])


def test_a_sealed_blob_is_not_looked_up_as_an_object_to_destroy(used):
    one, _, key_id = used
    with counted(one.kms) as statements:
        one.import_material(key_id)
        one("DeleteKeyMaterial", KeyId=key_id)
    assert any("keys" in statement for statement in statements)
    assert not any("scheduled_destructions" in statement for statement in statements)


class TestAChangeByAnotherProcess:
    """It is seen by the very next request."""

    def refused(self, client, key_id, error):
        with pytest.raises(error):
            client("Encrypt", KeyId=key_id, Plaintext="aGVsbG8=")

    def test_disabled_and_enabled(self, used):
        one, other, key_id = used
        for _ in range(3):
            other("DisableKey", KeyId=key_id)
            self.refused(one, key_id, RejectedDisabled)
            other("EnableKey", KeyId=key_id)
            one.usable(key_id)

    def test_material_deleted_and_imported_again(self, used):
        one, other, key_id = used
        for _ in range(3):
            other("DeleteKeyMaterial", KeyId=key_id)
            self.refused(one, key_id, RejectedPendingImport)
            other.import_material(key_id)
            one.usable(key_id)

    def test_deleted(self, used, clock):
        one, other, key_id = used
        other("ScheduleKeyDeletion", KeyId=key_id, PendingWindowInDays="7")
        self.refused(one, key_id, RejectedPendingDeletion)
        clock.advance(days=7)
        self.refused(one, key_id, KeyNotFound)
        other.kms.sweep()
        self.refused(one, key_id, KeyNotFound)

    def test_expired_while_it_is_in_memory(self, used, clock):
        one, other, key_id = used
        other.import_material(key_id, KeyMaterialExpireUnix=clock.unix(hours=1))
        one.usable(key_id)
        clock.advance(hours=1)
        self.refused(one, key_id, RejectedPendingImport)

    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
    def test_by_a_child_that_was_forked(self, used):
        one, _, key_id = used

        def disable():
            one.usable(key_id)
            one("DisableKey", KeyId=key_id)

        child = multiprocessing.get_context("fork").Process(target=disable)
        child.start()
        child.join()
        assert child.exitcode == 0
        self.refused(one, key_id, RejectedDisabled)

    def test_many_at_once(self, used):
        """While one KMS uses the key in many threads, none uses it after another's answer."""
        one, other, key_id = used
        disabled, too_late, seen = threading.Event(), [], []

        def use():
            while True:
                before = disabled.is_set()
                try:
                    one("Encrypt", KeyId=key_id, Plaintext="aGVsbG8=")
                except RejectedDisabled:
                    seen.append(before)
                    return
                too_late.append(before)

        threads = [threading.Thread(target=use) for _ in range(8)]
        for thread in threads:
            thread.start()
        while not too_late:
            pass
        other("DisableKey", KeyId=key_id)
        disabled.set()
        for thread in threads:
            thread.join()
        assert len(seen) == 8
        assert True not in too_late


def test_no_more_rows_are_kept_than_that(open_kms, monkeypatch):
    monkeypatch.setattr(rows_module, "MOST_ROWS", 2)
    client = Client(open_kms(SEALED))
    ids = [client.create() for _ in range(5)]
    rows = key_rows(client.kms._database)
    for key_id in ids + ids:
        assert rows.get(key_id).key_id == key_id
    kept = rows._rows if hasattr(rows, "_rows") else rows._idle[0].rows
    assert 1 <= len(kept) <= 2
    assert rows.get("unknown") is None
    rows.close()
    assert rows.get(ids[0]).key_id == ids[0]
    rows.close()


def test_what_is_wrong_with_the_database_is_said(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/no/such/directory/kms.db")
    with pytest.raises(ServiceUnavailable, match="SQLITE_CANTOPEN"):
        key_rows(database).get("a")
    database.close()


def test_a_watcher_that_connects_again_trusts_no_row(used, database_url):
    if not database_url.startswith("sqlite"):
        return
    one, other, key_id = used
    rows = key_rows(one.kms._database)
    rows.get(key_id)
    watcher = rows._idle[0]
    watcher._connection.close()
    other("DisableKey", KeyId=key_id)
    assert watcher.unchanged(key_id) is None
    assert watcher.rows == {}  # its next connection may count to the same number
    assert rows.get(key_id).state == "Disabled"
    rows.close()
