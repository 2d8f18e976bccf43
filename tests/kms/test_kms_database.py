"""The database: migration, transactions, contents, and outages."""

import base64
import json
import os
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, OperationalError
from support.kms.fakes import AES_MATERIAL, Client

from hsmwrap.errors import ConfigurationError, ServiceUnavailable
from hsmwrap.kms import database as database_module
from hsmwrap.kms.blobs import CiphertextBlob
from hsmwrap.kms.database import Database, surely_rolled_back, use_wal
from hsmwrap.kms.errors import CommitUnknown
from hsmwrap.kms.schema import Row


@pytest.fixture
def database(empty_database_url):
    database = Database(empty_database_url, sync=False)
    yield database
    database.close()


def test_migrations_make_the_schema(database):
    database.migrate()
    database.migrate()
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Row.metadata) == []


def test_processes_migrate_at_once(empty_database_url):
    databases = [Database(empty_database_url, sync=False) for _ in range(4)]
    failed = []

    def migrate(database):
        try:
            database.migrate()
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=migrate, args=(database,)) for database in databases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    for database in databases:
        with database.read() as transaction:
            assert transaction.execute(text("SELECT count(*) FROM keys")).scalar() == 0
        database.close()


def test_write_is_whole_or_nothing(database):
    database.migrate()
    insert = text("INSERT INTO audit_anchors VALUES ('a', 1, 'd', 0, 0)")

    def fail():
        with database.write() as transaction:
            transaction.execute(insert)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with database.write() as transaction:
        assert transaction.execute(text("SELECT * FROM audit_anchors")).all() == []
        transaction.execute(insert)
    with database.read() as transaction:
        assert len(transaction.execute(text("SELECT * FROM audit_anchors")).all()) == 1


def test_settings_of_sqlite(sqlite_url):
    database = Database(sqlite_url)
    with database.read() as transaction:
        pragmas = ("journal_mode", "foreign_keys", "synchronous", "busy_timeout")
        values = [transaction.execute(text(f"PRAGMA {name}")).scalar() for name in pragmas]
    database.close()
    assert values == ["wal", 1, 2, 10_000]


@pytest.fixture
def postgres_url(postgres_cluster):
    return postgres_cluster.new_database()


def settings_of(database):
    names = ("lock_timeout", "idle_in_transaction_session_timeout")
    with database.read() as transaction:
        return [transaction.execute(text(f"SHOW {name}")).scalar() for name in names]


def test_settings_of_postgresql(postgres_url):
    database = Database(postgres_url)
    _, connect = database.engine.dialect.create_connect_args(database.engine.url)
    assert settings_of(database) == ["10s", "1min"]
    with database.write() as transaction:
        parameters = transaction.connection().connection.driver_connection.info.get_parameters()
    assert (parameters["connect_timeout"], "connect_timeout" in connect) == ("10", False)
    database.close()


def test_settings_of_postgresql_in_the_url_stand(postgres_url):
    database = Database(f"{postgres_url}&connect_timeout=3&options=-clock_timeout%3D20ms")
    assert settings_of(database) == ["20ms", "1min"]
    with database.write() as transaction:
        parameters = transaction.connection().connection.driver_connection.info.get_parameters()
    assert parameters["connect_timeout"] == "3"
    database.close()


def test_lock_of_another_is_not_waited_for_for_ever(postgres_url):
    holder = Database(postgres_url)
    holder.migrate()
    waiter = Database(f"{postgres_url}&options=-clock_timeout%3D20ms")
    lock = text("LOCK TABLE keys")
    with holder.write() as transaction:
        transaction.execute(lock)
        with pytest.raises(ServiceUnavailable), waiter.write() as other:
            other.execute(lock)
    holder.close()
    waiter.close()


def test_transaction_that_was_left_open_is_ended(postgres_url):
    options = "-cidle_in_transaction_session_timeout%3D20ms"
    database = Database(f"{postgres_url}&options={options}")

    def stall():
        with database.write() as transaction:
            transaction.execute(text("SELECT 1"))
            time.sleep(0.5)
            transaction.execute(text("SELECT 1"))

    with pytest.raises(ServiceUnavailable):
        stall()
    database.ping()
    database.close()


def test_migration_waits_for_another_however_long(postgres_url):
    busy = Database(postgres_url)
    patient = Database(f"{postgres_url}&options=-clock_timeout%3D20ms")
    thread = threading.Thread(target=patient.migrate)
    with busy.write() as transaction:
        transaction.execute(
            text(f"SELECT pg_advisory_xact_lock({database_module._MIGRATION_LOCK})")
        )
        thread.start()
        thread.join(0.5)
        assert thread.is_alive()
    thread.join()
    with patient.read() as transaction:
        assert transaction.execute(text("SELECT count(*) FROM keys")).scalar() == 0
    busy.close()
    patient.close()


def test_read_only_database_is_unavailable(database_url, tmp_path):
    database = Database(database_url, sync=False)
    database.migrate()
    insert = text("INSERT INTO used_once VALUES ('d', 1)")
    read_only = {
        "postgresql": "SET default_transaction_read_only=on",
        "sqlite": "PRAGMA query_only=1",
    }
    with database.engine.connect() as connection:
        connection.exec_driver_sql(read_only[connection.dialect.name])
        connection.commit()
    with pytest.raises(ServiceUnavailable), database.write() as transaction:
        transaction.execute(insert)
    database.close()


def test_failed_commit_is_told_from_a_failure_before_it(database, monkeypatch):
    database.migrate()
    insert = text("INSERT INTO used_once VALUES ('d', 1)")

    def fail_before():
        with database.write() as transaction:
            transaction.execute(insert)
            raise OperationalError("INSERT", {}, Exception())

    with pytest.raises(ServiceUnavailable) as before:
        fail_before()
    assert surely_rolled_back(before.value)
    commit = database.engine.dialect.do_commit

    def answer_is_lost(connection):
        commit(connection)
        raise database.engine.dialect.loaded_dbapi.OperationalError("connection lost")

    monkeypatch.setattr(database.engine.dialect, "do_commit", answer_is_lost)
    with pytest.raises(CommitUnknown) as during, database.write() as transaction:
        transaction.execute(insert)
    monkeypatch.undo()
    assert not surely_rolled_back(during.value)
    assert not surely_rolled_back(KeyboardInterrupt())
    with database.read() as transaction:
        assert transaction.execute(text("SELECT count(*) FROM used_once")).scalar() == 1


def test_several_open_a_new_sqlite_file(tmp_path, monkeypatch):
    """SQLite itself does not wait then: field note 97."""
    file = tmp_path / "new.db"
    writer = sqlite3.connect(file, isolation_level=None)
    writer.execute("CREATE TABLE used_once (value INTEGER)")
    writer.execute("BEGIN IMMEDIATE")
    waited = []

    def wait(seconds):
        waited.append(seconds)
        writer.execute("COMMIT")

    monkeypatch.setattr(time, "sleep", wait)
    database = Database(f"sqlite:///{file}")
    with database.read() as transaction:
        assert transaction.execute(text("PRAGMA journal_mode")).scalar() == "wal"
    assert len(waited) == 1
    database.close()
    writer.close()


def test_the_lock_on_a_new_sqlite_file_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(database_module, "BUSY_SECONDS", 0.05)
    with closing(sqlite3.connect(tmp_path / "new.db", isolation_level=None)) as writer:
        writer.execute("CREATE TABLE used_once (value INTEGER)")
        writer.execute("BEGIN IMMEDIATE")
        other = sqlite3.connect(tmp_path / "new.db")
        with closing(other), pytest.raises(sqlite3.OperationalError, match="locked"):
            use_wal(other)


def test_sqlite_writers_take_turns(sqlite_url):
    database = Database(sqlite_url, sync=False)
    database.migrate()
    with database.write() as transaction:
        transaction.execute(text("INSERT INTO audit_anchors VALUES ('a', 0, 'd', 0, 0)"))

    def count_up():
        for _ in range(25):
            with database.write() as transaction:
                value = transaction.execute(text("SELECT sequence FROM audit_anchors")).scalar()
                transaction.execute(text(f"UPDATE audit_anchors SET sequence = {value + 1}"))

    threads = [threading.Thread(target=count_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as transaction:
        assert transaction.execute(text("SELECT sequence FROM audit_anchors")).scalar() == 100
    database.close()


def test_sqlite_writers_come_in_the_order_of_asking(sqlite_url):
    database = Database(sqlite_url, sync=False)
    database.migrate()
    order, threads = [], []

    def write(number):
        with database.write():
            order.append(number)

    with database.write():
        for number in range(6):
            threads.append(threading.Thread(target=write, args=(number,)))
            threads[-1].start()
            while database._turn.waiting <= number:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert order == list(range(6))
    database.close()


def test_sqlite_writer_does_not_wait_for_ever(sqlite_url, monkeypatch):
    monkeypatch.setattr(database_module, "BUSY_SECONDS", 0.05)
    database = Database(sqlite_url, sync=False)
    waiting, refused = ThreadPoolExecutor(1), []

    def write():
        with pytest.raises(ServiceUnavailable, match="others write the database"), database.write():
            refused.append("not")
        refused.append("refused")

    with database.write():
        waiting.submit(write).result(30)
    assert refused == ["refused"]
    database.close()


def until(condition):
    give_up = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


class TestSingleStatements:
    def test_what_they_change_and_return(self, database_url):
        database = Database(database_url, sync=False)
        database.migrate()
        made = database.run(
            "INSERT INTO used_once VALUES (:digest, :expires_at) ON CONFLICT DO NOTHING",
            {"digest": b"one" * 10, "expires_at": 1},
        )
        assert (made.changed, made.rows) == (1, [])
        found = database.run("SELECT expires_at FROM used_once WHERE expires_at < :n", {"n": 2})
        assert [tuple(row) for row in found.rows] == [(1,)]
        database.close()

    def test_on_postgresql_each_value_has_its_type(self, postgres_url):
        database = Database(postgres_url)
        wanted = {"data": bytes(range(256)), "text": "ä'\\$1"}
        asked = (
            "SELECT cast(:data AS bytea), cast(:number AS bigint), cast(:text AS text), :text || ''"
        )
        for number in (0, 2**62):
            found = database.run(asked, wanted | {"number": number})
            assert found.rows == [(wanted["data"], number, wanted["text"], wanted["text"])]
        names = database.run("SELECT name FROM pg_prepared_statements", {}).rows
        assert len(names) == 2
        database.close()

    @pytest.mark.parametrize("there", [True, False], ids=["prepared there", "not there"])
    def test_on_postgresql_a_session_may_be_another_each_time(self, postgres_url, there):
        """As a connection pooler gives them (PgBouncer, pool_mode=transaction)."""
        database = Database(postgres_url)
        asked = "SELECT cast(:number AS bigint)"
        if there:
            taken = database._bare._taken()
            name, sql, _ = database._bare.known(asked)
            taken.connection.pgconn.prepare(name, sql)
            database._bare._idle.append(taken)
        else:
            assert database.run(asked, {"number": 1}).rows == [(1,)]
            database.run("DEALLOCATE ALL", {})
        pid = database.run("SELECT pg_backend_pid()", {}).rows
        for number in (2, 3):
            assert database.run(asked, {"number": number}).rows == [(number,)]
        assert database.run("SELECT pg_backend_pid()", {}).rows == pid
        own = "SELECT 1 FROM pg_prepared_statements WHERE statement LIKE '%statement LIKE%'"
        assert database.run(own, {}).rows == []  # and none is prepared any more
        database.close()

    def test_on_postgresql_a_connection_is_used_again_and_alone(self, postgres_url):
        database = Database(postgres_url)
        own = "SELECT pg_backend_pid()"
        first, again = (database.run(own, {}).rows[0][0] for _ in range(2))
        assert first == again
        with database.read() as transaction:
            assert transaction.execute(text(own)).scalar() != first
        with ThreadPoolExecutor(2) as threads:
            slow = "SELECT pg_backend_pid(), pg_sleep(0.2)"
            pids = [r.rows[0][0] for r in threads.map(lambda _: database.run(slow, {}), range(2))]
        assert len(set(pids)) == 2
        database.close()
        other = Database(postgres_url)
        left, wanted = "SELECT 1 FROM pg_stat_activity WHERE pid = ANY(:pids)", [first, *pids]
        until(lambda: not other.run(left, {"pids": wanted}).rows)
        other.close()

    def test_on_postgresql_each_takes_effect_at_once(self, postgres_url):
        database, other = Database(postgres_url), Database(postgres_url)
        database.migrate()
        insert = "INSERT INTO used_once VALUES (:digest, 1)"
        database.run(insert, {"digest": b"two" * 10})
        with pytest.raises(IntegrityError):
            database.run(insert, {"digest": b"two" * 10})
        assert len(other.run("SELECT 1 FROM used_once", {}).rows) == 1
        for each in (database, other):
            each.close()

    def test_on_postgresql_one_that_the_server_ended_is_replaced(self, postgres_url):
        database, other = Database(postgres_url), Database(postgres_url)
        (pid,) = database.run("SELECT pg_backend_pid()", {}).rows[0]
        other.run("SELECT pg_terminate_backend(:pid)", {"pid": pid})
        left = "SELECT 1 FROM pg_stat_activity WHERE pid = :pid"
        until(lambda: not other.run(left, {"pid": pid}).rows)
        assert database.run("SELECT pg_backend_pid()", {}).rows[0][0] != pid
        for each in (database, other):
            each.close()

    def test_on_postgresql_an_outage_is_a_typed_error(self, postgres_url):
        database = Database(postgres_url)
        end = "SELECT pg_terminate_backend(pg_backend_pid())"
        with pytest.raises(ServiceUnavailable):
            database.run(end, {})
        assert database.run("SELECT 1", {}).rows == [(1,)]
        database.close()

    def test_on_postgresql_a_child_has_connections_of_its_own(self, postgres_url):
        database = Database(postgres_url)
        own = "SELECT pg_backend_pid()"
        mine = database.run(own, {}).rows[0][0]
        read, write = os.pipe()
        if not (child := os.fork()):
            os.write(write, str(database.run(own, {}).rows[0][0]).encode())
            os._exit(0)
        os.waitpid(child, 0)
        assert int(os.read(read, 100)) != mine
        assert database.run(own, {}).rows[0][0] == mine
        for end in (read, write):
            os.close(end)
        database.close()


def test_transactions_on_postgresql_prepare_no_statement(postgres_url):
    """psycopg numbers them, and behind a connection pooler a number is another client's."""
    database = Database(postgres_url, pool_size=1)
    for number in range(8):  # psycopg prepares what it runs a sixth time
        with database.write() as transaction:
            assert transaction.execute(text("SELECT :n + 1"), {"n": number}).scalar() == number + 1
    with database.write() as transaction:
        assert transaction.execute(text("SELECT name FROM pg_prepared_statements")).all() == []
    database.close()


class TestIdleConnectionsOfPostgresql:
    @pytest.fixture
    def database(self, postgres_url):
        database = Database(postgres_url)
        yield database
        database.close()

    @pytest.fixture
    def pings(self, database, monkeypatch):
        pings, ping = [], database.engine.dialect.do_ping
        monkeypatch.setattr(
            database.engine.dialect, "do_ping", lambda one: [pings.append(1), ping(one)]
        )
        return pings

    def test_that_were_used_just_now_are_not_asked(self, database, pings, monkeypatch):
        monkeypatch.setattr(database_module, "_TRUSTED_SECONDS", 3600)
        for _ in range(3):
            database.ping()
        assert pings == []

    def test_that_were_idle_are_asked(self, database, pings, monkeypatch):
        monkeypatch.setattr(database_module, "_TRUSTED_SECONDS", 0)
        for _ in range(3):
            database.ping()
        assert pings == [1, 1]

    def test_that_the_server_ended_are_made_anew(self, database, postgres_url, pings, monkeypatch):
        monkeypatch.setattr(database_module, "_TRUSTED_SECONDS", 3600)
        with database.read() as transaction:
            pid = transaction.execute(text("SELECT pg_backend_pid()")).scalar()
        other = Database(postgres_url)
        with other.read() as transaction:
            transaction.execute(text("SELECT pg_terminate_backend(:pid, 10000)"), {"pid": pid})
        other.close()
        database.ping()
        assert pings == [1]


def test_absent_database(tmp_path):
    database = Database(f"sqlite:///{tmp_path}/no/such/directory/kms.db")
    with pytest.raises(ServiceUnavailable):
        database.ping()
    postgres = Database(f"postgresql+psycopg://kms:pass-word@/kms?host={tmp_path}")
    with pytest.raises(ServiceUnavailable) as caught:
        postgres.ping()
    assert "pass-word" not in str(caught.value) + repr(postgres)
    database.close()
    postgres.close()


def test_health_without_a_database(open_kms, tmp_path, monkeypatch):
    kms = open_kms()
    absent = Database(f"sqlite:///{tmp_path}/no/such/directory/kms.db")
    monkeypatch.setattr(kms, "_database", absent)
    health = kms.health()
    monkeypatch.undo()
    assert not health.ready
    assert health.facts["database"].startswith("the database is unavailable")


def test_no_plaintext_in_the_database(open_kms, custody):
    client = Client(open_kms(custody))
    key_id = client.create()
    client.import_material(key_id, AES_MATERIAL)
    data_key = client("GenerateDataKey", KeyId=key_id)
    rows = []
    with client.kms._database.read() as transaction:
        for table in Row.metadata.tables:
            rows += transaction.execute(text(f"SELECT * FROM {table}")).all()
    everything = b"|".join(
        bytes(value) if isinstance(value, bytes | memoryview) else json.dumps(value).encode()
        for row in rows
        for value in row
    )
    assert key_id.encode() in everything
    for secret in (AES_MATERIAL, base64.b64decode(data_key["Plaintext"])):
        for form in (secret, secret.hex().encode(), base64.b64encode(secret)):
            assert form not in everything


def test_blob_round_trip():
    blob = CiphertextBlob("8a8e3a5f-0000-4000-8000-000000000000", b"ciphertext")
    raw = blob.to_bytes()
    assert raw[0] == 1
    assert CiphertextBlob.from_bytes(raw) == blob


class TestSqliteFiles:
    @pytest.fixture(autouse=True)
    def open_umask(self):
        before = os.umask(0)
        yield
        os.umask(before)

    def modes(self, directory):
        return {path.name: path.stat().st_mode & 0o777 for path in directory.glob("kms.db*")}

    def test_are_for_this_user_only(self, sqlite_url, tmp_path):
        database = Database(sqlite_url, sync=False)
        database.migrate()
        with database.write() as transaction:
            transaction.execute(text("INSERT INTO used_once VALUES ('a', 1)"))
            names = ("kms.db", "kms.db-wal", "kms.db-shm")
            assert self.modes(tmp_path) == dict.fromkeys(names, 0o600)
        database.close()

    def test_of_an_older_release_are_closed(self, sqlite_url, tmp_path, caplog):
        database = Database(sqlite_url, sync=False)
        database.migrate()
        for path in tmp_path.glob("kms.db*"):
            path.chmod(0o644)
        again = Database(sqlite_url, sync=False)
        again.ping()
        assert set(self.modes(tmp_path).values()) == {0o600}
        assert caplog.text.count("a database file was open to others") == 3
        database.close()
        again.close()

    def test_in_a_directory_that_everyone_can_write_are_refused(self, sqlite_url, tmp_path):
        for mode in (0o777, 0o1777):
            tmp_path.chmod(mode)
            with pytest.raises(ConfigurationError, match="every user can write the directory"):
                Database(sqlite_url).ping()
        assert self.modes(tmp_path) == {}
        tmp_path.chmod(0o770)
        database = Database(sqlite_url)
        database.ping()
        database.close()

    @pytest.mark.skipif(
        os.geteuid() != 0, reason="capability: only root can change the owner of files"
    )
    @pytest.mark.parametrize("what", ["kms.db", "."])
    def test_of_another_user_are_refused(self, sqlite_url, tmp_path, what):
        (tmp_path / "kms.db").touch(0o600)
        os.chown(tmp_path / what, 12345, -1)
        with pytest.raises(ConfigurationError, match="belongs to uid 12345"):
            Database(sqlite_url).ping()

    def test_named_by_a_uri_are_refused(self, tmp_path):
        with pytest.raises(ConfigurationError, match="has to be sqlite:///FILE"):
            Database(f"sqlite:///file:{tmp_path}/kms.db?mode=rwc&uri=true")
