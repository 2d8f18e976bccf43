"""The application under gunicorn: processes, threads, limits, graceful shutdown.

Requests are read by :mod:`hsmwrap.http.gateway`, in :mod:`hsmwrap.http.worker`.

Each worker process opens its own KMS after the fork. On SIGTERM a worker says that it is not ready
(for ``drain_seconds``), stops accepting, finishes its running calls (at most ``shutdown_seconds``)
and closes the KMS.
"""

from __future__ import annotations

import atexit
import math
import mmap
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from typing import Any

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


class Server(BaseApplication):
    """A gunicorn server; its only configuration is the arguments of this class."""

    def __init__(
        self,
        load: Callable[[], Any],
        reload: Callable[[], None] = lambda: None,
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
            reload: Called before SIGHUP replaces the workers.
            each_second: Called each second in the process that starts the workers.
            host: Address to listen on.
            port: Port to listen on; 0 takes a free one.
            workers: Processes.
            threads: Threads of each process: its running calls.
            max_requests: After so many, and up to half as many more, a process is replaced; 0:
                never. Pages do not count.
            shutdown_seconds: How long running calls may take to finish at shutdown.
            drain_seconds: How long before that ``/readyz`` says not ready, and calls are served.
            metrics_address: Address and port of ``/metrics``; empty: no page.
        """
        self._load = load
        self._reload = reload
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

    def reload(self) -> None:
        """Read the configuration again (gunicorn's hook, for SIGHUP)."""
        self._reload()
        super().reload()

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
