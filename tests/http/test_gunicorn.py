"""Under gunicorn, over raw sockets: requests that never reach the application, and shutdown."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from http.client import HTTPConnection
from pathlib import Path

import pytest
from support.http.gunicorn_runner import DEADLINE, Process, running, running_command
from support.http.rpc_signing import v1_query

from hsmwrap.http.app import MAX_BODY
from hsmwrap.http.parsing import MAX_REQUEST_LINE
from hsmwrap.http.server import Server

FAKE = ("-m", "support.http.gunicorn_fake")
UUID = r"[0-9A-F]{8}(?:-[0-9A-F]{4}){3}-[0-9A-F]{12}"


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fake")
    with running([*FAKE, "1", str(directory)], directory / "log") as process:
        yield process


def get(query: str, path: str = "/") -> bytes:
    return f"GET {path}?{query} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode()


def signed(action: str, **parameters: str) -> str:
    return v1_query(action=action, at=datetime.now(UTC), **parameters)


def post(body: bytes, framing: str) -> bytes:
    head = (
        f"POST / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n{framing}\r\n"
        "Content-Type: application/x-www-form-urlencoded\r\n\r\n"
    )
    return head.encode() + body


def parse(answer: bytes) -> tuple[int, dict]:
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    assert b"Content-Type: application/json" in head
    assert int(re.search(rb"(?i)content-length: (\d+)", head)[1]) == len(body)
    return status, json.loads(body)


def assert_refused(process: Process, raw: bytes, status: int, code: str) -> None:
    """The API's error, with its RequestId in the log, and no text of the request there."""
    found, fields = parse(process.exchange(raw))
    assert (found, fields["Code"]) == (status, code)
    assert re.fullmatch(UUID, fields["RequestId"])
    assert f'"request_id": "{fields["RequestId"]}"' in process.log_text()
    assert "SECRET" not in process.log_text()


def test_answers(fake):
    status, fields = parse(fake.exchange(get(signed("Encrypt", Plaintext="SECRET"))))
    assert (status, fields["Length"]) == (200, 6)


LONG = {"Plaintext": "/" * 8192, "EncryptionContext": "漢" * 8192}
"""Each at its limit: 6 KiB of 0xff in base64, and 8192 characters; three and nine times in a
query."""


def test_long_request_lines(fake):
    assert parse(fake.exchange(get(signed("Encrypt", **LONG))))[1]["Length"] == 16384


@contextmanager
def under_gunicorn(tmp_path, *arguments):
    """gunicorn's own command, as in the application's documentation."""
    settings = tmp_path / "gunicorn.conf.py"
    settings.write_text(
        "from hsmwrap.http.server import _announce as post_worker_init\n"
        "bind, control_socket_disable = '127.0.0.1:0', True\n"
    )
    command = [sys.executable, "-m", "gunicorn", "-c", str(settings), *arguments]
    command += ["support.http.gunicorn_fake:from_environment()"]
    environment = {**os.environ, "FAKE_DIRECTORY": str(tmp_path)}
    with running_command(command, tmp_path / "log", environment) as process:
        yield process


def test_long_request_lines_under_gunicorns_own_command(tmp_path):
    worker = ["-k", "hsmwrap.http.worker.KmsWorker", "--limit-request-line", "99"]
    with under_gunicorn(tmp_path, *worker) as process:
        answer = parse(process.exchange(get(signed("Encrypt", **LONG))))
    assert answer[1]["Length"] == 16384


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (get("Action=SECRET" + "a" * MAX_REQUEST_LINE), 414, "RequestLineTooLong"),
        (b"SECRET\r\n\r\n", 400, "MalformedRequest"),
        (b"GET / HTTP/9.1\r\nHost: SECRET\r\n\r\n", 400, "MalformedRequest"),
        (b"GET / HTTP/1.1\r\nHost: h\r\nSECRET\r\n\r\n", 400, "MalformedRequest"),
        (
            b"GET / HTTP/1.1\r\nHost: h\r\nX: SECRET" + b"a" * 9000 + b"\r\n\r\n",
            431,
            "HeadersTooLarge",
        ),
        (
            b"GET / HTTP/1.1\r\nHost: h\r\n" + b"X: SECRET\r\n" * 200 + b"\r\n",
            431,
            "HeadersTooLarge",
        ),
        (b"GET / HTTP/1.1\r\nHost: h\r\nAuthorization: SECRET\r\n\r\n", 400, "MissingParameter"),
        (get("", "/SECRET"), 404, "InvalidPath.NotFound"),
        (get("", "/readyz"), 500, "InternalFailure"),
        (post(b"A=SECRET", f"Content-Length: {2 * MAX_BODY}"), 413, "RequestTooLarge"),
        (post(b"A=SECRET", "Content-Length: 20"), 400, "InvalidParameter"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_requests(fake, raw, status, code):
    assert_refused(fake, raw, status, code)


@pytest.mark.parametrize(
    "chunk", [b"zz\r\nSECRET\r\n", b"8\r\nA=SE", b"-1\r\n", b"8;" + b"S" * 9000]
)
def test_broken_chunks(fake, chunk):
    assert_refused(fake, post(chunk, "Transfer-Encoding: chunked"), 400, "InvalidParameter")


@pytest.mark.parametrize(
    ("length", "status", "code"),
    [(MAX_BODY, 400, "MissingParameter"), (MAX_BODY + 1, 413, "RequestTooLarge")],
)
def test_chunked_bodies_are_limited(fake, length, status, code):
    body = f"{length:x}\r\n".encode() + b"A" * length + b"\r\n0\r\n\r\n"
    assert_refused(fake, post(body, "Transfer-Encoding: chunked"), status, code)


def test_the_log_is_json(fake):
    fake.exchange(get(signed("Encrypt")))
    assert all(json.loads(line) for line in fake.log_text().splitlines())


def test_shutdown_finishes_running_calls(tmp_path):
    with running([*FAKE, "1", str(tmp_path)], tmp_path / "log") as process:
        answers = []
        call = threading.Thread(
            target=lambda: answers.append(process.exchange(get(signed("Wait"))))
        )
        call.start()
        wait_for(tmp_path / "started")
        process.terminate()
        wait_for_text(process, "Handling signal: term")
        (tmp_path / "release").touch()
        call.join(DEADLINE)
        assert parse(answers[0])[0] == 200
        assert process.stop() == 0


def test_metrics_have_an_address_of_their_own(fake):
    assert_refused(fake, get("", "/metrics"), 404, "InvalidPath.NotFound")
    for path in ("/", "/healthz", "/readyz"):
        status, fields = parse(fake.exchange(get(signed("Encrypt"), path), fake.metrics_port))
        assert (status, fields["Code"]) == (404, "InvalidPath.NotFound")


@pytest.mark.parametrize("fields", ["SCRIPT_NAME: /x", "Script-Name: /x", "X-Forwarded-Prefix: /x"])
def test_header_fields_choose_no_page(fake, fields):
    raw = get("", "/x/healthz").replace(b"\r\n", f"\r\n{fields}\r\n".encode(), 1)
    assert_refused(fake, raw, 404, "InvalidPath.NotFound")


def test_any_wsgi_server_runs_the_application(tmp_path):
    """gunicorn's own worker takes SCRIPT_NAME from a local client; that chooses no page either."""
    with under_gunicorn(tmp_path, "-k", "gthread") as process:
        answer = parse(process.exchange(get(signed("Encrypt", Plaintext="text"))))
        moved = get("", "/x/healthz").replace(b"\r\n", b"\r\nSCRIPT_NAME: /x\r\n", 1)
        assert_refused(process, moved, 404, "InvalidPath.NotFound")
    assert (answer[0], answer[1]["Length"]) == (200, 4)


def test_reload_finishes_running_calls(tmp_path):
    """SIGHUP puts new workers in place; the call of an old one is answered."""
    with running([*FAKE, "1", str(tmp_path)], tmp_path / "log") as process:
        answers = []
        call = threading.Thread(
            target=lambda: answers.append(process.exchange(get(signed("Wait"))))
        )
        call.start()
        wait_for(tmp_path / "started")
        process.popen.send_signal(signal.SIGHUP)
        wait_for_text(process, "Booting worker", times=2)
        assert parse(process.exchange(get(signed("Encrypt"))))[0] == 200
        assert not answers
        (tmp_path / "release").touch()
        call.join(DEADLINE)
        assert parse(answers[0])[0] == 200
        wait_for_text(process, "Worker exiting")


def page(process: Process, path: str) -> bytes:
    return process.exchange(get("", path).replace(b"Connection: close\r\n", b""))


def wait_until(condition) -> None:
    give_up = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def interrupt(process: Process) -> None:
    process.popen.send_signal(signal.SIGINT)
    process.popen.communicate(timeout=DEADLINE)
    assert process.popen.returncode == 0


def test_before_the_end_it_is_not_ready_and_serves(tmp_path):
    """Longer than the test waits; SIGINT ends it."""
    (tmp_path / "healthy").touch()
    arguments = [*FAKE, "2", str(tmp_path), "drain_seconds=600"]
    with running(arguments, tmp_path / "log") as process:
        assert b" 200 OK" in page(process, "/readyz")
        process.terminate()
        wait_until(lambda: b" 503 " in page(process, "/readyz"))
        assert b" 200 OK" in page(process, "/healthz")
        answer = process.exchange(get(signed("Encrypt", Plaintext="text")))
        assert parse(answer)[1]["Length"] == 4
        keeping = page(process, "/healthz")
        assert b"\r\nConnection: close\r\n" in keeping
        assert process.popen.poll() is None
        interrupt(process)
    assert '"server": "is about to stop"' in process.log_text()


def test_after_that_time_it_ends(tmp_path):
    with running([*FAKE, "1", str(tmp_path), "drain_seconds=0.1"], tmp_path / "log") as process:
        assert process.stop() == 0


def test_on_reload_it_stays_ready(tmp_path):
    """The workers of before end at once: their successors serve."""
    (tmp_path / "healthy").touch()
    arguments = [*FAKE, "1", str(tmp_path), "drain_seconds=600"]
    with running(arguments, tmp_path / "log") as process:
        process.popen.send_signal(signal.SIGHUP)

        def replaced() -> bool:
            assert b" 200 OK" in page(process, "/readyz")
            return "Worker exiting" in process.log_text()

        wait_until(replaced)
        process.terminate()
        wait_until(lambda: b" 503 " in page(process, "/readyz"))
        interrupt(process)


@pytest.mark.parametrize("workers", [1, 2])
def test_no_call_fails_when_workers_are_replaced(tmp_path, workers):
    """Clients that keep their connections, and close them when the server says so."""
    # Under load a client may be idle for more than the real 2 s.
    arguments = [*FAKE, str(workers), str(tmp_path), "max_requests=40", "LAST_REQUEST_SECONDS=600"]
    enough = threading.Event()
    statuses = []

    def send(port: int) -> None:
        client = HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
        while not enough.is_set():
            client.request("GET", "/?" + signed("Encrypt", Plaintext="text"))
            response = client.getresponse()
            response.read()
            statuses.append(response.status)
        client.close()

    with (
        running(arguments, tmp_path / "log") as process,
        ThreadPoolExecutor(4) as clients,
    ):
        sending = [clients.submit(send, process.port) for _ in range(4)]
        try:
            wait_until(
                lambda: (
                    process.log_text().count("Booting worker") >= workers + 3
                    or any(client.done() for client in sending)
                )
            )
        finally:
            enough.set()
        for client in sending:
            client.result(DEADLINE)
        assert set(statuses) == {200}
        assert len(statuses) > 3 * 40
        process.terminate()
        process.popen.communicate(timeout=DEADLINE)


def test_the_counts_at_which_workers_end_are_far_apart():
    server = Server(lambda: None, host="127.0.0.1", port=0, max_requests=100)
    assert (server.cfg.max_requests, server.cfg.max_requests_jitter) == (100, 50)


def test_a_worker_whose_parent_is_gone_ends(tmp_path):
    with running([*FAKE, "1", str(tmp_path)], tmp_path / "log") as process:
        (worker,) = re.findall(r"Booting worker with pid: (\d+)", process.log_text())
        process.popen.kill()
        wait_for_text(process, "Worker exiting")
        give_up = time.monotonic() + DEADLINE
        while Path("/proc", worker).exists():
            assert time.monotonic() < give_up
            time.sleep(0.01)
        process.popen.communicate()


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + DEADLINE
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def wait_for_text(process: Process, text: str, times: int = 1) -> None:
    deadline = time.monotonic() + DEADLINE
    while process.log_text().count(text) < times:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_application_that_does_not_load_is_never_ready(tmp_path):
    (tmp_path / "broken").touch()
    with (
        pytest.raises(AssertionError, match="does not load"),
        running([*FAKE, "1", str(tmp_path)], tmp_path / "log"),
    ):
        pass


REQUESTS = re.compile(rb'http_requests_total\{action="Encrypt",code="OK"\} (\S+)')


def test_every_worker_has_the_counters_of_all_under_gunicorns_own_command(tmp_path):
    pytest.importorskip("prometheus_client")
    worker = ["-k", "hsmwrap.http.worker.KmsWorker", "-w", "2"]
    with under_gunicorn(tmp_path, *worker) as process:
        wait_for_text(process, "Booting worker", times=2)
        answered, workers = 0, set()
        end = time.monotonic() + DEADLINE
        while len(workers) < 2:
            assert time.monotonic() < end
            parse(process.exchange(get(signed("Encrypt"))))
            answered += 1
            page = process.exchange(get(signed("Metrics")))
            workers.add(json.loads(page.partition(b"\r\n\r\n")[2])["Process"])
            counted = json.loads(page.partition(b"\r\n\r\n")[2])["Metrics"].encode()
            assert float(REQUESTS.search(counted)[1]) == answered
        directory = json.loads(page.partition(b"\r\n\r\n")[2])["Directory"]
        assert Path(directory).is_dir()
    assert not Path(directory).exists()


def test_metrics_of_all_workers(tmp_path):
    """Also of workers that have ended: their successors answer here, and take their files over."""
    pytest.importorskip("prometheus_client")
    with running([*FAKE, "2", str(tmp_path)], tmp_path / "log") as process:
        for _ in range(20):
            process.exchange(get(signed("Encrypt")))
        wait_for_text(process, "Booting worker", times=2)
        for pid in re.findall(r"Booting worker with pid: (\d+)", process.log_text()):
            os.kill(int(pid), signal.SIGTERM)
        wait_for_text(process, "Worker exiting", times=2)
        text = process.exchange(get("", "/metrics"), process.metrics_port).decode()
        directory = json.loads(process.exchange(get(signed("Metrics"))).partition(b"\r\n\r\n")[2])
        files = Path(directory["Directory"]).glob("counter_*.db")
        assert {file.name for file in files} <= {f"counter_{slot}.db" for slot in range(4)}
    assert 'hsmwrap_http_requests_total{action="Encrypt",code="OK"} 20.0' in text


CANNOT_OPEN = "a worker process cannot open the KMS"


def workers_of(process):
    pid = process.popen.pid
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def oldest_worker(process, directory, *, of):
    """The oldest one, as soon as so many are open."""
    deadline = time.monotonic() + DEADLINE
    while True:
        opened = [pid for pid in workers_of(process) if (directory / f"opened-{pid}").exists()]
        if len(opened) == of:
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return min(opened)


def test_a_later_worker_that_cannot_open_does_not_end_the_server(tmp_path):
    """The next ones try again, until one is ready."""
    with running([*FAKE, "1", str(tmp_path)], tmp_path / "log") as process:
        oldest = oldest_worker(process, tmp_path, of=1)
        (tmp_path / "unavailable").touch()
        os.kill(oldest, signal.SIGKILL)
        wait_for_text(process, "exited with code 1", times=2)
        (tmp_path / "unavailable").unlink()
        assert parse(process.exchange(get(signed("Encrypt"))))[0] == 200
        assert process.stop() == 0
    logged = [json.loads(line) for line in process.log_text().splitlines()]
    assert {line.get("why") for line in logged if line["message"] == CANNOT_OPEN} == {
        "the HSM is unreachable"
    }


def test_a_refused_pin_is_not_tried_again_by_further_workers(tmp_path):
    """The worker stays, without serving; SIGHUP replaces it. The others serve."""
    with running([*FAKE, "2", str(tmp_path)], tmp_path / "log") as process:
        oldest = oldest_worker(process, tmp_path, of=2)
        (tmp_path / "pin").touch()
        os.kill(oldest, signal.SIGKILL)
        wait_for_text(process, "the PIN was refused")
        assert parse(process.exchange(get(signed("Encrypt"))))[0] == 200
        stays = max(workers_of(process))
        # As long as another one takes that fails for another reason, and then ends.
        (tmp_path / "pin").rename(tmp_path / "unavailable")
        os.kill(oldest_worker(process, tmp_path, of=1), signal.SIGKILL)
        wait_for_text(process, "exited with code 1")
        assert stays in workers_of(process)
        assert process.log_text().count("the PIN was refused") == 1
        (tmp_path / "unavailable").unlink()
        process.popen.send_signal(signal.SIGHUP)
        assert parse(process.exchange(get(signed("Encrypt"))))[0] == 200
        assert process.stop() == 0


@pytest.mark.parametrize(
    ("file", "code", "why"),
    [("unavailable", 3, "the HSM is unreachable"), ("pin", 4, "the PIN was refused")],
)
def test_a_failed_start_is_a_line_of_the_log_and_an_exit_code(tmp_path, file, code, why):
    (tmp_path / file).touch()
    done = subprocess.run(
        [sys.executable, *FAKE, "1", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == code
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["why"] for line in lines if line["message"] == CANNOT_OPEN] == [why]
    assert "traceback" not in done.stderr.lower()
