"""A server in its own process, as an operator runs it."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.fast import needs_service

DEADLINE = 60
READY = re.compile(r"ready https?://127\.0\.0\.1:(\d+)\n")


class Process:
    def __init__(self, command: list[str], log: Path, environment: dict[str, str]) -> None:
        self.log = log
        with log.open("wb") as stderr:
            self.popen = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment,
            )
        line = self.popen.stdout.readline()
        ready = READY.fullmatch(line)
        if ready is None:
            self.stop()
            raise AssertionError(f"not ready: {line!r}\n{self.log_text()}")
        self.port = int(ready[1])

    @property
    def metrics_port(self) -> int:
        return int(re.search(r"Listening at: \S+,http://127.0.0.1:(\d+) ", self.log_text())[1])

    def log_text(self) -> str:
        return self.log.read_text()

    def terminate(self) -> None:
        self.popen.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """Stop it; returns the exit code. It must print nothing after its first line."""
        self.terminate()
        try:
            rest, _ = self.popen.communicate(timeout=DEADLINE)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.communicate()
            raise
        assert rest == ""
        return self.popen.returncode

    def exchange(self, raw: bytes, port: int = 0) -> bytes:
        """Send bytes, and read until the server closes."""
        with socket.create_connection(
            ("127.0.0.1", port or self.port), timeout=DEADLINE
        ) as connection:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))


@contextmanager
def running(arguments: list[str], log: Path) -> Iterator[Process]:
    """Run Python with these arguments."""
    environment = {n: v for n, v in os.environ.items() if n != "PROMETHEUS_MULTIPROC_DIR"}
    with running_command([sys.executable, *arguments], log, environment) as process:
        yield process


@contextmanager
def running_command(
    command: list[str], log: Path, environment: dict[str, str]
) -> Iterator[Process]:
    needs_service()
    process = Process(command, log, environment)
    try:
        yield process
    finally:
        if process.popen.poll() is None:
            process.stop()
