"""The audit log: one chained line per operation, and the problems that verify finds."""

import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import re
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import text
from support.kms.fakes import AES_MATERIAL, Client

from hsmwrap import chain
from hsmwrap.chain import Link
from hsmwrap.cli import audit as audit_command
from hsmwrap.errors import HsmwrapError, ServiceUnavailable
from hsmwrap.kms import Caller, Permissions, anchors, audit
from hsmwrap.kms.audit import (
    START,
    AuditEntry,
    AuditFailed,
    AuditLocked,
    AuditLog,
    Segment,
    verify,
)
from hsmwrap.kms.database import Database
from hsmwrap.kms.schema import AuditAnchor

KEY = bytes(range(32))
NOW = datetime(2030, 1, 1, tzinfo=UTC)
A_LINE = Link(1, "x")


def entry(number):
    return AuditEntry(f"r{number}", "caller", "Encrypt", "k", "ok")


@pytest.fixture(params=[None, KEY], ids=["sha256", "hmac"])
def key(request):
    return request.param


@pytest.fixture
def log(tmp_path, key):
    log = AuditLog(tmp_path / "a.log", lambda: NOW, key)
    for number in range(6):
        log.append(entry(number))
    return log


def rewrite(log, change):
    lines = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(b"".join(change(lines)))


def lines_at_fault(report):
    return [problem.line for problem in report.problems]


def test_whole_log(log, key):
    report = verify(log.path, key, (log.head(),))
    assert (report.ok, report.lines, report.problems) == (True, 6, ())
    assert report.head == log.head()
    assert report.head.sequence == 6
    assert log.path.stat().st_mode & 0o777 == 0o600
    first = json.loads(log.path.read_text().splitlines()[0])
    digest = first.pop("digest")
    assert first == {
        "sequence": 1,
        "time": "2030-01-01T00:00:00.000+00:00",
        "request_id": "r0",
        "access_key_id": "caller",
        "action": "Encrypt",
        "key_id": "k",
        "outcome": "ok",
    }
    assert len(digest) == 64


@pytest.mark.parametrize("at", range(6))
def test_changed_line(log, key, at):
    def change(lines):
        lines[at] = lines[at].replace(b'"ok"', b'"no"')
        return lines

    rewrite(log, change)
    assert lines_at_fault(verify(log.path, key)) == [at + 1]


@pytest.mark.parametrize("at", range(5))
def test_removed_line(log, key, at):
    rewrite(log, lambda lines: lines[:at] + lines[at + 1 :])
    report = verify(log.path, key)
    assert set(lines_at_fault(report)) == {at + 1}
    assert len(report.problems) == 2


@pytest.mark.parametrize("at", range(5))
def test_reordered_lines(log, key, at):
    rewrite(log, lambda lines: [*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]])
    assert at + 1 in lines_at_fault(verify(log.path, key))


def test_repeated_line(log, key):
    rewrite(log, lambda lines: [*lines, lines[-1]])
    assert set(lines_at_fault(verify(log.path, key))) == {7}


def test_inserted_line(log, key):
    rewrite(log, lambda lines: [*lines[:3], b"{}\n", *lines[3:]])
    assert lines_at_fault(verify(log.path, key)) == [4]


@pytest.mark.parametrize(
    "other_form", [b'{"sequence": 1}\n', b"x\n", b"[]\n", b'{"digest":1,"sequence":1}\n', b"\xff\n"]
)
def test_line_of_another_form(log, key, other_form):
    rewrite(log, lambda lines: [other_form, *lines[1:]])
    assert lines_at_fault(verify(log.path, key))[0] == 1


DEEP = b"[" * 100_000 + b"]" * 100_000
HOSTILE = {
    "deep": DEEP + b"\n",
    "endless": b"x" * 1_000_000 + b"\n",
    "endless, no line end": b"x" * 1_000_000,
    "digest that is not hex": b'{"sequence":7,"digest":"\\u00e9"}\n',
    "number beyond the database": b'{"sequence":%d,"digest":"%s"}\n' % (2**70, b"0" * 64),
    "negative number": b'{"sequence":-1,"digest":"%s"}\n' % (b"0" * 64),
    "true as a number": b'{"sequence":true,"digest":"%s"}\n' % (b"0" * 64),
    "surrogates": b'{"sequence":"\\ud800","digest":"\\ud800"}\n',
    "NaN": b'{"sequence":NaN,"digest":"%s"}\n' % (b"0" * 64),
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("at", [0, 3, 6])
def test_hostile_line_is_a_finding(log, key, hostile, at):
    rewrite(log, lambda lines: [*lines[:at], hostile, *lines[at:]])
    report = verify(log.path, key)
    assert str(report.problems[0]) == f"line {at + 1}: is not a line of an audit log"
    if hostile.endswith(b"\n"):
        assert (report.lines, len(report.problems)) == (7, 1)


def test_an_endless_line_is_read_in_bounded_pieces():
    pieces = list(
        chain.lines(
            io.BytesIO(b"a\n" + b"x" * 1_000_000 + b"\nb\n" + b"y" * 100_000), audit._MAX_LINE
        )
    )
    assert [piece[:2] for piece in pieces] == [b"a\n", b"xx", b"b\n", b"yy"]
    assert max(map(len, pieces)) <= audit._MAX_LINE


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_no_line_is_chained_to_a_hostile_one(log, hostile):
    log.path.write_bytes(log.path.read_bytes() + hostile)
    before = log.path.read_bytes()
    with pytest.raises(AuditFailed):
        log.append(entry(7))
    assert log.path.read_bytes() == before


def test_end_cut_off_shows_only_by_an_anchor(log, key):
    anchor = log.head()
    rewrite(log, lambda lines: lines[:4])
    assert verify(log.path, key).ok
    report = verify(log.path, key, (anchor,))
    assert [str(problem) for problem in report.problems] == [
        "line 4: the log ends without line 6, which it had"
    ]


def test_new_chain_shows_by_an_anchor(log, key):
    anchor = log.head()
    log.path.unlink()
    for number in range(9):
        log.append(entry(number + 100))
    assert verify(log.path, key).ok
    assert not verify(log.path, key, (anchor,)).ok


def test_new_chain_cannot_be_made_without_the_key(log):
    forged = AuditLog(log.path.with_suffix(".forged"), lambda: NOW, bytes(32))
    forged.append(entry(0))
    assert not verify(forged.path, KEY).ok
    assert not verify(forged.path).ok


def test_empty_log(tmp_path, key):
    (tmp_path / "e.log").touch()
    assert verify(tmp_path / "e.log", key).ok
    head = AuditLog(tmp_path / "e.log", lambda: NOW, key).head()
    assert verify(tmp_path / "e.log", key, (head,)).ok
    assert not verify(tmp_path / "e.log", key, (Link(1, "x"),)).ok


INCOMPLETE = {
    "most of a line": b'{"sequence":7,"ti',
    "a few bytes": b'{"seq',
    "one byte": b"{",
    "zeros": bytes(100_000),
    "a line and zeros": b'{"sequence":7,"ti' + bytes(100_000),
}


@pytest.mark.parametrize("partial", INCOMPLETE.values(), ids=INCOMPLETE)
def test_incomplete_last_line_is_cut_off(log, key, caplog, partial):
    log.path.write_bytes(log.path.read_bytes() + partial)
    log.append(entry(7))
    assert verify(log.path, key).ok
    assert verify(log.path, key).lines == 7
    assert "incomplete" in caplog.text


@pytest.mark.parametrize("partial", INCOMPLETE.values(), ids=INCOMPLETE)
def test_incomplete_first_line_is_cut_off(tmp_path, key, caplog, partial):
    log = AuditLog(tmp_path / "new.log", lambda: NOW, key)
    log.path.write_bytes(partial)
    log.append(entry(1))
    assert verify(log.path, key).ok
    assert verify(log.path, key).lines == 1
    (record,) = caplog.records
    assert "incomplete last line cut off" in record.getMessage()
    assert (record.bytes, record.after_line) == (len(partial), 0)


def test_line_written_in_part_is_taken_back(log, key, monkeypatch):
    before, write = log.path.read_bytes(), os.write
    monkeypatch.setattr(audit.os, "write", lambda file, line: write(file, line[:9]))
    with pytest.raises(AuditFailed, match="in part"):
        log.append(entry(7))
    monkeypatch.undo()
    assert log.path.read_bytes() == before
    log.append(entry(7))
    assert verify(log.path, key).ok


def test_lock_does_not_stay_with_a_child_forked_meanwhile(log):
    context = multiprocessing.get_context("fork")
    over = context.Event()
    child = context.Process(target=over.wait)
    with warnings.catch_warnings():
        # From Python 3.12 on forking beside threads warns.
        warnings.simplefilter("ignore", DeprecationWarning)
        with log._locked():
            child.start()
    try:
        with log.path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        over.set()
        child.join()


FOREIGN = [
    b"root:x:0:0\n",
    b"something else",
    b"something else\n{",
    b"binary" + bytes(100_000),
    b"x" * 100_000,
    b'{"sequence":' + b"x" * 100_000,
    b"something else" + chain.BEGIN + b"x" * (audit._MAX_LINE - len(chain.BEGIN)),
]


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda foreign: foreign[:20].decode())
def test_another_file_is_not_touched(tmp_path, key, foreign):
    path = tmp_path / "other"
    path.write_bytes(foreign)
    with pytest.raises(AuditFailed):
        AuditLog(path, lambda: NOW, key).append(entry(0))
    assert path.read_bytes() == foreign


def test_longest_lines(tmp_path, key):
    log = AuditLog(tmp_path / "long.log", lambda: NOW, key, sync=True)
    for _ in range(3):
        log.append(AuditEntry(*["\U0001f511" * 1000] * 5))
    assert verify(log.path, key).ok


def _append(path, name):
    log = AuditLog(path, lambda: NOW)
    for number in range(50):
        log.append(AuditEntry(f"{name}-{number}", name, "Encrypt", None, "ok"))


@pytest.mark.slow
def test_processes_and_threads_append_to_one_file(tmp_path):
    path = tmp_path / "shared.log"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_append, args=(path, f"p{i}")) for i in range(2)]
    workers += [threading.Thread(target=_append, args=(path, f"t{i}")) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    report = verify(path)
    assert (report.ok, report.lines) == (True, 250)


def test_appending_is_one_at_a_time(tmp_path, monkeypatch):
    line = audit._line

    def slow(*arguments):
        time.sleep(0.001)
        return line(*arguments)

    # Other processes may run between reading the last line and writing the next.
    monkeypatch.setattr(audit, "_line", slow)
    path = tmp_path / "shared.log"
    threads = [threading.Thread(target=_append, args=(path, f"t{i}")) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verify(path).ok


def test_each_operation_leaves_a_line_without_secrets(open_kms, clock, tmp_path):
    kms = open_kms()
    client = Client(kms)
    key_id = client.create(Description="do-not-log-me")
    parameters = client.parameters(key_id)
    client.import_material(
        key_id, AES_MATERIAL, parameters, KeyMaterialExpireUnix=clock.unix(days=1)
    )
    blob = client.usable(key_id)
    unprivileged = Client(kms, Caller("unprivileged", Permissions()))
    for call in (
        lambda: unprivileged.state(key_id),
        lambda: client("Nothing"),
        lambda: client("DescribeKey", Colour="red"),
        lambda: client.state("unknown"),
    ):
        with pytest.raises(HsmwrapError):
            call()
    kms.record_refusal("Encrypt", "stranger", "r-1", "SignatureDoesNotMatch")
    client("ScheduleKeyDeletion", KeyId=key_id, PendingWindowInDays="7")
    clock.advance(days=7)
    kms.sweep()
    text = (tmp_path / "audit.log").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [(e["access_key_id"], e["action"], e["key_id"], e["outcome"]) for e in lines] == [
        ("admin", "CreateKey", key_id, "ok"),
        ("admin", "GetParametersForImport", key_id, "ok"),
        ("admin", "ImportKeyMaterial", key_id, "ok"),
        ("admin", "Encrypt", key_id, "ok"),
        ("admin", "Decrypt", key_id, "ok"),
        ("unprivileged", "DescribeKey", key_id, "Forbidden.NoPermission"),
        ("admin", "Nothing", None, "InvalidAction.NotFound"),
        ("admin", "DescribeKey", None, "InvalidParameter"),
        ("admin", "DescribeKey", "unknown", "Forbidden.KeyNotFound"),
        ("stranger", "Encrypt", None, "SignatureDoesNotMatch"),
        ("admin", "ScheduleKeyDeletion", key_id, "ok"),
        ("system", "ExpireKeyMaterial", key_id, "ok"),
        ("system", "DeleteKey", key_id, "ok"),
    ]
    assert lines[0]["request_id"] == "admin-1"
    for secret in ("do-not-log-me", parameters["ImportToken"], blob, "aGVsbG8"):
        assert secret not in text
    assert verify(tmp_path / "audit.log").ok


def test_unforeseen_failure_is_audited_and_passed_on(client, tmp_path):
    def fails(*_arguments, **_more):
        raise ZeroDivisionError

    client.kms._backends["HSM"].generate_wrapping_key = fails
    key_id = client.create()
    with pytest.raises(ZeroDivisionError):
        client.parameters(key_id)
    assert json.loads((tmp_path / "audit.log").read_text().splitlines()[-1])["outcome"] == (
        "InternalFailure"
    )


@pytest.fixture
def broken_log(tmp_path):
    """A function that makes the KMS's audit log unwritable."""

    def break_it():
        (tmp_path / "audit.log").unlink(missing_ok=True)
        (tmp_path / "audit.log").mkdir()

    return break_it


def test_nothing_is_done_without_an_audit_log(client, broken_log):
    key_id = client.create()
    broken_log()
    for call in (
        client.create,
        lambda: client("ListKeys"),
        lambda: client("Nothing"),
        lambda: client("ScheduleKeyDeletion", KeyId=key_id, PendingWindowInDays="7"),
    ):
        with pytest.raises(AuditFailed):
            call()
    lifecycle = client.kms.operations.lifecycle
    assert lifecycle.list_keys(1, 10).total == 1
    assert lifecycle.describe_key(key_id).state == "PendingImport"


def test_health_says_that_the_audit_log_is_broken(client, broken_log):
    assert client.kms.health().facts["audit log"] == "ready"
    broken_log()
    health = client.kms.health()
    assert not health.ready
    assert "audit.log" in health.facts["audit log"]


class TestAnchors:
    """The database stores the last line, and moves to a later one only if that line exists."""

    @pytest.fixture
    def database(self, database_url):
        database = Database(database_url, sync=False)
        database.migrate()
        yield database
        database.close()

    def test_follows_the_log(self, database, log):
        assert anchors.remembered(database, log) == ()
        for number in range(3):
            anchors.remember(database, log)
            assert anchors.remembered(database, log) == (log.head(),)
            log.append(entry(number))
        (anchor,) = anchors.remembered(database, log)
        assert (anchor.sequence, verify(log.path, log.key, (anchor,)).ok) == (8, True)
        assert log.path.read_bytes()[anchor.position :].startswith(b'{"sequence":8,')

    def test_begins_with_an_empty_log(self, database, tmp_path):
        log = AuditLog(tmp_path / "new.log", lambda: NOW)
        anchors.remember(database, log)
        assert anchors.remembered(database, log) == (START,)
        log.append(entry(1))
        anchors.remember(database, log)
        assert anchors.remembered(database, log) == (log.head(),)

    @pytest.mark.parametrize("appended", [0, 1, 2, 9])
    def test_lines_cut_off_stay_missing_however_the_log_grows(
        self, database, log, caplog, appended
    ):
        anchors.remember(database, log)
        before = anchors.remembered(database, log)
        rewrite(log, lambda lines: lines[:4])
        for number in range(appended):
            log.append(entry(number + 100))
            anchors.remember(database, log)
        anchors.remember(database, log)
        assert anchors.remembered(database, log) == before
        assert not verify(log.path, log.key, before).ok
        assert "a line of the audit log is missing" in caplog.text

    def test_another_line_of_the_same_number_is_another(self, database, log, caplog):
        anchors.remember(database, log)
        before = anchors.remembered(database, log)
        rewrite(log, lambda lines: lines[:5])
        log.append(entry(100))
        assert log.head().sequence == before[0].sequence
        anchors.remember(database, log)
        assert anchors.remembered(database, log) == before
        assert "a line of the audit log is missing" in caplog.text

    def test_reads_no_more_than_what_is_new(self, database, log, monkeypatch):
        anchors.remember(database, log)
        for number in range(3):
            log.append(entry(number))
        read = []
        parse = chain.read
        monkeypatch.setattr(chain, "read", lambda line: read.append(line) or parse(line))
        anchors.remember(database, log)
        # The head, and the stored line.
        assert [parse(line)[0].sequence for line in read] == [9, 6]

    def test_anchor_of_an_older_release_is_looked_for_from_the_beginning(self, database, log):
        anchors.remember(database, log)
        with database.write() as transaction:
            transaction.execute(text("UPDATE audit_anchors SET position = 0"))
        log.append(entry(7))
        anchors.remember(database, log)
        assert anchors.remembered(database, log) == (log.head(),)

    @pytest.fixture
    def overtaken(self, database, log):
        """Move the anchor while another process is about to commit; it calls ``first`` before."""

        def run(first):
            thread = ThreadPoolExecutor(1)
            with database.write() as transaction:
                transaction.execute(text("UPDATE used_once SET expires_at = 0"))
                first(transaction)
                later = thread.submit(anchors.remember, database, log)
                time.sleep(0.5)
                log.append(entry(7))
                head = log.head()
                moved = text("UPDATE audit_anchors SET sequence = :s, digest = :d, position = :p")
                values = {"s": head.sequence, "d": head.digest, "p": head.position}
                transaction.execute(moved, values)
            later.result(10)
            thread.shutdown()

        return run

    def test_first_boot_of_two_processes(self, database, log, overtaken):
        def insert(transaction):
            transaction.add(
                AuditAnchor(log=anchors.log_id(log), sequence=0, digest="", position=0, set_at=NOW)
            )
            transaction.flush()

        overtaken(insert)
        assert anchors.remembered(database, log) == (log.head(),)

    def test_process_that_was_overtaken_raises_no_alarm(self, database, log, overtaken, caplog):
        anchors.remember(database, log)
        lock = text("UPDATE audit_anchors SET sequence = sequence")
        overtaken(lambda transaction: transaction.execute(lock))
        assert anchors.remembered(database, log) == (log.head(),)
        assert "is missing" not in caplog.text

    def test_time_is_that_of_the_last_look(self, database, log):
        anchors.remember(database, log)
        later = replace(log, clock=lambda: NOW + timedelta(hours=1))
        anchors.remember(database, later)
        (anchor,) = anchors.remembered(database, log)
        assert anchor.set_at == NOW + timedelta(hours=1)
        report = verify(log.path, log.key, (anchor,))
        assert (report.anchor.set_at, report.behind) == (anchor.set_at, 0)

    def test_log_id_outlives_the_name_of_the_host(self, database, log, monkeypatch):
        named = replace(log, log_id="main")
        for remembering in (log, named):
            anchors.remember(database, remembering)
        monkeypatch.setattr(anchors.socket, "gethostname", lambda: "another")
        assert anchors.remembered(database, log) == ()
        assert anchors.remembered(database, named) == (log.head(),)


def test_sweeps_remember_the_end(open_kms, tmp_path, caplog):
    kms = open_kms()
    client = Client(kms)
    for _ in range(4):
        client("ListKeys")
    kms.sweep()
    (anchor,) = anchors.remembered(kms._database, kms._audit.log)
    assert anchor == kms._audit.log.head()
    rewrite(kms._audit.log, lambda lines: lines[:2])
    kms.sweep()
    assert "a line of the audit log is missing" in caplog.text
    assert anchors.remembered(kms._database, kms._audit.log) == (anchor,)
    assert not verify(tmp_path / "audit.log", None, (anchor,)).ok


def test_the_first_line_is_anchored_at_once_and_then_one_in_so_many(open_kms, clock):
    kms = open_kms(anchor_lines=4)
    anchored = []
    for _ in range(10):
        Client(kms)("ListKeys")
        anchored += [anchors.remembered(kms._database, kms._audit.log)[0].sequence]
    assert anchored == [1, 1, 1, 1, 5, 5, 5, 5, 9, 9]


def test_each_line_is_anchored_before_its_answer(open_kms):
    kms = open_kms(anchor_lines=1)
    for number in range(1, 4):
        Client(kms)("ListKeys")
        assert anchors.remembered(kms._database, kms._audit.log)[0].sequence == number


def test_the_end_is_anchored_when_the_kms_closes(open_kms):
    kms = open_kms()
    for _ in range(5):
        Client(kms)("ListKeys")
    kms.close()
    assert anchors.remembered(kms._database, kms._audit.log)[0].sequence == 5
    kms.close()


def test_a_kms_closes_without_its_database_or_log(open_kms, broken_log, caplog):
    kms = open_kms()
    Client(kms)("ListKeys")
    broken_log()
    kms.close()
    assert "the end of the audit log could not be anchored" in caplog.text


def test_a_request_is_answered_though_its_line_cannot_be_anchored(open_kms, monkeypatch, caplog):
    kms = open_kms(anchor_lines=1)

    def unavailable(*_):
        raise ServiceUnavailable("no database")

    monkeypatch.setattr(anchors, "remember", unavailable)
    assert Client(kms)("ListKeys")["TotalCount"] == 0
    assert "could not be anchored" in caplog.text


def test_a_cut_is_noticed_by_the_next_request(open_kms, caplog):
    kms = open_kms(anchor_lines=4)
    for _ in range(5):
        Client(kms)("ListKeys")
    rewrite(kms._audit.log, lambda lines: lines[:3])
    assert kms.gauges()["audit_log_whole"]
    Client(kms)("ListKeys")
    assert "a line of the audit log is missing" in caplog.text
    (anchor,) = anchors.remembered(kms._database, kms._audit.log)
    assert anchor.sequence == 5
    assert not verify(kms._audit.log.path, None, (anchor,)).ok
    assert "a line is missing" in kms.health().facts["audit log"]
    assert not kms.gauges()["audit_log_whole"]
    anchors.begin_segment(kms._database, kms._audit.log)
    kms.sweep()
    assert kms.health().facts["audit log"] == "ready"
    assert kms.gauges()["audit_log_whole"]


class TestSegments:
    """A damaged log is ended by a command; the next segment names it."""

    def test_names_the_damaged_one_and_keeps_it(self, log, key):
        rewrite(log, lambda lines: [*lines, DEEP + b"\n", b"x\n"])
        damaged = log.path.read_bytes()
        with pytest.raises(AuditFailed, match="new-segment"):
            log.append(entry(7))
        first, segment = log.begin_segment()
        assert log.head() == first
        old = log.path.with_name("a.log.1")
        assert old.read_bytes() == damaged
        finding = "line 7: is not a line of an audit log, and 1 more problems"
        assert segment == Segment("a.log.1", hashlib.sha256(damaged).hexdigest(), 8, finding)
        assert json.loads(log.path.read_text())["before"] == asdict(segment)
        log.append(entry(8))
        report = verify(log.path, key, (first,))
        assert (report.ok, report.lines, report.before) == (True, 2, segment)
        assert (log.path.stat().st_mode & 0o777, log.path.stat().st_nlink) == (0o600, 1)
        assert {path.name for path in log.path.parent.iterdir()} == {"a.log", "a.log.1"}

    def test_of_a_whole_log(self, log, key):
        segment = log.begin_segment()[1]
        assert (segment.lines, segment.finding) == (6, "")
        assert verify(log.path.with_name(segment.file), key).ok
        assert verify(log.path, key).ok

    def test_a_cut_end_is_a_finding(self, log):
        anchor = log.head()
        rewrite(log, lambda lines: lines[:2])
        finding = log.begin_segment((anchor,))[1].finding
        assert finding == "line 2: the log ends without line 6, which it had"

    @pytest.mark.parametrize("file", ["a.log.1", "a.log.2"])
    @pytest.mark.parametrize(
        "change", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])]
    )
    def test_a_change_of_an_ended_segment_is_found(self, log, key, file, change):
        log.begin_segment()
        log.append(entry(1))
        log.begin_segment()
        assert verify(log.path, key).ok
        change(log.path.with_name(file))
        assert [str(problem) for problem in verify(log.path, key).problems] == [
            f"line 1: the ended segment {file} is missing or was changed"
        ]

    def test_what_the_first_line_says_is_chained(self, log, key):
        rewrite(log, lambda lines: [*lines, b"x\n"])
        log.begin_segment()
        rewrite(log, lambda lines: [lines[0].replace(b"is not a line", b"is well")])
        assert lines_at_fault(verify(log.path, key)) == [1]

    @pytest.mark.parametrize(
        "before",
        [
            1,
            {},
            {"file": 1, "sha256": "0", "lines": 1, "finding": ""},
            {"file": "../a.log", "sha256": "0", "lines": 1, "finding": ""},
            {"file": "\0\ud800", "sha256": "0", "lines": 1, "finding": ""},
            {"file": "", "sha256": "0", "lines": 1, "finding": ""},
        ],
    )
    def test_hostile_names(self, log, key, before):
        line = audit._line(entry(1), NOW, START, bytes(32), before=before)
        log.path.write_bytes(line)
        assert set(lines_at_fault(verify(log.path, key))) == {1}

    def test_processes_that_wait_go_on_with_the_new_segment(self, log, key):
        with ThreadPoolExecutor(1) as thread:
            with log._locked():
                waiting = thread.submit(log.append, entry(1))
                time.sleep(0.1)
                # As begin_segment does, under this lock.
                old = log.path.with_name("a.log.1")
                old.hardlink_to(log.path)
                new = log.path.with_name("new")
                new.touch()
                new.rename(log.path)
            assert waiting.result(5) == 1
        assert (verify(log.path, key).lines, verify(old, key).lines) == (1, 6)

    def test_under_load_no_line_is_lost(self, tmp_path):
        path = tmp_path / "shared.log"
        threads = [threading.Thread(target=_append, args=(path, f"t{i}")) for i in range(3)]
        for thread in threads:
            thread.start()
        log = AuditLog(path, lambda: NOW)
        for _ in range(3):
            log.begin_segment()
        for thread in threads:
            thread.join()
        files = [path, *(tmp_path / f"shared.log.{number}" for number in (1, 2, 3))]
        reports = [verify(file) for file in files]
        assert all(report.ok for report in reports)
        assert sum(report.lines for report in reports) == 150 + 3

    def test_after_a_command_that_was_killed(self, log, key):
        log.path.with_name("a.log.1").hardlink_to(log.path)
        log.path.with_name(".a.log.new").write_bytes(b"part")
        assert log.begin_segment()[1].file == "a.log.2"
        assert verify(log.path, key).ok

    def test_a_link_stays_a_link(self, log, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        link = tmp_path / "elsewhere" / "link.log"
        link.symlink_to(log.path)
        replace(log, path=link).begin_segment()
        assert link.is_symlink()
        assert log.path.with_name("a.log.1").exists()

    @pytest.mark.parametrize("kind", [os.mkfifo, lambda path: path.symlink_to("/dev/null")])
    def test_what_is_not_a_regular_file_is_refused(self, tmp_path, kind):
        kind(tmp_path / "a.log")
        with pytest.raises(AuditFailed, match="not a regular file"):
            AuditLog(tmp_path / "a.log", lambda: NOW).append(entry(1))

    def test_the_kms_goes_on_without_a_restart(self, open_kms, caplog):
        kms = open_kms(anchor_lines=4)
        client = Client(kms)
        for _ in range(6):
            client("ListKeys")
        log = kms._audit.log
        rewrite(log, lambda lines: [*lines[:3], DEEP + b"\n"])
        with pytest.raises(AuditFailed):
            client("ListKeys")
        assert "new-segment" in kms.health().facts["audit log"]
        segment = anchors.begin_segment(kms._database, log)
        assert segment.finding.startswith("line 4: is not a line of an audit log")
        assert kms.health().ready
        caplog.clear()
        for _ in range(6):
            client("ListKeys")
        kms.sweep()
        (anchor,) = anchors.remembered(kms._database, log)
        report = verify(log.path, None, (anchor,))
        assert (report.ok, report.lines, report.behind) == (True, 7, 0)
        assert not caplog.records


class TestCommand:
    def run(self, capsys, *arguments, action="verify"):
        import argparse

        parser = argparse.ArgumentParser()
        audit_command.add_parser(parser.add_subparsers())
        args = parser.parse_args(["audit", action, *map(str, arguments)])
        return args.run(args), capsys.readouterr().out

    def test_new_segment(self, open_kms, config, tmp_path, capsys):
        kms = open_kms()
        Client(kms)("ListKeys")
        rewrite(kms._audit.log, lambda lines: [*lines, b"x\n"])
        assert self.run(capsys, "--config", config)[0] == 1
        code, out = self.run(capsys, "--config", config, action="new-segment")
        before = "audit.log.1, 2 lines, line 2: is not a line of an audit log"
        assert (code, out) == (0, f"{tmp_path}/audit.log: new segment; before it {before}\n")
        code, out = self.run(capsys, "--config", config)
        assert (code, f"audit.log: began after {before}\n" in out) == (0, True)
        assert "1 lines, complete; anchored at line 1" in out
        code, out = self.run(capsys, "--config", config, "--json")
        assert json.loads(out)["before"]["file"] == "audit.log.1"
        (tmp_path / "audit.log.1").unlink()
        code, out = self.run(capsys, "--config", config)
        assert (code, "audit.log.1 is missing or was changed" in out) == (1, True)

    def test_file(self, log, key, tmp_path, capsys):
        key_file = tmp_path / "audit.key"
        key_file.write_bytes(key or b"")
        key_file.chmod(0o600)
        arguments = ["--file", log.path, *(["--key-file", key_file] if key else [])]
        code, out = self.run(capsys, *arguments)
        assert (code, "6 lines, complete; only --config can check" in out) == (0, True)
        rewrite(log, lambda lines: lines[1:])
        code, out = self.run(capsys, *arguments, "--json")
        found = json.loads(out)
        assert (code, found["ok"], found["lines"]) == (1, False, 5)
        assert found["problems"][0]["line"] == 1

    @pytest.fixture
    def config(self, database_url, tmp_path):
        config = tmp_path / "server.toml"
        config.write_text(
            f'database_url = "{database_url}"\naudit_file = "{tmp_path}/audit.log"\n'
            '[backends.HSM]\nplugin = "software"\n'
        )
        return config

    def test_config(self, open_kms, config, tmp_path, capsys):
        kms = open_kms(clock=lambda: datetime.now(UTC))
        Client(kms)("ListKeys")
        Client(kms)("ListKeys")
        kms.sweep()
        code, out = self.run(capsys, "--config", config)
        end = "; anchored at line 2 (0 seconds ago), 0 lines after it\n"
        assert (code, out) == (0, f"{tmp_path}/audit.log: 2 lines, complete{end}")
        rewrite(kms._audit.log, lambda lines: lines[:1])
        code, out = self.run(capsys, "--config", config)
        assert code == 1
        assert "ends without line 2" in out

    def test_no_anchor_is_no_proof(self, open_kms, config, capsys, monkeypatch):
        kms = open_kms()
        Client(kms)("ListKeys")
        kms.sweep()
        monkeypatch.setattr(anchors.socket, "gethostname", lambda: "another")
        code, out = self.run(capsys, "--config", config)
        assert (code, "stores no line of a log with the id 'another:" in out) == (1, True)
        assert "set audit_log_id" in out
        code, out = self.run(capsys, "--config", config, "--json")
        assert (code, json.loads(out)["ok"], json.loads(out)["anchored"]) == (1, False, False)
        assert self.run(capsys, "--config", config, "--without-anchor")[0] == 0
        monkeypatch.setenv("HSMWRAP_SERVER_AUDIT_LOG_ID", "main")
        assert self.run(capsys, "--config", config)[0] == 1
        anchors.remember(kms._database, replace(kms._audit.log, log_id="main"))
        assert self.run(capsys, "--config", config)[0] == 0

    def test_an_emptied_log_is_not_whole(self, open_kms, config, capsys):
        kms = open_kms()
        for _ in range(3):
            Client(kms)("ListKeys")
        rewrite(kms._audit.log, lambda lines: [])
        code, out = self.run(capsys, "--config", config, "--without-anchor")
        assert (code, "the log ends without line 1, which it had" in out) == (1, True)

    def test_the_start_of_the_chain_is_no_anchor(self, open_kms, config, capsys):
        """A log and its anchor before the first line: an emptied log looks the same."""
        kms = open_kms()
        kms.sweep()
        assert anchors.remembered(kms._database, kms._audit.log) == (START,)
        code, out = self.run(capsys, "--config", config)
        assert (code, "cannot check that the end was not cut off" in out) == (1, True)
        code, out = self.run(capsys, "--config", config, "--json")
        assert json.loads(out) == {
            "ok": False,
            "anchored": False,
            "anchor": None,
            "behind": 0,
            "before": None,
            "lines": 0,
            "problems": [],
        }
        assert self.run(capsys, "--config", config, "--without-anchor")[0] == 0

    def test_lines_behind_the_anchor_are_counted_and_its_age_is_said(
        self, open_kms, config, capsys
    ):
        kms = open_kms(clock=lambda: datetime.now(UTC) - timedelta(seconds=100))
        for _ in range(4):
            Client(kms)("ListKeys")
        code, out = self.run(capsys, "--config", config, "--json")
        found = json.loads(out)
        assert (code, found["ok"], found["anchored"], found["behind"]) == (0, True, True, 3)
        assert found["anchor"]["line"] == 1
        assert 100 <= found["anchor"]["age_seconds"] < 130
        out = self.run(capsys, "--config", config)[1]
        assert re.search(
            r"4 lines, complete; anchored at line 1 \(1\d\d seconds ago\), 3 lines", out
        )


@pytest.mark.slow
class TestLockHeldByOthers:
    @pytest.fixture
    def held(self, tmp_path):
        """Another opening of the file, as another process has it, holds its lock."""
        with (tmp_path / "audit.log").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def test_a_call_ends_by_its_deadline(self, tmp_path, held):
        log = AuditLog(tmp_path / "audit.log", lambda: NOW, lock_seconds=0.2)
        for call in (log.check, log.head, lambda: log.append(entry(1)), lambda: log.holds(A_LINE)):
            started = time.monotonic()
            with pytest.raises(AuditLocked, match="fuser") as raised:
                call()
            assert 0.2 <= time.monotonic() - started < 5
            assert (raised.value.code, raised.value.http_status) == (
                "ServiceUnavailableTemporary",
                503,
            )
        assert (tmp_path / "audit.log").read_bytes() == b""

    def test_the_lock_is_taken_once_it_is_free(self, tmp_path):
        log = AuditLog(tmp_path / "audit.log", lambda: NOW)
        with ThreadPoolExecutor(1) as thread:
            with log._locked():
                waiting = thread.submit(log.append, entry(1))
                time.sleep(0.1)
                assert not waiting.done()
            waiting.result(5)
        assert verify(log.path).lines == 1

    def test_requests_are_refused_and_health_says_so_soon(self, kms, held):
        kms._audit.log = replace(kms._audit.log, lock_seconds=0.2)
        with pytest.raises(AuditLocked):
            Client(kms)("ListKeys")
        started = time.monotonic()
        health = kms.health()
        assert not health.ready
        assert "fuser" in health.facts["audit log"]
        assert time.monotonic() - started < 5  # the deadline of /readyz
