"""Trace hooks: what a backend was asked, how it ended and how long it took.

``observed(backend, observer)`` is the same backend with each call observed. An observer is any
callable that takes an :class:`Operation`: a metrics exporter
(:class:`hsmwrap.metrics.PrometheusObserver`), a tracer's span, a line in a log. It is told no
secret and changes nothing: what it raises is logged once and otherwise ignored.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from hsmwrap.backend import Backend, Capabilities, KeyRef
from hsmwrap.catalog import KeySpec, WrappingAlgorithm, WrappingKeySpec
from hsmwrap.composition import Composition, Declared

_P = ParamSpec("_P")
_T = TypeVar("_T")

OK = "ok"
"""The outcome of an operation that raised nothing."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of a backend that has ended.

    Attributes:
        name: The method of :class:`Backend`, or of one of its abilities.
        backend: Name of the backend.
        outcome: ``ok``, or the name of the exception's class (``InvalidKeyMaterial``).
        seconds: How long it took.
        spec: Wrapping key spec, where the call says one.
        algorithm: Wrapping algorithm, where the call says one.
        key_spec: Key spec of the imported key, where the call says one.
    """

    name: str
    backend: str
    outcome: str
    seconds: float
    spec: WrappingKeySpec | None = None
    algorithm: WrappingAlgorithm | None = None
    key_spec: KeySpec | None = None


Observer = Callable[[Operation], None]
"""Told of each operation as it ends, in the thread that made it; should not take long."""


def observed(
    backend: Backend, observer: Observer, *, timer: Callable[[], float] = time.perf_counter
) -> Backend:
    """Return ``backend`` with ``observer`` told of each call that may reach the HSM.

    ``name`` and ``health`` never do and are not told, nor is ``capabilities`` where the report is
    the one that was told last. The backend's own keys are managed through its class, as before.
    """
    return _ObservedBackend(backend, observer, timer)


class _ObservedBackend(Composition):
    """Passes every call of the contract on, unchanged, and tells how it went."""

    def __init__(self, backend: Backend, observer: Observer, timer: Callable[[], float]) -> None:
        super().__init__(backend)
        self._observer = observer
        self._timer = timer
        self._complained = False
        self._reported: Capabilities | None = None

    def __repr__(self) -> str:
        return f"<observed {self._backend!r}>"

    def _forward(
        self, asked: object, declared: Declared[_P, _T], *arguments: _P.args, **named: _P.kwargs
    ) -> _T:
        outcome, started = OK, self._timer()
        try:
            return super()._forward(asked, declared, *arguments, **named)
        except BaseException as error:
            outcome = type(error).__name__
            raise
        finally:
            seconds = self._timer() - started
            labels = _labels(*arguments, *named.values())
            self._tell(declared.__name__, outcome, seconds, labels)

    def capabilities(self) -> Capabilities:
        """The backend's report; told unless it is the very one that was told last.

        Each use of a key asks for it, and only one that was made anew has reached the HSM.
        """
        outcome, started = OK, self._timer()
        try:
            report = self._backend.capabilities()
        except BaseException as error:
            outcome = type(error).__name__
            raise
        finally:
            if outcome != OK or report is not self._reported:
                self._tell("capabilities", outcome, self._timer() - started, {})
        self._reported = report
        return report

    def _tell(self, name: str, outcome: str, seconds: float, labels: dict[str, Any]) -> None:
        try:
            self._observer(Operation(name, self.name, outcome, seconds, **labels))
        except Exception as error:  # noqa: BLE001  # an observer changes nothing, whatever it raises
            if not self._complained:
                self._complained = True
                _log.warning(
                    "observer failed; not saying so again",
                    extra={"operation": name, "error": type(error).__name__},
                )


def _labels(*values: object) -> dict[str, Any]:
    """Wrapping key spec, algorithm and key spec, where the arguments say them."""
    labels: dict[str, Any] = {}
    for value in values:
        if isinstance(value, WrappingKeySpec):
            labels["spec"] = value
        elif isinstance(value, WrappingAlgorithm):
            labels["algorithm"] = value
        elif isinstance(value, KeySpec | KeyRef):
            labels["key_spec"] = value.key_spec if isinstance(value, KeyRef) else value
    return labels
