"""gunicorn's worker process around :class:`hsmwrap.http.gateway.Gateway`.

gunicorn manages the processes and the listening sockets: it starts workers and replaces those that
end, tells them to stop, and reloads on SIGHUP. This class is built on its documented base for
worker classes; nothing else of gunicorn reads requests or writes answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

from gunicorn.workers.base import Worker

from hsmwrap.errors import ConfigurationError, HsmwrapError, PinError
from hsmwrap.http import deadline
from hsmwrap.http.gateway import Gateway, Place, Site
from hsmwrap.http.server import PIN_REFUSED, START_FAILED, Server, share_metrics

if TYPE_CHECKING:
    # Not at run time: this is imported before the fork, and prometheus_client has to be after it.
    from hsmwrap.http.app import App
    from hsmwrap.kms.tls import Tls

_HEARTBEAT_SECONDS = 1.0
_PAUSE_SECONDS = 2.0
"""Before another worker takes the place of one that could not open the KMS."""

_log = logging.getLogger(__name__)


class KmsWorker(Worker):
    """A worker that reads requests on an event loop and runs them in threads."""

    wsgi: Any
    _quick = False

    @staticmethod
    def setup() -> None:
        """Share the metrics of all workers (gunicorn's hook, before it starts them)."""
        share_metrics()

    @staticmethod
    def check_config(cfg: Any, _log: Any) -> None:
        """Refuse gunicorn's own settings of TLS, which would do nothing (gunicorn's hook).

        Raises:
            ConfigurationError: There are some.
        """
        if cfg.is_ssl:
            raise ConfigurationError("give tls_certificate_file and tls_key_file instead")

    @property
    def _server(self) -> Server | None:
        """None under gunicorn's own command."""
        return self.app if isinstance(self.app, Server) else None

    def load_wsgi(self) -> None:
        """Open the KMS (gunicorn's hook).

        Until a worker was ready, a failure ends the server. Later it ends this worker, and gunicorn
        starts another. After a refused PIN this one stays instead: each new one would try the PIN.

        Raises:
            SystemExit: The KMS does not open; the log says why.
        """
        try:
            super().load_wsgi()
        except HsmwrapError as error:
            if self._server is None:
                raise
            refused = isinstance(error, PinError)
            event = "a worker process cannot open the KMS"
            _log.error(event, extra={"code": error.code, "why": str(error)})
            if not self._server.was_ready:
                sys.exit(PIN_REFUSED if refused else START_FAILED)
            end = time.monotonic() + (math.inf if refused else _PAUSE_SECONDS)
            while self.alive and self.ppid == os.getppid() and time.monotonic() < end:
                self.notify()
                time.sleep(_HEARTBEAT_SECONDS / 10)
            sys.exit(0 if refused else 1)

    def run(self) -> None:
        """Serve until a signal, the death of the parent, or ``max_requests`` (gunicorn's hook)."""
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()

        def end(*, quick: bool) -> None:
            self.alive, self._quick = False, self._quick or quick
            stop.set()

        loop.add_signal_handler(signal.SIGTERM, lambda: end(quick=False))
        for quick in (signal.SIGINT, signal.SIGQUIT):
            loop.add_signal_handler(quick, lambda: end(quick=True))
        gateway = Gateway(threads=self.cfg.threads, limits=self.wsgi.limits, loop=loop)
        try:
            await self._serve_by(gateway, stop)
        finally:
            gateway.close()

    async def _serve_by(self, gateway: Gateway, stop: asyncio.Event) -> None:
        files = self.wsgi.tls
        _refresh(files, at_once=True)  # the files may have changed since the parent read them
        for listener, site in zip(self.sockets, self._sites(), strict=True):
            plain = files is None or site.app is self.wsgi.metrics_app
            gateway.listen(listener, site, None if plain else files.current)
        # A signal that came before these handlers were there has made alive false.
        while self.alive and self.ppid == os.getppid() and gateway.served < self.max_requests:
            self.notify()
            _refresh(files)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), _HEARTBEAT_SECONDS)
        if not self._quick:
            replaced = self._server is not None and self._server.is_replaced(self.age)
            drain = stop.is_set() and not replaced
            ending = gateway.loop.create_task(self._end(gateway, drain=drain))
            while not (ending.done() or self._quick):
                self.notify()
                await asyncio.wait({ending}, timeout=_HEARTBEAT_SECONDS)

    async def _end(self, gateway: Gateway, *, drain: bool) -> None:
        """Finish what runs: after a time without being ready, or while a successor takes over."""
        if drain:
            self.wsgi.draining = gateway.last_requests = True
            await asyncio.sleep(self._server.drain_seconds if self._server else 0)
        seconds = self._server.shutdown_seconds if self._server else self.cfg.graceful_timeout
        await gateway.stop(seconds, 0 if drain else deadline.LAST_REQUEST_SECONDS)

    def _sites(self) -> list[Site]:
        """What is served at each socket: the API, and metrics where :class:`Server` says so."""
        api, metrics = api_site(self.wsgi), metrics_site(self.wsgi)
        if self._server and self._server.metrics_address and len(self.sockets) > 1:
            return [*(api for _ in self.sockets[1:]), metrics]
        return [api for _ in self.sockets]


def _refresh(tls: Tls | None, *, at_once: bool = False) -> None:
    """Take the files of the TLS certificate as they are now; what is wrong with them is logged."""
    try:
        if tls is not None and tls.refresh(at_once=at_once):
            _log.info("changed TLS files are in use")
    except ConfigurationError as error:
        event = "changed TLS files are refused: what they held before stays in use"
        _log.error(event, extra={"why": str(error)})


def api_site(app: App) -> Site:
    """The API and its pages, as the gateway serves them."""
    return Site(
        app,
        app.max_body,
        read_body=frozenset({("GET", b"/"), ("POST", b"/")}),
        places={b"/healthz": Place.LOOP, b"/readyz": Place.RESERVED},
    )


def metrics_site(app: App) -> Site:
    """The page of metrics, as the gateway serves it."""
    return Site(app.metrics_app, max_body=0, otherwise=Place.RESERVED)
