"""gunicorn's worker process around :class:`hsmwrap.http.gateway.Gateway`.

gunicorn manages the processes and the listening sockets: it starts workers and replaces those that
end, tells them to stop, and reloads on SIGHUP. This class is built on its documented base for
worker classes; nothing else of gunicorn reads requests or writes answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from typing import TYPE_CHECKING, Any

from gunicorn import sock
from gunicorn.workers.base import Worker

from hsmwrap.http.gateway import Gateway, Place, Site

if TYPE_CHECKING:
    # Not at run time: this is imported before the fork, and prometheus_client has to be after it.
    from hsmwrap.http.app import App

_HEARTBEAT_SECONDS = 1.0


class KmsWorker(Worker):
    """A worker that reads requests on an event loop and runs them in threads."""

    wsgi: Any
    _quick = False

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
        tls = sock.ssl_context(self.cfg) if self.cfg.is_ssl else None
        for listener, site in zip(self.sockets, self._sites(), strict=True):
            gateway.listen(listener, site, tls)
        # A signal that came before these handlers were there has made alive false.
        while self.alive and self.ppid == os.getppid() and gateway.served < self.max_requests:
            self.notify()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), _HEARTBEAT_SECONDS)
        if not self._quick:
            stopping = loop.create_task(gateway.stop(self.cfg.graceful_timeout))
            while not (stopping.done() or self._quick):
                self.notify()
                await asyncio.wait({stopping}, timeout=_HEARTBEAT_SECONDS)
        gateway.close()

    def _sites(self) -> list[Site]:
        """What is served at each socket: the API, and metrics where :class:`Server` says so."""
        api, metrics = api_site(self.wsgi), metrics_site(self.wsgi)
        if len(self.sockets) > 1 and bool(getattr(self.app, "metrics_address", None)):
            return [*(api for _ in self.sockets[1:]), metrics]
        return [api for _ in self.sockets]


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
