"""The application under gunicorn: processes, threads, limits, graceful shutdown.

Requests are read by :mod:`hsmwrap.http.gateway`, in :mod:`hsmwrap.http.worker`.

Each worker process opens its own KMS after the fork. On SIGTERM a worker says that it is not ready
(for ``drain_seconds``), stops accepting, finishes its running calls (at most ``shutdown_seconds``)
and closes the KMS.
"""

from __future__ import annotations

import atexit
import json
import math
import mmap
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from typing import Any, Protocol

from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter

_BOOT_SECONDS = 120
_CLOSING_SECONDS = 10
"""How long a worker may take to close its KMS, after the last request."""

START_FAILED, PIN_REFUSED = Arbiter.WORKER_BOOT_ERROR, Arbiter.APP_LOAD_ERROR
"""Exit codes of a worker with which gunicorn ends the server, with the same code."""

_LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"json": {"()": "hsmwrap.http.logs.JsonFormatter"}},
    "handlers": {
        "stderr": {
            "class": "logging.StreamHandler",
            "formatter": "json",
            "stream": "ext://sys.stderr",
        }
    },
    "root": {"handlers": []},
    "loggers": {"gunicorn.error": {"handlers": ["stderr"], "level": "INFO", "propagate": False}},
}


class Reloading(Protocol):
    """What SIGHUP does before it replaces the workers; they go on meanwhile."""

    def check(self) -> bool:
        """Read the configuration; whether it is worth a try. What is wrong is logged."""

    def attempt(self) -> None:
        """Open what a worker would, in a process of its own, and close it again.

        Raises:
            Exception: It does not open; the text says why, and has no secret.
        """

    def decide(self, why: str | None) -> None:
        """Take what was read for workers that start from now on (None), or log why not."""


class Server(BaseApplication):
    """A gunicorn server; its only configuration is the arguments of this class."""

    def __init__(
        self,
        load: Callable[[], Any],
        reloading: Reloading | None = None,
        each_second: Callable[[], None] = lambda: None,
        *,
        host: str,
        port: int,
        workers: int = 1,
        threads: int = 16,
        max_requests: int = 0,
        shutdown_seconds: float = 30,
        drain_seconds: float = 0,
        metrics_address: str = "",
    ) -> None:
        """Prepare a server; :meth:`run_to_exit` runs it.

        Args:
            load: Makes the WSGI application, once in each worker process.
            reloading: Decides whether SIGHUP replaces the workers; None: it does.
            each_second: Called each second in the process that starts the workers.
            host: Address to listen on.
            port: Port to listen on; 0 takes a free one.
            workers: Processes.
            threads: Threads of each process: how many calls run at a time, at most.
            max_requests: After so many, and up to half as many more, a process is replaced; 0:
                never. Pages do not count.
            shutdown_seconds: How long running calls may take to finish at shutdown.
            drain_seconds: How long before that ``/readyz`` says not ready, and calls are served.
            metrics_address: Address and port of ``/metrics``; empty: no page.
        """
        self._load = load
        self.reloading = reloading
        self.metrics_address = metrics_address
        self.shutdown_seconds, self.drain_seconds = shutdown_seconds, drain_seconds
        self._replaced = mmap.mmap(-1, 8)  # shared with the workers, as the next one
        self._was_ready = mmap.mmap(-1, 1)
        api_address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._options = {
            # The worker takes the last one for the metrics.
            "bind": [api_address, metrics_address] if metrics_address else [api_address],
            "workers": workers,
            "threads": threads,
            "max_requests": max_requests,
            "max_requests_jitter": max_requests // 2,
            "worker_class": "hsmwrap.http.worker.KmsWorker",
            "graceful_timeout": math.ceil(drain_seconds + shutdown_seconds) + _CLOSING_SECONDS,
            "timeout": _BOOT_SECONDS,
            "control_socket_disable": True,
            "logconfig_dict": _LOGGING,
            "post_worker_init": self._announce,
            "on_reload": self._replace,
            "when_ready": lambda _arbiter: _call_each_second(each_second),
        }
        super().__init__()

    def load_config(self) -> None:
        """Pass the options to gunicorn (its hook)."""
        for name, value in self._options.items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        """Make the application (gunicorn's hook, in the worker)."""
        return self._load()

    def run(self) -> None:
        """Start the process that starts the workers (gunicorn's hook)."""
        try:
            _Arbiter(self).run()
        except RuntimeError as error:  # as gunicorn's own
            raise SystemExit(f"hsmwrap: {error}") from None

    def is_replaced(self, age: int) -> bool:
        """Whether SIGHUP starts a successor of the worker with this age (gunicorn's count)."""
        return age <= int.from_bytes(self._replaced[:], "big")

    def _replace(self, arbiter: Any) -> None:
        self._replaced[:] = arbiter.worker_age.to_bytes(8, "big")

    @property
    def was_ready(self) -> bool:
        """Whether a worker was ready since the start."""
        return self._was_ready[0] == 1

    def _announce(self, worker: Any) -> None:
        self._was_ready[0] = 1
        _announce(worker)

    def run_to_exit(self) -> int:
        """Serve until a signal; returns the exit code. Worker processes return here too.

        The exit code is :data:`START_FAILED` or :data:`PIN_REFUSED` if no worker became ready.
        """
        try:
            self.run()
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 1
        return 0


class _Arbiter(Arbiter):
    """Starts the workers; on SIGHUP a process of its own tries the new configuration first."""

    app: Server

    def __init__(self, app: Server) -> None:
        self._trial: tuple[int, int, float] | None = None  # process, its answer, deadline
        self._again = False
        super().__init__(app)

    def handle_hup(self) -> None:
        """Replace the workers, if the new configuration opens (gunicorn's hook)."""
        reloading = self.app.reloading
        if reloading is None:
            super().handle_hup()
        elif self._trial:
            self._again = True  # the file may have changed since
        elif reloading.check():
            self._try(reloading)

    def murder_workers(self) -> None:
        """Look after the trial as well, at least once a second (gunicorn's hook)."""
        super().murder_workers()
        if self._trial is None:
            return
        process, answer, deadline = self._trial
        why: str | None
        if select.select([answer], [], [], 0)[0]:
            with open(answer, encoding="utf-8") as given:  # noqa: PTH123 (a descriptor has no path)
                said = given.read()
            why = json.loads(said) if said else "the process that tried it has died"
        elif time.monotonic() > deadline:
            os.kill(process, signal.SIGKILL)
            os.close(answer)
            why = f"it did not open within {_BOOT_SECONDS} seconds"
        else:
            return
        self._trial = None
        if self.app.reloading is not None:
            self.app.reloading.decide(why)
        if why is None:
            super().handle_hup()
        if self._again:
            self._again = False
            self.handle_hup()

    def stop(self, graceful: bool = True) -> None:  # noqa: FBT001, FBT002 (gunicorn's signature)
        """End the trial as well (gunicorn's hook)."""
        if self._trial:
            os.kill(self._trial[0], signal.SIGKILL)
            self._trial = None
        super().stop(graceful)

    def _try(self, reloading: Reloading) -> None:
        answer, write = os.pipe()
        process = os.fork()
        if process:
            os.close(write)
            self._trial = process, answer, time.monotonic() + _BOOT_SECONDS
            return
        why = None
        try:
            for each in self.SIGNALS:
                signal.signal(each, signal.SIG_DFL)
            for listener in self.LISTENERS:
                listener.sock.close()
            reloading.attempt()
        except BaseException as error:  # noqa: BLE001 (whatever it is, the workers stay)
            why = str(error) or type(error).__name__
        finally:
            os.write(write, json.dumps(why).encode())
            os._exit(0)


def share_metrics() -> None:
    """Give the worker processes a directory for their metrics, unless there is one.

    Has to run before prometheus_client is imported, and in the process that starts the workers.
    """
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        directory, starter = tempfile.mkdtemp(prefix="hsmwrap-metrics-"), os.getpid()
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory

        def remove() -> None:
            if os.getpid() == starter:
                shutil.rmtree(directory, ignore_errors=True)

        atexit.register(remove)


def _call_each_second(function: Callable[[], None]) -> None:
    """By a signal, because that process has no thread, and forks. Its children have no timer."""
    signal.signal(signal.SIGALRM, lambda *_: function())
    signal.setitimer(signal.ITIMER_REAL, 1, 1)
    atexit.register(signal.setitimer, signal.ITIMER_REAL, 0)  # the interpreter drops its handlers


def _announce(worker: Any) -> None:
    """Print one line on stdout when the server listens and the application is ready."""
    if worker.age == 1:
        host, port = worker.sockets[0].getsockname()[:2]
        scheme = "https" if worker.wsgi.tls else "http"
        shown = f"[{host}]" if ":" in host else host
        print(f"ready {scheme}://{shown}:{port}", flush=True)  # noqa: T201 (callers wait for this line)
