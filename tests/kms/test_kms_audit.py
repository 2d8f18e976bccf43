"""The audit log: one chained line per operation, and the problems that verify finds."""

import fcntl
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import text
from support.kms.fakes import AES_MATERIAL, Client

from hsmwrap import chain
from hsmwrap.chain import Link
from hsmwrap.cli import audit as audit_command
from hsmwrap.errors import ConfigurationError, HsmwrapError, ServiceUnavailable
from hsmwrap.kms import Caller, Permissions, anchors, audit
from hsmwrap.kms.audit import (
    START,
    AuditEntry,
    AuditFailed,
    AuditLocked,
    AuditLog,
)
from hsmwrap.kms.auditfiles import AuditProblem, damaged_files, export, verify
from hsmwrap.kms.database import Database
from hsmwrap.kms.schema import AuditAnchor

KEY = bytes(range(32))
NOW = datetime(2030, 1, 1, tzinfo=UTC)
A_LINE = Link(1, "x")
CHANGED = "does not chain to the line before: a line was changed, removed or reordered"


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


def until(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


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
        "client": None,
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
            io.BytesIO(b"a\n" + b"x" * 1_000_000 + b"\nb\n" + b"y" * 100_000), audit.MAX_LINE
        )
    )
    assert [piece[:2] for piece in pieces] == [b"a\n", b"xx", b"b\n", b"yy"]
    assert max(map(len, pieces)) <= audit.MAX_LINE


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


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(
    ("key", "other", "said"),
    [(KEY, None, "no key"), (None, KEY, "this key"), (KEY, bytes(32), "this key")],
)
def test_a_process_with_another_key_writes_nothing(log, other, said, rotated):
    if rotated:
        log.rotate()
    before = log.path.read_bytes()
    stranger = AuditLog(log.path, lambda: NOW, other)
    message = f"does not chain with {said}: set audit_key_file to the key of this log"
    for write in (stranger.head, stranger.check, stranger.rotate):
        with pytest.raises(AuditFailed, match=message):
            write()
    with pytest.raises(AuditFailed, match=message):
        stranger.append(entry(6))
    assert log.path.read_bytes() == before
    assert AuditLog(log.path, lambda: NOW, log.key).append(entry(6)) == 7 + rotated
    assert verify(log.path, log.key).ok


def test_another_key_goes_on_once_the_log_is_accepted(log, key):
    other = AuditLog(log.path, lambda: NOW, bytes(32))
    first, _ = other.accept("the key was changed")
    assert (first.sequence, other.append(entry(7))) == (7, 8)


def test_a_last_line_after_a_damaged_one_says_nothing_of_the_key(log, key):
    rewrite(log, lambda lines: [*lines[:4], b"x\n", lines[5]])
    assert AuditLog(log.path, lambda: NOW, key).append(entry(6)) == 7


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


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_lines_that_were_not_flushed_are_taken_back_and_written_once(tmp_path, monkeypatch, error):
    log = AuditLog(tmp_path / "a.log", lambda: NOW, sync=True)
    log.append(entry(0))
    before = log.path.read_bytes()

    def fail(_file):
        raise error

    monkeypatch.setattr(audit.os, "fdatasync", fail)
    for number in (1, 2):
        with pytest.raises((AuditFailed, KeyboardInterrupt)):
            log.append(entry(number))
        assert log.path.read_bytes() == before
    monkeypatch.undo()
    log.append(entry(3))
    written = [json.loads(line)["request_id"] for line in log.path.read_text().splitlines()]
    assert written == ["r0", "r1", "r2", "r3"]


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
    b"something else" + chain.BEGIN + b"x" * (audit.MAX_LINE - len(chain.BEGIN)),
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
        log.append(AuditEntry(*["\U0001f511" * 1000] * 7))
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
    write = chain.write

    def slow(*arguments):
        time.sleep(0.001)
        return write(*arguments)

    # Other processes may run between reading the last line and writing the next.
    monkeypatch.setattr(chain, "write", slow)
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
    stranger = Caller("stranger", Permissions(), "192.0.2.7")
    kms.record_refusal("Encrypt", stranger, "r-1", "SignatureDoesNotMatch")
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
    assert {line["client"] for line in lines} == {None, "192.0.2.7"}
    assert lines[9]["client"] == "192.0.2.7"
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
        # The stored line; the head is known.
        assert [parse(line)[0].sequence for line in read] == [6]

    def test_anchor_of_an_older_release_is_looked_for_from_the_beginning(self, database, log):
        anchors.remember(database, log)
        with database.write() as transaction:
            transaction.execute(text("UPDATE audit_anchors SET position = 0"))
        log.append(entry(7))
        anchors.remember(database, log)
        assert anchors.remembered(database, log) == (log.head(),)

    def test_each_log_has_its_own(self, database, log):
        other = replace(log, log_id="another")
        for each in (log, other):
            anchors.remember(database, each)
        log.append(entry(6))
        anchors.remember(database, log)
        assert [anchors.remembered(database, each)[0].sequence for each in (log, other)] == [7, 6]

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


def test_owed_lines_are_written_when_the_kms_closes(open_kms, monkeypatch, tmp_path):
    kms = open_kms()
    monkeypatch.setattr(audit.os, "write", lambda *_: 0)
    with pytest.raises(AuditFailed):
        Client(kms)("ListKeys")
    monkeypatch.undo()
    kms.close()
    assert json.loads((tmp_path / "audit.log").read_text())["action"] == "ListKeys"
    assert anchors.remembered(kms._database, kms._audit.log)[0].sequence == 1


def test_owed_lines_that_are_lost_when_the_kms_closes_are_logged(open_kms, monkeypatch, caplog):
    kms = open_kms()
    monkeypatch.setattr(audit.os, "write", lambda *_: 0)
    for _ in range(2):
        with pytest.raises(AuditFailed):
            kms.record_refusal("ListKeys", Client(kms).caller, "r-lost", "SignatureDoesNotMatch")
    for _ in range(2):
        kms.close()
    lost = [each.line for each in caplog.records if each.getMessage() == "an audit line is lost"]
    assert [each.request_id for each in lost] == ["r-lost", "r-lost"]


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
    anchors.accept(kms._database, kms._audit.log, "a test")
    kms.sweep()
    assert kms.health().facts["audit log"] == "ready"
    assert kms.gauges()["audit_log_whole"]


def accept(log, *must_have):
    """As :func:`hsmwrap.kms.anchors.accept`, without a database."""
    report = verify(log.path, log.key, must_have)
    damaged = damaged_files(log.path, report)
    last = max([report.sound, *(link.sequence for link in must_have)])
    first, old = log.accept("a test", report.finding, damaged, last)
    return first, old, report.finding


def problems(log, *must_have):
    return [str(problem) for problem in verify(log.path, log.key, must_have).problems]


class TestFiles:
    """A log is a row of files: rotated ones go on with the chain, accepted ones begin another."""

    @pytest.fixture
    def rotated(self, log):
        """A log of three ended files and its own: lines 1 to 6, 7 and 8, 9 and 10, 11."""
        for number in range(3):
            assert log.rotate() == f"a.log.{number + 1}"
            if number < 2:
                log.append(entry(number))
        return log

    @pytest.mark.parametrize("mode", [0o600, 0o640, 0o660])
    def test_the_new_file_has_the_mode_and_group_of_the_old_one(self, tmp_path, mode, monkeypatch):
        log = AuditLog(tmp_path / "a.log", lambda: NOW)
        log.append(entry(1))
        log.path.chmod(mode)
        log.append(entry(2))
        log.rotate()
        assert log.path.stat().st_mode & 0o777 == mode
        # A user who may not give a file to the group that the old one has: no group gets rights.
        monkeypatch.setattr(audit.os, "geteuid", lambda: 1000)
        before = os.stat_result([*log.path.stat()[:5], log.path.stat().st_gid + 1, *[0] * 4])
        new = os.open(tmp_path / "new", os.O_WRONLY | os.O_CREAT, 0o600)

        def refused(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(audit.os, "fchown", refused)
        audit._give_to_the_same(new, before)
        assert os.fstat(new).st_mode & 0o777 == 0o600
        os.close(new)

    def test_numbers_and_chain_go_on(self, rotated, key):
        report = verify(rotated.path, key, (rotated.head(),))
        assert (report.ok, report.files, report.lines, report.head.sequence) == (True, 4, 11, 11)
        assert report.anchor == rotated.head()
        names = {path.name for path in rotated.path.parent.iterdir()}
        assert names == {"a.log", "a.log.1", "a.log.2", "a.log.3"}
        assert (rotated.path.stat().st_mode & 0o777, rotated.path.stat().st_nlink) == (0o600, 1)
        first = json.loads(rotated.path.read_text())
        assert (first["action"], first["before"]) == ("RotateAuditLog", "a.log.3")

    @pytest.mark.parametrize("file", ["a.log.1", "a.log.2", "a.log.3"])
    def test_a_missing_file_is_found(self, rotated, file):
        rotated.path.with_name(file).unlink()
        assert problems(rotated) == [f"{file}: is missing"]
        assert rotated.rotate() == "a.log.4"
        assert problems(rotated) == [f"{file}: is missing"]

    @pytest.mark.parametrize("file", ["a.log.1", "a.log.2", "a.log.3"])
    @pytest.mark.parametrize("at", [0, -1])
    def test_a_changed_line_is_found_in_every_file(self, rotated, file, at):
        path = rotated.path.with_name(file)
        lines = path.read_bytes().splitlines(keepends=True)
        lines[at] = lines[at].replace(b'"ok"', b'"no"')
        path.write_bytes(b"".join(lines))
        (problem, *more) = verify(rotated.path, rotated.key).problems
        assert (problem.file, problem.line) == (file, 1 if at == 0 else len(lines))
        assert not more

    @pytest.mark.parametrize("file", ["a.log.1", "a.log.2", "a.log.3"])
    def test_a_cut_end_is_found_in_every_file(self, rotated, file):
        path = rotated.path.with_name(file)
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:-1]))
        assert any("does not chain" in problem for problem in problems(rotated))

    def test_exchanged_and_added_files_are_found(self, rotated):
        first, second = (rotated.path.with_name(f"a.log.{number}") for number in (1, 2))
        contents = first.read_bytes(), second.read_bytes()
        for path, content in zip((first, second), reversed(contents), strict=True):
            path.write_bytes(content)
        assert problems(rotated)
        for path, content in zip((first, second), contents, strict=True):
            path.write_bytes(content)
        assert not problems(rotated)
        rotated.path.with_name("a.log.9").write_bytes(contents[0])
        assert problems(rotated)

    def test_the_ended_files_cannot_be_left_out(self, rotated, key):
        """An older file, put in place of the log, lacks the anchored line."""
        anchor = rotated.head()
        rotated.path.with_name("a.log.3").replace(rotated.path)
        assert problems(rotated, anchor) == ["line 2: the log ends without line 11, which it had"]

    def test_an_anchor_is_found_in_an_ended_file(self, log, key):
        old = log.head()
        middle = []
        for number in range(3):
            log.rotate()
            log.append(entry(number))
            middle.append(log.head())
        assert all(log.holds(line) for line in (START, old, *middle))
        assert not log.holds(Link(8, "0" * 64))
        assert verify(log.path, key, (old,)).behind == 6
        log.path.with_name("a.log.1").unlink()
        assert not log.holds(old)
        assert all(log.holds(line) for line in middle)

    def test_nothing_is_rotated_below_a_size(self, tmp_path, log):
        assert log.rotate(at_least=10**6) is None
        assert AuditLog(tmp_path / "empty.log", lambda: NOW).rotate() is None

    def test_rotates_by_size_and_loses_no_line(self, tmp_path, key):
        log = AuditLog(tmp_path / "a.log", lambda: NOW, key, max_bytes=2000)
        other = replace(log)  # as another process
        for number in range(60):
            (log, other)[number % 2].append(entry(number))
        report = verify(log.path, key)
        assert report.ok
        assert report.lines == 60 + report.files - 1
        assert report.files > 5
        assert all(path.stat().st_size < 3000 for path in tmp_path.glob("a.log*"))

    def test_a_log_that_cannot_be_rotated_goes_on(self, tmp_path, key, caplog, monkeypatch):
        log = AuditLog(tmp_path / "a.log", lambda: NOW, key, max_bytes=300)

        def refused(*_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(audit.Path, "rename", refused)
        for number in range(5):
            log.append(entry(number))
        assert caplog.text.count("the audit log was not rotated") == 1
        monkeypatch.undo()
        log.append(entry(5))
        report = verify(log.path, key)
        assert (report.ok, report.files, report.lines) == (True, 2, 7)

    def test_accepting_names_the_damaged_file_and_keeps_it(self, log, key):
        rewrite(log, lambda lines: [*lines, DEEP + b"\n", b"x\n"])
        damaged = log.path.read_bytes()
        with pytest.raises(AuditFailed, match="hsmwrap audit accept"):
            log.append(entry(7))
        first, old, finding = accept(log)
        assert log.head() == first
        assert (old, log.path.with_name(old).read_bytes()) == ("a.log.1", damaged)
        assert finding == "line 7: is not a line of an audit log, and 1 more problems"
        said = json.loads(log.path.read_text())
        assert (said["sequence"], said["reason"], said["finding"]) == (7, "a test", finding)
        digest = hashlib.sha256(damaged).hexdigest()
        assert said["accepted"] == [{"file": "a.log.1", "sha256": digest}]
        log.append(entry(8))
        report = verify(log.path, key, (first,))
        # The new file has the line that was owed as well.
        assert (report.ok, report.lines, report.files) == (True, 8 + 3, 2)
        assert report.accepted[0].finding == finding
        assert report.behind == 2

    def test_a_whole_log_may_be_accepted(self, log, key):
        assert accept(log)[2] == ""
        report = verify(log.path, key)
        assert (report.ok, report.lines, report.head.sequence) == (True, 7, 7)

    def test_a_cut_end_is_a_finding_and_numbers_are_not_used_again(self, log, key):
        anchor = log.head()
        rewrite(log, lambda lines: lines[:2])
        first, _, finding = accept(log, anchor)
        assert finding == "line 2: the log ends without line 6, which it had"
        assert first.sequence == 7
        assert verify(log.path, key, (first,)).ok

    @pytest.mark.parametrize("file", ["a.log.1", "a.log.2"])
    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            (Path.unlink, "is missing"),
            (
                lambda path: path.write_bytes(path.read_bytes()[:-1]),
                "was changed after it was accepted",
            ),
        ],
    )
    def test_a_change_of_an_accepted_file_is_found(self, log, file, change, problem):
        accept(log)
        log.append(entry(1))
        accept(log)
        assert not problems(log)
        change(log.path.with_name(file))
        assert f"{file}: {problem}" in problems(log)

    @pytest.mark.parametrize("file", ["a.log.1", "a.log.2"])
    def test_a_missing_file_may_be_accepted_and_no_other(self, rotated, file):
        rotated.path.with_name(file).unlink()
        _, old, finding = accept(rotated)
        assert (old, finding) == ("a.log.4", f"{file}: is missing")
        assert not problems(rotated)
        rotated.append(entry(1))
        rotated.path.with_name("a.log.3").unlink()
        assert problems(rotated) == ["a.log.3: is missing"]

    def test_a_damaged_ended_file_may_be_accepted_as_it_is(self, rotated):
        path = rotated.path.with_name("a.log.2")
        path.write_bytes(path.read_bytes().replace(b'"ok"', b'"no"'))
        assert problems(rotated)
        accept(rotated)
        assert not problems(rotated)
        path.write_bytes(path.read_bytes().replace(b'"no"', b'"on"'))
        assert problems(rotated)[-1] == "a.log.2: was changed after it was accepted"

    def test_what_the_first_line_says_is_chained(self, log, key):
        rewrite(log, lambda lines: [*lines, b"x\n"])
        accept(log)
        rewrite(log, lambda lines: [lines[0].replace(b"is not a line", b"is well")])
        found = verify(log.path, key).problems
        assert AuditProblem(1, CHANGED) in found
        # An acceptance that is not in the chain accepts nothing.
        assert AuditProblem(7, "is not a line of an audit log", "a.log.1") in found

    @pytest.mark.parametrize("action", ["RotateAuditLog", "AcceptAuditLog", "Encrypt"])
    @pytest.mark.parametrize(
        "before",
        [1, {}, "../a.log", "\0\ud800", "", "a.log", "a.log.1", "a.log.99999999999999999999"],
    )
    def test_hostile_first_lines(self, log, key, action, before):
        log.append(entry(7))
        log.rotate()
        content = {"action": action, "before": before, "chained_to": [1], "accepted": [before, {}]}
        line = chain.write(content, Link(7, "0" * 64), bytes(32))
        log.path.write_bytes(line)
        assert problems(log)
        assert not log.holds(Link(7, "0" * 64))
        with pytest.raises(AuditFailed, match="its last line, number 8, does not chain"):
            log.rotate()
        assert re.fullmatch(r"a\.log\.[0-9]+", log.accept("a reason")[1])
        log.append(entry(9))

    def test_processes_that_wait_go_on_with_the_new_file(self, log, key):
        other = replace(log)
        with ThreadPoolExecutor(1) as thread:
            with log._locked():
                waiting = thread.submit(other.append, entry(1))
                time.sleep(0.1)
                # As rotate does, under this lock.
                old = log.path.with_name("old")
                old.hardlink_to(log.path)
                new = log.path.with_name("new")
                new.touch()
                new.rename(log.path)
            assert waiting.result(5) == 1
        assert (verify(log.path, key).lines, verify(old, key).lines) == (1, 6)

    def test_reading_waits_for_a_line_that_is_being_written(self, log, key):
        whole = log.path.read_bytes()
        with ThreadPoolExecutor(1) as thread:
            with log._locked():
                log.path.write_bytes(whole[:-9])
                report = thread.submit(verify, log.path, key)
                time.sleep(0.1)
                log.path.write_bytes(whole)
            assert report.result(5).ok

    def test_under_load_no_line_is_lost(self, tmp_path):
        path = tmp_path / "shared.log"
        threads = [threading.Thread(target=_append, args=(path, f"t{i}")) for i in range(3)]
        for thread in threads:
            thread.start()
        log = AuditLog(path, lambda: NOW)
        log.append(entry(0))
        for _ in range(3):
            log.rotate()
            assert verify(path).ok
        for thread in threads:
            thread.join()
        report = verify(path)
        assert (report.ok, report.files, report.lines) == (True, 4, 151 + 3)
        assert report.head.sequence == 154

    def test_after_a_command_that_was_killed(self, log, key):
        log.path.with_name("a.log.1").hardlink_to(log.path)
        log.path.with_name(".a.log.new").write_bytes(b"part")
        assert verify(log.path, key).ok
        log.append(entry(7))
        assert log.rotate() == "a.log.1"
        report = verify(log.path, key)
        assert (report.ok, report.files, report.lines) == (True, 2, 8)

    def test_a_link_stays_a_link(self, log, tmp_path):
        (tmp_path / "elsewhere").mkdir()
        link = tmp_path / "elsewhere" / "link.log"
        link.symlink_to(log.path)
        linked = replace(log, path=link)
        linked.rotate()
        assert link.is_symlink()
        assert log.path.with_name("a.log.1").exists()
        assert verify(link, log.key).files == 2

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
        assert "hsmwrap audit accept" in kms.health().facts["audit log"]
        report, _ = anchors.accept(kms._database, log, "a test")
        assert report.finding.startswith("line 4: is not a line of an audit log")
        assert kms.health().ready
        caplog.clear()
        for _ in range(6):
            client("ListKeys")
        kms.sweep()
        (anchor,) = anchors.remembered(kms._database, log)
        report = verify(log.path, None, (anchor,))
        assert (report.ok, report.lines, report.behind) == (True, 4 + 7, 0)
        assert not caplog.records

    def test_the_kms_goes_on_after_a_rotation(self, open_kms, caplog):
        kms = open_kms(anchor_lines=4)
        client, log = Client(kms), kms._audit.log
        for _ in range(6):
            client("ListKeys")
            replace(log).rotate()  # as another process
        kms.sweep()
        (anchor,) = anchors.remembered(kms._database, log)
        report = verify(log.path, None, (anchor,))
        assert (report.ok, report.files, report.lines, report.behind) == (True, 7, 12, 0)
        assert not caplog.records

    @pytest.mark.parametrize("with_anchor", [True, False], ids=["older copy", "unknown to it"])
    def test_a_restored_log_is_accepted_by_one_command(self, open_kms, with_anchor):
        kms = open_kms(anchor_lines=1)
        client, log = Client(kms), kms._audit.log
        for _ in range(6):
            client("ListKeys")
        rewrite(log, lambda lines: lines[:2])
        kms.sweep()
        assert "a line is missing" in kms.health().facts["audit log"]
        if not with_anchor:
            with kms._database.write() as transaction:
                transaction.execute(text("DELETE FROM audit_anchors"))
        report, _ = anchors.accept(kms._database, log, "restored from a backup")
        assert report.ok != with_anchor
        client("ListKeys")
        remembered = anchors.remembered(kms._database, log)
        report = verify(log.path, None, remembered)
        assert (report.ok, report.anchor) == (True, remembered[0])
        assert report.accepted[0].reason == "restored from a backup"
        kms.sweep()
        assert kms.health().facts["audit log"] == "ready"


class TestExport:
    def exported(self, log, after=0):
        found = list(export(log.path, after, log.key))
        lines = [json.loads(each)["sequence"] for _, each in found if isinstance(each, bytes)]
        return lines, [str(each) for _, each in found if isinstance(each, AuditProblem)]

    @pytest.mark.parametrize("after", range(12))
    def test_goes_on_after_a_number_over_all_files(self, log, after):
        for number in range(3):
            log.rotate()
            if number < 2:
                log.append(entry(number))
        assert self.exported(log, after) == (list(range(after + 1, 12)), [])

    def test_lines_are_as_they_are(self, log):
        assert b"".join(each for _, each in export(log.path, 0, log.key)) == log.path.read_bytes()

    def test_reads_only_the_files_that_it_needs(self, log):
        log.rotate()
        log.append(entry(7))
        log.rotate()
        log.path.with_name("a.log.1").write_bytes(b"x\n")
        assert self.exported(log, 6) == ([7, 8, 9], [])

    def test_problems_do_not_end_it(self, log):
        log.rotate()
        log.append(entry(7))
        log.rotate()
        log.path.with_name("a.log.2").unlink()
        rewrite(log, lambda lines: [*lines, b"x\n"])
        assert self.exported(log, 3) == (
            [4, 5, 6, 9],
            ["a.log.2: is missing", "line 2: is not a line of an audit log"],
        )

    @pytest.mark.parametrize("rotated", [False, True])
    def test_a_line_of_the_same_number_that_is_another_one_is_a_problem(self, log, key, rotated):
        known = log.head()
        rewrite(log, lambda lines: lines[:4])
        for number in range(3):
            log.append(entry(90 + number))
            if rotated and number == 1:
                log.rotate()
        found = list(export(log.path, 6, key, known.digest))
        assert isinstance(found[0][1], AuditProblem)
        assert "is another line 6 than the one known" in str(found[0][1])
        assert [number for number, _ in found[1:]] == list(range(7, 8 + rotated))
        same = verify(log.path, key).head
        assert list(export(log.path, same.sequence, key, same.digest)) == []
        assert len(list(export(log.path, 6, key))) == 1 + rotated

    def test_a_log_that_ends_before_the_position_is_a_problem(self, log):
        assert self.exported(log, 9) == ([], ["the log ends with line 6, before line 9"])


class TestCommand:
    def run(self, capsys, *arguments, action="verify"):
        import argparse

        parser = argparse.ArgumentParser()
        audit_command.add_parser(parser.add_subparsers())
        args = parser.parse_args(["audit", action, *map(str, arguments)])
        return args.run(args), capsys.readouterr().out

    def test_accept(self, open_kms, config, tmp_path, capsys):
        kms = open_kms()
        Client(kms)("ListKeys")
        rewrite(kms._audit.log, lambda lines: [*lines, b"x\n"])
        assert self.run(capsys, "--config", config)[0] == 1
        code, out = self.run(capsys, "--config", config, "--reason", "why not", action="accept")
        finding = "line 2: is not a line of an audit log"
        log = f"{tmp_path}/audit.log"
        end = f"{log}: goes on after audit.log.1, which is accepted\n"
        assert (code, out) == (0, f"{log}: {finding}\n{end}")
        code, out = self.run(capsys, "--config", config)
        assert code == 0
        assert re.search(rf"audit.log: accepted by line 2 at \S+: why not \({finding}\)\n", out)
        assert "3 lines in 2 files, complete; anchored at line 2" in out
        code, out = self.run(capsys, "--config", config, "--json")
        assert json.loads(out)["accepted"][0]["reason"] == "why not"
        (tmp_path / "audit.log.1").unlink()
        code, out = self.run(capsys, "--config", config)
        assert (code, "audit.log.1: is missing" in out) == (1, True)

    def test_rotate(self, open_kms, config, tmp_path, capsys):
        kms = open_kms()
        log = f"{tmp_path}/audit.log"
        empty = f"{log}: is empty, so it is not rotated\n"
        assert self.run(capsys, "--config", config, action="rotate") == (0, empty)
        Client(kms)("ListKeys")
        rotated = f"{log}: goes on after audit.log.1\n"
        assert self.run(capsys, "--config", config, action="rotate") == (0, rotated)
        code, out = self.run(capsys, "--config", config)
        assert (code, "2 lines in 2 files, complete; anchored at line 1" in out) == (0, True)
        (tmp_path / "audit.log.1").unlink()
        code, out = self.run(capsys, "--config", config, "--json")
        problem = {"file": "audit.log.1", "line": 0, "problem": "is missing"}
        assert (code, problem in json.loads(out)["problems"]) == (1, True)

    def test_export(self, open_kms, config, tmp_path, capfdbinary):
        def exported(*arguments):
            code, out = self.run(capfdbinary, "--config", config, *arguments, action="export")
            return code, [json.loads(line)["sequence"] for line in out.splitlines()]

        kms, position = open_kms(), tmp_path / "position"
        for _ in range(3):
            Client(kms)("ListKeys")
        assert exported("--after", "1") == (0, [2, 3])
        assert exported("--position-file", position) == (0, [1, 2, 3])
        assert exported("--position-file", position) == (0, [])
        Client(kms)("ListKeys")
        position.with_name(".position.new").write_text("left by a killed command")
        assert exported("--position-file", position) == (0, [4])
        last = json.loads((tmp_path / "audit.log").read_text().splitlines()[-1])
        assert position.read_text() == f"4 {last['digest']}\n"
        assert not position.with_name(".position.new").exists()
        assert position.stat().st_mode & 0o777 == 0o600
        rewrite(kms._audit.log, lambda lines: [*lines[:3], b"x\n"])
        assert exported("--after", "2") == (1, [3])
        position.write_text("four")
        with pytest.raises(ConfigurationError, match="one number"):
            exported("--position-file", position)

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

    def test_another_key_is_said_and_not_each_line_is_printed(self, log, key, tmp_path, capsys):
        for number in range(20):
            log.append(entry(number))
        key_file = tmp_path / "another.key"
        key_file.write_bytes(bytes(32))
        key_file.chmod(0o600)
        code, out = self.run(capsys, "--file", log.path, "--key-file", key_file)
        assert code == 1
        end = "; only --config can check that the end was not cut off"
        assert out.splitlines()[20:] == [
            f"{log.path}: and 6 more problems; --json has them all",
            f"{log.path}: 26 lines, damaged, or the key is another one{end}",
        ]
        out = self.run(capsys, "--file", log.path, "--key-file", key_file, "--json")[1]
        assert len(json.loads(out)["problems"]) == 26

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
        assert "cannot check" not in out

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
            "accepted": [],
            "files": 0,
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


class TestThreadsThatWait:
    """The lines of threads that wait at the same time are written together."""

    @pytest.fixture
    def writes(self, monkeypatch):
        """How many lines each write to a file had; and how often the disk was waited for."""
        lines, syncs = [], []
        write, sync = os.write, os.fdatasync
        monkeypatch.setattr(
            audit.os, "write", lambda f, text: lines.append(text.count(b"\n")) or write(f, text)
        )
        monkeypatch.setattr(audit.os, "fdatasync", lambda f: syncs.append(f) or sync(f))
        return lines, syncs

    def test_are_written_and_synced_together(self, tmp_path, key, writes):
        log = AuditLog(tmp_path / "a.log", lambda: NOW, key, sync=True)
        with ThreadPoolExecutor(8) as threads:
            with log._turn(time.monotonic() + 9):
                waiting = [threads.submit(log.append, entry(number)) for number in range(8)]
                until(lambda: len(log._queue.waiting) == 8)
                assert not any(each.done() for each in waiting)
            assert sorted(each.result(5) for each in waiting) == list(range(1, 9))
        assert writes[0] == [8]
        assert len(writes[1]) == 1
        assert verify(log.path, key).lines == 8

    def test_are_not_there_twice_after_a_sync_that_failed(self, tmp_path, key, monkeypatch):
        log = AuditLog(tmp_path / "a.log", lambda: NOW, key, sync=True)
        log.append(entry(0))
        with monkeypatch.context() as patch:
            patch.setattr(audit.os, "fdatasync", lambda _: Path("/nonexistent").stat())
            with pytest.raises(AuditFailed):
                log.append(entry(1))
        log.append(entry(2))
        assert verify(log.path, key).lines == 3

    def test_fail_together_and_their_lines_are_owed(self, tmp_path, key, monkeypatch):
        log = AuditLog(tmp_path / "a.log", lambda: NOW, key)
        log.append(entry(0))
        monkeypatch.setattr(audit.os, "write", lambda *_: 0)
        with ThreadPoolExecutor(8) as threads:
            with log._turn(time.monotonic() + 9):
                waiting = [threads.submit(log.append, entry(number)) for number in range(1, 5)]
                until(lambda: len(log._queue.waiting) == 4)
            for each in waiting:
                with pytest.raises(AuditFailed, match="in part"):
                    each.result(5)
        with pytest.raises(AuditFailed, match="in part"):
            log.check(max_age=9)
        assert verify(log.path, key).lines == 1
        monkeypatch.undo()
        log.check(max_age=9)
        assert verify(log.path, key).lines == 5
        requests = {json.loads(line)["request_id"] for line in log.path.read_text().splitlines()}
        assert requests == {f"r{number}" for number in range(5)}
        assert log.append(entry(5)) == 6

    def test_owed_lines_are_bounded(self, tmp_path, key, monkeypatch, caplog):
        monkeypatch.setattr(audit, "_MOST_OWED", 3)
        log = AuditLog(tmp_path / "a.log", lambda: NOW, key)
        monkeypatch.setattr(audit.os, "write", lambda *_: 0)
        for number in range(5):
            with pytest.raises(AuditFailed):
                log.append(entry(number))
        monkeypatch.undo()
        assert log.append(entry(5)) == 4
        assert caplog.text.count("an audit line is lost") == 2

    def test_nothing_is_done_while_lines_are_owed(self, client, monkeypatch, tmp_path):
        write = os.write
        monkeypatch.setattr(audit.os, "write", lambda *_: 0)
        for _ in range(3):
            with pytest.raises(AuditFailed):
                client.create()
        monkeypatch.setattr(audit.os, "write", write)
        # The first was done, since the log failed after it; its line was owed.
        assert client("ListKeys")["TotalCount"] == 1
        lines = (tmp_path / "audit.log").read_text().splitlines()
        assert [json.loads(line)["action"] for line in lines] == ["CreateKey", "ListKeys"]

    def test_a_check_needs_no_lock_for_a_moment_but_sees_the_file(self, log):
        log.append(entry(1))
        other = replace(log)
        with other._locked():
            log.check(max_age=9)
            with pytest.raises(AuditLocked):
                log.check(lock_seconds=0)
        other.append(entry(2))
        log.check(max_age=9)
        before = log.path.read_bytes()
        for damage in (b"", before[:-2] + b" \n", before + b"x\n", before + before[-50:]):
            log.check()
            log.path.write_bytes(damage)
            if damage:
                with pytest.raises(AuditFailed):
                    log.check(max_age=9)
            log.path.write_bytes(before)
        log.path.unlink()
        log.path.mkdir()
        with pytest.raises(AuditFailed):
            log.check(max_age=9)

    def test_a_forked_child_writes_lines_of_its_own(self, tmp_path, key):
        log = AuditLog(tmp_path / "a.log", lambda: NOW, key)
        with ThreadPoolExecutor(1) as threads:
            with log._turn(time.monotonic() + 9):
                waiting = threads.submit(log.append, entry(1))
                until(lambda: log._queue.waiting)
                child = multiprocessing.get_context("fork").Process(
                    target=log.append, args=(entry(2),)
                )
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)
                    child.start()
                child.join(10)
                assert child.exitcode == 0
            assert waiting.result(5) == 2
        requests = [json.loads(line)["request_id"] for line in log.path.read_text().splitlines()]
        assert requests == ["r2", "r1"]
        assert verify(log.path, key).ok


def _append_for_ever(path, answered):
    log = AuditLog(path, lambda: NOW, max_bytes=20_000)

    def run(name):
        for number in itertools.count():
            sequence = log.append(entry(f"{name}-{number}"))
            os.write(answered, b"%d r%s-%d\n" % (sequence, name.encode(), number))

    for name in ("a", "b", "c"):
        threading.Thread(target=run, args=(name,), daemon=True).start()
    threading.Event().wait()


@pytest.mark.slow
def test_after_kill_9_every_answered_line_is_there(tmp_path):
    path = tmp_path / "a.log"
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = context.Process(target=_append_for_ever, args=(path, writer))
            child.start()
        os.close(writer)
        with os.fdopen(reader, "rb") as answered:
            lines = [answered.readline() for _ in range(200)]
            child.kill()
            child.join()
            lines += [line for line in answered.readlines() if line.endswith(b"\n")]
        AuditLog(path, lambda: NOW).append(entry("after"))
        assert verify(path).ok
        written = [json.loads(line) for _, line in export(path, 0)]
        numbered = {line["sequence"]: line["request_id"] for line in written}
        for line in lines:
            sequence, request_id = line.decode().split()
            assert numbered[int(sequence)] == request_id


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
