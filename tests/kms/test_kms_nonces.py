"""Signature nonces: used once by all processes, however they end, without a commit for each."""

import multiprocessing
import os
import secrets
import signal
import sqlite3
import threading
import time
from datetime import timedelta

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import OperationalError

from hsmwrap.errors import ServiceUnavailable
from hsmwrap.kms import database as database_module
from hsmwrap.kms import nonces as nonces_module
from hsmwrap.kms.database import Database
from hsmwrap.kms.nonces import STEP, NonceStore

pytestmark = pytest.mark.slow

BOOT_1 = "11111111-1111-4111-8111-111111111111"
NAME_1 = BOOT_1.replace("-", "")
FORK = multiprocessing.get_context("fork")


@pytest.fixture(params=["file", "SQLite's table", "PostgreSQL's table"])
def kind(request):
    return request.param


@pytest.fixture
def boot(kind, tmp_path, monkeypatch):
    """The machine's boot id, as a file; the fallback is for systems that have none."""
    file = tmp_path / "boot_id"
    if kind == "file":
        file.write_text(f"{BOOT_1}\n")
    monkeypatch.setattr(nonces_module, "_BOOT_ID", file)
    return file


@pytest.fixture
def database_url(kind, request, migrated_sqlite, tmp_path):
    if kind == "PostgreSQL's table":
        # Not a copy: field note 94.
        url = request.getfixturevalue("postgres_cluster").new_database()
        database = Database(url)
        database.migrate()
        database.close()
        return url
    (tmp_path / "kms.db").write_bytes(migrated_sqlite.read_bytes())
    return f"sqlite:///{tmp_path}/kms.db"


@pytest.fixture
def open_store(database_url, boot, clock):
    """Opens a store on the test's database; several of them act like several processes."""
    opened = []

    def opens(clock=clock):
        database = Database(database_url, sync=False)
        opened.append((NonceStore(database, clock), database))
        return opened[-1][0]

    yield opens
    for store, database in opened:
        store.close()
        database.close()


@pytest.fixture
def soon(clock):
    return clock() + timedelta(minutes=15)


def rows(store):
    look = "SELECT digest, expires_at FROM nonces WHERE digest <> :begun"
    return store._store.select(look, {"begun": store._store.begun})


def bounds(store):
    with store._database.read() as transaction:
        return transaction.execute(text("SELECT before FROM nonce_bounds")).all()


def test_nonces_hold_across(open_store, soon):
    one, other = open_store(), open_store()
    assert one.use("a", "n", soon)
    assert not other.use("a", "n", soon)
    assert not one.use("a", "n", soon)
    assert other.use("b", "n", soon)
    assert other.use("a", "n2", soon)
    # The boundary between the parts matters.
    assert one.use("ab", "c", soon)
    assert one.use("a", "bc", soon)
    # Under another timestamp it is the same nonce.
    assert not other.use("a", "n", soon + timedelta(minutes=1))


def test_nonces_are_forgotten_when_they_are_over(open_store, clock):
    store = open_store()
    assert store.use("a", "n", clock() + timedelta(minutes=15))
    clock.advance(minutes=15)
    assert store.use("a", "n", clock() + timedelta(minutes=15))
    assert not store.use("a", "n", clock() + timedelta(minutes=15))
    clock.advance(minutes=15)
    store.purge(clock())
    assert rows(store) == []
    assert len(bounds(store)) == 1
    clock.advance(seconds=STEP.total_seconds())
    store.purge(clock())
    assert bounds(store) == []
    assert store.use("a", "n", clock() + timedelta(minutes=15))


def test_all_that_are_over_are_forgotten_in_one_sweep(open_kms, clock, monkeypatch):
    monkeypatch.setattr(nonces_module, "_BATCH", 3)
    monkeypatch.setattr(nonces_module, "_PURGE", nonces_module._PURGE.replace("500", "3"))
    kms = open_kms()
    for number in range(7):
        assert kms.nonces.use("a", str(number), clock() + timedelta(minutes=number))
    clock.advance(minutes=5)
    kms.sweep()
    assert len(rows(kms.nonces)) == 1


def test_one_nonce_is_used_once_by_many_threads(open_store, soon):
    stores = [open_store(), open_store()]
    won = []
    start = threading.Barrier(8)

    def use(store):
        start.wait()
        won.append(store.use("a", "n", soon))

    threads = [threading.Thread(target=use, args=(stores[i % 2],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won) == [False] * 7 + [True]


def in_child(work):
    """Run it in a forked child that then kills itself; nothing is closed or flushed."""

    def run():
        work()
        os.kill(os.getpid(), signal.SIGKILL)

    child = FORK.Process(target=run)
    child.start()
    return child


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_what_a_killed_process_used_stays_used(open_store, soon):
    inherited = open_store()
    assert inherited.use("a", "of the parent", soon)
    won = FORK.SimpleQueue()

    def work():
        won.put([inherited.use("a", nonce, soon) for nonce in ("of the parent", "of the child")])

    child = in_child(work)
    assert won.get() == [False, True]
    child.join()
    assert child.exitcode == -signal.SIGKILL
    for store in (inherited, open_store()):
        assert not store.use("a", "of the child", soon)
        assert not store.use("a", "of the parent", soon)
    assert inherited.use("a", "another", soon)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_processes_begin_at_once(open_store, soon):
    stores = [open_store() for _ in range(6)]
    start, won = FORK.Barrier(len(stores)), FORK.SimpleQueue()

    def work(store):
        start.wait()
        won.put(store.use("a", "n", soon))

    children = [in_child(lambda store=store: work(store)) for store in stores]
    answers = sorted(won.get() for _ in stores)
    for child in children:
        child.join()
    assert answers == [False] * 5 + [True]


def test_a_step_costs_one_commit(open_store, soon, monkeypatch):
    store, commits = open_store(), []
    write = store._database.write

    def counted():
        commits.append(1)
        return write()

    store.use("a", "0", soon)
    monkeypatch.setattr(store._database, "write", counted)
    for number in range(1, 50):
        assert store.use("a", str(number), soon + 0.99 * STEP * number / 50)
    assert commits == []
    for number in range(50, 60):
        assert store.use("a", str(number), soon + STEP)
    assert commits == [1]


class TestAfterACrash:
    """The store is lost; what the database has was committed before."""

    # SQLite's table is flushed to the disk.
    @pytest.fixture(params=["file", "PostgreSQL's table"])
    def kind(self, request):
        return request.param

    @pytest.fixture
    def crash(self, kind, boot, database_url):
        def new_boot():
            boot.write_text("22222222-2222-4222-8222-222222222222\n")

        def kill_a_server_process():
            database = Database(database_url)
            with database.read() as transaction, database.read() as other:
                pid = transaction.execute(text("SELECT pg_backend_pid()")).scalar()
                other.execute(text("SELECT 1"))
                os.kill(pid, signal.SIGKILL)
                # The server ends the others when it begins to recover; until then it answers.
                for each in (transaction, other):
                    with pytest.raises(OperationalError):
                        each.execute(text("SELECT pg_sleep(60)"))
            while not self.answers(database):
                time.sleep(0.02)
            database.close()

        return new_boot if kind == "file" else kill_a_server_process

    def answers(self, database):
        try:
            database.ping()
        except ServiceUnavailable:
            return False
        return True

    def test_nothing_is_accepted_again(self, open_store, soon, crash):
        before = open_store()
        for number in range(3):
            assert before.use("a", str(number), soon - timedelta(minutes=number))
        assert before.use("b", "n", soon - timedelta(minutes=5))
        crash()
        assert rows(open_store()) == []
        for store in (open_store(), open_store()):
            for number in range(3):
                with pytest.raises(ServiceUnavailable, match="sign it again"):
                    store.use("a", str(number), soon - timedelta(minutes=number))
            with pytest.raises(ServiceUnavailable, match="sign it again"):
                store.use("a", "new", soon + 0.99 * STEP)
            with pytest.raises(ServiceUnavailable, match="sign it again"):
                store.use("b", "n", soon - timedelta(minutes=5))

    def test_later_requests_and_other_access_keys_are_served(self, open_store, soon, crash):
        before = open_store()
        assert before.use("a", "n", soon)
        assert before.use("b", "n", soon - timedelta(minutes=5))
        crash()
        one, other = open_store(), open_store()
        assert one.use("a", "n", soon + STEP)
        assert not other.use("a", "n", soon + STEP)
        assert one.use("b", "n2", soon)
        assert other.use("c", "n", soon - timedelta(minutes=20))

    def test_a_second_crash_is_like_the_first(self, open_store, soon, crash, boot):
        assert open_store().use("a", "n", soon)
        crash()
        assert open_store().use("a", "n", soon + STEP)
        if boot.exists():
            boot.write_text("33333333-3333-4333-8333-333333333333\n")
        else:
            crash()
        with pytest.raises(ServiceUnavailable, match="sign it again"):
            open_store().use("a", "n", soon + STEP)

    def test_processes_that_lived_on_know_it_too(self, open_store, soon, crash, kind, tmp_path):
        store = open_store()
        assert store.use("a", "n", soon)
        if kind == "file":  # the only way in which a process loses it
            next(tmp_path.glob("kms.db-nonces-*1")).unlink()
        else:
            crash()
        with pytest.raises(ServiceUnavailable, match="sign it again"):
            store.use("a", "n", soon)
        assert store.use("a", "n", soon + STEP)
        assert not open_store().use("a", "n", soon + STEP)


class TestAfterARestore:
    """A dump of PostgreSQL has the rows of unlogged tables as well."""

    @pytest.fixture
    def kind(self):
        return "PostgreSQL's table"

    @pytest.fixture(params=["elsewhere", "in place"])
    def restored(self, request, postgres_cluster, clock):
        """Restores a dump of this database, and opens a store in what it became."""
        opened = []

        def restores(dump, url):
            if request.param == "elsewhere":
                url = postgres_cluster.new_database()
            postgres_cluster.restore(dump, url)
            database = Database(url, sync=False)
            opened.append(database)
            return url, NonceStore(database, clock)

        yield restores
        for database in opened:
            database.close()

    def test_nothing_from_before_the_bound_is_accepted_again(
        self, postgres_cluster, database_url, open_store, soon, restored
    ):
        url, store = database_url, open_store()
        for number in range(2):  # the second dump has the floors of the first restore
            now = soon + number * 2 * STEP
            assert store.use("a", f"before the dump {number}", now)
            dump = postgres_cluster.dump(url)
            assert store.use("a", f"after it {number}", now + 0.5 * STEP)
            url, store = restored(dump, url)
            assert not store.use("a", f"before the dump {number}", now)
            with pytest.raises(ServiceUnavailable, match="sign it again"):
                store.use("a", f"after it {number}", now + 0.5 * STEP)
            assert store.use("a", f"later {number}", now + STEP)
        assert store.use("b", "n", soon)

    def test_the_identity_of_the_cluster_counts_where_the_user_may_read_it(
        self, database_url, clock
    ):
        """Databases and tables of two clusters may have the same numbers."""
        role = f"kms_{make_url(database_url).database}"
        owner = Database(database_url)

        def begun(user):
            database = Database(database_url.replace("hsmwrap@", f"{user}@"))
            store = NonceStore(database, clock)
            assert store.use(secrets.token_hex(8), "n", clock() + timedelta(minutes=20))
            database.close()
            return store._store.begun

        with owner.write() as transaction:
            transaction.execute(text(f"CREATE ROLE {role} LOGIN"))
            granted = f"SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}"
            transaction.execute(text(f"GRANT {granted}"))
        assert begun(role) == begun("hsmwrap")
        with owner.write() as transaction:
            revoked = "EXECUTE ON FUNCTION pg_control_system() FROM PUBLIC"
            transaction.execute(text(f"REVOKE {revoked}"))
        owner.close()
        assert begun(role) != begun("hsmwrap")


class TestTheFile:
    @pytest.fixture
    def kind(self):
        return "file"

    def test_is_for_this_user_only_and_of_this_boot(self, open_store, soon, boot, tmp_path):
        umask = os.umask(0)
        first = open_store()
        assert first.use("a", "n", soon)
        os.umask(umask)
        ends = ("", "-shm", "-wal")
        files = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.glob("*nonces*")}
        assert files == dict.fromkeys((f"kms.db-nonces-{NAME_1}{end}" for end in ends), 0o600)
        first.close()
        boot.write_text("22222222-2222-4222-8222-222222222222\n")
        assert open_store().use("a", "n", soon + STEP)
        assert not list(tmp_path.glob(f"kms.db-nonces-{NAME_1}*"))

    def test_is_the_same_by_another_path(self, open_store, soon, clock, tmp_path):
        (tmp_path / "link.db").symlink_to("kms.db")
        linked = Database(f"sqlite:///{tmp_path}/link.db", sync=False)
        store = NonceStore(linked, clock)
        assert open_store().use("a", "n", soon)
        assert not store.use("a", "n", soon)
        store.close()
        linked.close()

    def test_that_fails_lets_nothing_through(self, open_store, soon, tmp_path):
        store = open_store()
        assert store.use("a", "n", soon)
        for path in tmp_path.glob("*nonces*"):
            path.unlink()
        next_file = tmp_path / f"kms.db-nonces-{NAME_1}"
        next_file.mkdir()
        with pytest.raises(ServiceUnavailable, match="store of used nonces is unavailable"):
            store.use("a", "n", soon + STEP)
        next_file.rmdir()
        assert store.use("a", "n", soon + STEP)

    def test_that_another_holds_is_waited_for(self, open_store, soon, tmp_path, monkeypatch):
        monkeypatch.setattr(database_module, "BUSY_SECONDS", 0.05)
        store = open_store()
        assert store.use("a", "n", soon)
        other = sqlite3.connect(tmp_path / f"kms.db-nonces-{NAME_1}", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(ServiceUnavailable, match="store of used nonces is unavailable"):
            store.use("a", "n2", soon)
        other.execute("COMMIT")
        other.close()
        assert store.use("a", "n2", soon)
