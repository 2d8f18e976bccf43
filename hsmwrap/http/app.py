"""The WSGI application: Alibaba's RPC protocol in front of a KMS.

WSGI, because every call blocks on an HSM or a database, so each running request needs a thread.
:mod:`hsmwrap.http.gateway` reads requests without one.

One request: read → format → Action → signature → Version → KMS → answer → one line in the log.

Every answer of the API, and every error, has a RequestId that is also in the log. The monitoring
pages (``/healthz``, ``/readyz``, and ``/metrics`` of :class:`MetricsApp`) have one, and a log line,
only when they fail: frequent successful polls would fill the log.

The audit log has every authentic request, and some requests with a wrong signature
(:mod:`hsmwrap.http.refusals`). Requests with an unknown access key or an old timestamp are only in
the log and the metrics, because anyone can send them.
"""

from __future__ import annotations

import atexit
import logging
import os
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hsmwrap.backend import Backend
from hsmwrap.catalog import loggable
from hsmwrap.errors import ConfigurationError, HsmwrapError, InvalidParameter, MissingParameter
from hsmwrap.http import answer, logs
from hsmwrap.http.answer import Answer
from hsmwrap.http.authentication import identify, verify
from hsmwrap.http.errors import MethodNotAllowed, MetricsUnavailable, PageNotFound, PathNotFound
from hsmwrap.http.gateway import Limits
from hsmwrap.http.message import RpcMessage, read_message
from hsmwrap.http.ports import AccessKeys, Caller, KmsPort, NonceStore
from hsmwrap.http.refusals import RefusalAudit
from hsmwrap.http.signature import Claim, read_claim
from hsmwrap.imports import new_request_id
from hsmwrap.keypool import KeyPool
from hsmwrap.kms.access import MAX_ID_LENGTH
from hsmwrap.kms.errors import InvalidAction
from hsmwrap.kms.recommend import recommend
from hsmwrap.kms.tls import Tls, open_tls

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

    from hsmwrap.kms.config import ServerConfig

API_VERSION = "2016-01-20"
MAX_BODY = 128 * 1024
"""Default limit of a body in bytes; the same as for a request line."""

_log = logging.getLogger(__name__)
_LIMITS = Limits()
_FORMATS = {"json": "JSON", "xml": "XML"}


def _metrics_if_installed() -> ModuleType | None:
    try:
        from hsmwrap import metrics  # noqa: PLC0415 (the extra may be absent)
    except ConfigurationError:
        return None
    return metrics


_METRICS = _metrics_if_installed()


def _utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(slots=True)
class _Exchange:
    """The facts of a request known so far: enough to answer and log it at any point."""

    host: str
    path: str
    client: str | None
    request_id: str = field(default_factory=new_request_id)
    started: float = field(default_factory=time.perf_counter)
    format_: str = "JSON"
    action: str = ""
    access_key_id: str = ""
    known_action: bool = False
    given: Mapping[str, str] = field(default_factory=dict, repr=False)

    def log(self, level: int, code: str, status: int, **more: str) -> None:
        seconds = time.perf_counter() - self.started
        if _METRICS:
            _METRICS.count_request(self.action if self.known_action else "unknown", code, seconds)
        facts: dict[str, Any] = {
            "request_id": self.request_id,
            "action": self.action,
            "access_key_id": self.access_key_id,
            "code": code,
            "http_status": status,
            "milliseconds": round(seconds * 1000, 3),
            **more,
        }
        _log.log(level, "request", extra=facts)


class _Pages(ABC):
    """A WSGI application of pages by path. Answers every error in the API's form."""

    _pages: Mapping[str, Callable[[str], Answer]]

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request."""
        # Under another server a header field may have moved a part of the path to SCRIPT_NAME.
        path = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
        # The connection's own: header fields such as X-Forwarded-For are what a client says.
        client = environ.get("REMOTE_ADDR") or None
        exchange = _Exchange(environ.get("HTTP_HOST", "")[:255], path, client)
        return self._respond(environ, exchange)(environ, start_response)

    def _respond(self, environ: WSGIEnvironment, exchange: _Exchange) -> Answer:
        try:
            page = self._pages.get(exchange.path)
            if page is None:
                return self._call(environ, exchange)
            _require_method(environ, "GET", "HEAD")
            return page(exchange.request_id)
        except HsmwrapError as error:
            _forget_variables(error)
            return _failed(error, exchange)
        except Exception as error:  # noqa: BLE001 (any other failure is InternalFailure to the client)
            _forget_variables(error)
            unexpected = HsmwrapError("unexpected exception")
            unexpected.__cause__ = error
            return _failed(unexpected, exchange)

    @abstractmethod
    def _call(self, environ: WSGIEnvironment, exchange: _Exchange, /) -> Answer:
        """Answer what is not one of the pages."""


class MetricsApp(_Pages):
    """The WSGI application of ``/metrics``, for an address that clients do not reach."""

    def __init__(self, collect: Callable[[], bytes]) -> None:
        """Take what returns the metrics in Prometheus' text format."""
        self._collect = collect
        self._pages = {"/metrics": self._metrics}

    def _call(self, _environ: WSGIEnvironment, _exchange: _Exchange, /) -> Answer:
        raise PageNotFound("nothing else is served here")

    def _metrics(self, _request_id: str) -> Answer:
        text = self._collect()
        return answer.plain(200, _METRICS.CONTENT_TYPE if _METRICS else "text/plain", text)


class App(_Pages):
    """The WSGI application of the API, made by :func:`create_app`.

    Attributes:
        max_body: Longest accepted request body in bytes.
        limits: Limits of connections, where the server keeps them.
        metrics_app: The application of ``/metrics``.
        tls: Certificate and key, where the server has them from here.
        draining: True: ``/readyz`` says not ready, for the server is about to stop.
    """

    def __init__(
        self,
        kms: KmsPort,
        access_keys: AccessKeys,
        nonces: NonceStore,
        *,
        clock: Callable[[], datetime],
        max_body: int,
        limits: Limits,
        collect: Callable[[], bytes],
        tls: Tls | None,
    ) -> None:
        self.metrics_app = MetricsApp(collect)
        self.tls = tls
        self.draining = False
        self.limits = limits
        self._kms = kms
        self._access_keys = access_keys
        self._nonces = nonces
        self._clock = clock
        self.max_body = max_body
        self._refusals = RefusalAudit(kms, clock)
        self._pages = {"/healthz": self._healthz, "/readyz": self._readyz}

    # --- the API

    def _call(self, environ: WSGIEnvironment, exchange: _Exchange) -> Answer:
        if exchange.path != "/":
            raise PathNotFound("only / is served")
        _require_method(environ, "GET", "POST")
        message = read_message(environ, self.max_body)
        exchange.given = message.own_parameters
        exchange.format_ = _FORMATS.get(message.parameters.get("Format", "").lower(), "JSON")
        claim = _read_claim(message, exchange)
        caller = self._authenticate(claim, exchange)
        self._require_served(claim, message, caller, exchange)
        fields = self._execute(claim.action, message, caller, exchange)
        exchange.log(logging.INFO, "OK", 200)
        return answer.success(fields, exchange.request_id, exchange.format_)

    def _authenticate(self, claim: Claim, exchange: _Exchange) -> Caller:
        key = identify(claim, self._access_keys, self._clock())
        caller = key.caller(exchange.client)
        try:
            verify(claim, key, self._nonces)
        except HsmwrapError as error:
            self._refusals.record(exchange.action, caller, exchange.request_id, error.code)
            raise
        return caller

    def _require_served(
        self, claim: Claim, message: RpcMessage, caller: Caller, exchange: _Exchange
    ) -> None:
        """Refuse an authentic request that is not served; audit it, since the KMS never sees it."""
        try:
            _require_common(claim, message)
        except HsmwrapError as error:
            self._kms.record_refusal(exchange.action, caller, exchange.request_id, error.code)
            raise

    def _execute(
        self, action: str, message: RpcMessage, caller: Caller, exchange: _Exchange
    ) -> dict[str, Any]:
        exchange.known_action = True
        try:
            return self._kms.execute(action, message.own_parameters, caller, exchange.request_id)
        except InvalidAction:
            exchange.known_action = False
            raise

    # --- the monitoring pages

    def _healthz(self, _request_id: str) -> Answer:
        return answer.page({"Status": "alive"}, 200)

    def _readyz(self, request_id: str) -> Answer:
        health = self._kms.health()
        if health.ready and not self.draining:
            return answer.page({"Status": "ready"}, 200)
        parts = {**health.facts, "server": "is about to stop" if self.draining else "goes on"}
        _log.warning("not ready", extra={"request_id": request_id, "parts": parts})
        return answer.page({"Status": "not ready", "RequestId": request_id}, 503)


def _render(
    backends: Iterable[Backend] = (),
    pools: Iterable[KeyPool] = (),
    kms: Callable[[], Mapping[str, Any]] = dict,
) -> bytes:
    """All metrics: of requests, and of these backends, key-pair pools and KMS.

    Raises:
        MetricsUnavailable: prometheus_client is not installed.
    """
    if not _METRICS:
        raise MetricsUnavailable("prometheus_client is not installed")
    text: bytes = _METRICS.render(_METRICS.FactsCollector(backends, pools, kms))
    return text


def create_app(
    kms: KmsPort,
    access_keys: AccessKeys,
    nonces: NonceStore,
    *,
    clock: Callable[[], datetime] = _utc_now,
    max_body: int = MAX_BODY,
    limits: Limits = _LIMITS,
    collect: Callable[[], bytes] = _render,
    tls: Tls | None = None,
) -> App:
    """Make the application for a KMS.

    Args:
        kms: Runs the operations.
        access_keys: The access keys that may sign requests.
        nonces: Used nonces, shared by all processes that serve these access keys.
        clock: Returns the current aware time.
        max_body: Longest accepted request body in bytes.
        limits: Limits of connections, for :class:`hsmwrap.http.worker.KmsWorker`.
        collect: Returns the metrics in Prometheus' text format.
        tls: Certificate and key, for :class:`hsmwrap.http.worker.KmsWorker`.
    """
    return App(
        kms,
        access_keys,
        nonces,
        clock=clock,
        max_body=max_body,
        limits=limits,
        collect=collect,
        tls=tls,
    )


def from_config(config: ServerConfig, tls: Tls | None) -> App:
    """Open the configured KMS, and serve it; it is closed when the process exits.

    ``tls`` are the certificate and key of the configuration.

    Raises:
        ConfigurationError: The configuration is wrong; the text says what to change.
    """
    # Only a real server needs these imports.
    from hsmwrap.kms.opening import open_kms  # noqa: PLC0415
    from hsmwrap.kms.sweeper import Sweeper  # noqa: PLC0415

    logs.configure()
    kms = open_kms(config, observer=_METRICS.PrometheusObserver() if _METRICS else None)
    atexit.register(kms.close)
    if _METRICS:
        facts = _METRICS.FactsCollector(*kms.watched(), kms.gauges)
        publisher = Sweeper(lambda: _METRICS.publish(facts), _METRICS.PUBLISH_SECONDS)
        atexit.register(publisher.stop)
        atexit.register(_METRICS.publish, facts)
    return create_app(
        kms,
        kms.access_keys,
        kms.nonces,
        max_body=config.limits.max_request_bytes,
        limits=Limits(config.limits.max_connections, config.limits.max_connections_per_address),
        collect=lambda: _render(*kms.watched(), kms.gauges),
        tls=tls,
    )


def from_environment() -> App:
    """The application for gunicorn's own command line; ``HSMWRAP_CONFIG`` names the configuration.

    ``gunicorn -k hsmwrap.http.worker.KmsWorker 'hsmwrap.http.app:from_environment()'``. Other WSGI
    servers and workers run it too, with their own deadlines, limits and log texts. Leave access
    logs off: they have request lines, and SDKs send plaintext in them.
    """
    # Only a real server needs these imports.
    from hsmwrap.kms.checking import check  # noqa: PLC0415
    from hsmwrap.kms.config import load_config  # noqa: PLC0415

    path = os.environ.get("HSMWRAP_CONFIG")
    config = load_config(Path(path) if path else None)
    check(config)
    return from_config(config, open_tls(config))


def _require_method(environ: WSGIEnvironment, *methods: str) -> None:
    if environ["REQUEST_METHOD"] not in methods:
        raise MethodNotAllowed(f"only {' and '.join(methods)} are served here")


def _read_claim(message: RpcMessage, exchange: _Exchange) -> Claim:
    if not (message.parameters.get("Action") or message.headers.get("x-acs-action")):
        raise MissingParameter("Action")
    claim = read_claim(message)
    # Not verified yet: written down only as far as it looks like an identifier.
    exchange.action = claim.action and loggable(claim.action, MAX_ID_LENGTH)
    exchange.access_key_id = claim.access_key_id and loggable(claim.access_key_id, MAX_ID_LENGTH)
    return claim


def _require_common(claim: Claim, message: RpcMessage) -> None:
    if not claim.action:
        raise MissingParameter("Action")
    if not claim.version:
        raise MissingParameter("Version")
    if claim.version != API_VERSION:
        raise InvalidParameter("Version", f"only {API_VERSION} is served")
    if message.parameters.get("Format", "json").lower() not in _FORMATS:
        raise InvalidParameter("Format", "has to be JSON or XML")


def _forget_variables(error: BaseException) -> None:
    """Clear the variables of all frames that the error passed, and keep the places.

    They hold parameters and plaintext, for whatever records the variables of tracebacks.
    """
    if error.__traceback__ is not None:
        error.__traceback__ = error.__traceback__.tb_next  # the caller's, which goes on
    known: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is not None and each not in known:
            known.append(each)
            traceback.clear_frames(each.__traceback__)
            waiting += [each.__cause__, each.__context__]


def _failed(error: HsmwrapError, exchange: _Exchange) -> Answer:
    broken = error.http_status >= 500 and not error.retryable  # noqa: PLR2004 (5xx: server error)
    # Texts of hsmwrap's own errors hold no secrets; texts of other exceptions are never logged.
    more = {"detail": str(error)} | (logs.describe(error) if broken else {})
    exchange.log(logging.ERROR if broken else logging.INFO, error.code, error.http_status, **more)
    advice = recommend(error, exchange.action, exchange.given)
    return answer.failure(error, exchange.request_id, exchange.host, exchange.format_, advice)
