"""The results of a run as text and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks import targets
from benchmarks.audit import AuditCost
from benchmarks.latency import Latency
from benchmarks.operations import Comparison
from benchmarks.outstanding import Cost
from benchmarks.over_http import BACKEND, HTTP, KMS, Requests
from benchmarks.protection import Protection
from benchmarks.targets import Target
from benchmarks.throughput import SIDES, Rates
from benchmarks.timing import Timing
from hsmwrap.cli.tables import render

_NOTES = """\
loop: the same C_ calls (pyca, libcrypto calls) in the same order, without hsmwrap, on one session.
bare: only the main call: C_GenerateKeyPair, C_UnwrapKey, C_Decrypt, C_DeriveKey.
of loop, of bare: our speed as a fraction of theirs; the random part of the search for RSA primes
is evened out. All sides took turns in one run."""

_HTTP_NOTE = """\
hsmwrap serve over HTTP, the same calls of a KMS in the measuring process, and those of the backend
alone; calls per second, and latencies in milliseconds. CPU: processor time of the server for each
request, in milliseconds. clients': their processor time, as a fraction of the time. Imports:
RSA_2048, RSAES_OAEP_SHA_256, pairs from the pool."""

_QUIET = 0.05
"""Limit of the processor time of other processes, as a fraction."""


@dataclass(slots=True)
class Results:
    """The results of a run; parts that were not requested are empty.

    ``others`` is the processor time of other processes during the run, as a fraction.
    """

    plan: str
    machine: dict[str, str]
    comparisons: list[Comparison] = field(default_factory=list)
    protection: Protection | None = None
    rates: list[Rates] = field(default_factory=list)
    latency: Latency | None = None
    audit: AuditCost | None = None
    requests: list[Requests] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    others: float = 0.0

    @property
    def disturbed(self) -> bool:
        """Whether other processes used too much processor time to judge the targets."""
        return self.others > _QUIET

    def targets(self) -> list[Target]:
        """The targets that this run can judge."""
        return [
            *targets.of_rates(self.rates),
            *(targets.of_latency(self.latency) if self.latency else ()),
            *targets.of_imports(self.comparisons),
            *targets.of_costs(self.costs),
            *targets.of_requests(self.requests),
        ]

    def to_json(self) -> dict[str, Any]:
        """All numbers."""
        return {
            "plan": self.plan,
            "machine": self.machine,
            "others": self.others,
            "disturbed": self.disturbed,
            "operations": [each.to_json() for each in self.comparisons],
            "protection": self.protection.to_json() if self.protection else None,
            "throughput": [each.to_json() for each in self.rates],
            "latency": self.latency.to_json() if self.latency else None,
            "audit_ms": self.audit.to_json() if self.audit else None,
            "http": [each.to_json() for each in self.requests],
            "outstanding": [each.to_json() for each in self.costs],
            "targets": [each.to_json(judge=not self.disturbed) for each in self.targets()],
        }

    def text(self) -> str:
        """Tables."""
        return "\n\n".join(self._sections())

    def _sections(self) -> Iterator[str]:
        yield "\n".join(f"{name + ':':16} {value}" for name, value in self.machine.items())
        if self.disturbed:
            yield (
                f"DISTURBED: other processes used {self.others:.0%} of the processor time. "
                "The targets are not judged; run it again on an idle machine."
            )
        if self.comparisons:
            yield f"Single calls, in milliseconds (median, p99)\n\n{_comparisons(self.comparisons)}"
            yield _NOTES
        if self.protection:
            yield f"Protection read back, in milliseconds\n\n{_protection(self.protection)}"
        if self.rates:
            yield f"Threads: calls per second\n\n{_rates(self.rates)}"
        if self.latency:
            yield f"Parameters for RSA_2048, in milliseconds\n\n{_latency(self.latency)}"
        if self.audit:
            yield f"A line of the audit log, in milliseconds\n\n{_audit(self.audit)}"
        if self.requests:
            yield f"The reference KMS: {_HTTP_NOTE}\n\n{_requests(self.requests)}"
        if self.costs:
            yield f"Outstanding import tokens, in milliseconds (median)\n\n{_costs(self.costs)}"
        if judged := self.targets():
            yield f"Targets ({self.plan} run)\n\n{_targets(judged, judge=not self.disturbed)}"


def _ms(timing: Timing) -> str:
    return f"{timing.median * 1e3:.3f}"


def _ms99(timing: Timing) -> str:
    return f"{timing.p99 * 1e3:.3f}"


def _comparisons(comparisons: Iterable[Comparison]) -> str:
    headings = ("backend", "operation", "algorithm")
    numbers = ("ours", "ours p99", "loop", "loop p99", "bare", "bare p99", "of loop", "of bare")
    rows = [
        (
            each.backend,
            each.operation,
            each.row.algorithm,
            *(
                text(timing)
                for timing in (each.ours, each.loop, each.bare)
                for text in (_ms, _ms99)
            ),
            f"{each.of_loop:.2f}",
            f"{each.of_bare:.2f}",
        )
        for each in comparisons
    ]
    return render((*headings, *numbers), rows, right=numbers)


def _protection(measured: Protection) -> str:
    numbers = ("read back", "p99", "bare", "p99", "more")
    kept, bare = measured.kept, measured.bare
    more = f"{(kept.median - bare.median) * 1e3:.3f}"
    row = ("unwrap a key", _ms(kept), _ms99(kept), _ms(bare), _ms99(bare), more)
    return render(("operation", *numbers), [row], right=numbers)


def _rates(rates: Iterable[Rates]) -> str:
    numbers = ("threads", *SIDES, "of loop", "of bare")
    rows = [
        (
            each.load,
            str(each.threads),
            *(f"{each.calls(side):.1f}" for side in SIDES),
            f"{each.of('loop'):.2f}",
            f"{each.of('bare'):.2f}",
        )
        for each in rates
    ]
    return render(("operation", *numbers), rows, right=numbers)


def _latency(latency: Latency) -> str:
    numbers = ("p50", "p99", "calls")
    rows = [
        (name, _ms(timing), _ms99(timing), str(len(timing.seconds)))
        for name, timing in (
            ("cold: inline key generation", latency.cold),
            ("warm: from an idle pool", latency.idle),
            ("warm: from a busy pool", latency.busy),
        )
    ]
    return render(("issue", *numbers), rows, right=numbers)


def _audit(audit: AuditCost) -> str:
    rows = [
        (name, _ms(timing), _ms99(timing))
        for name, timing in (
            ("check and line", audit.line),
            ("the same with audit_sync", audit.synced),
            ("bare: a write of as many bytes", audit.bare),
        )
    ]
    return render(("by one thread", "p50", "p99"), rows, right=("p50", "p99"))


def _requests(requests: Iterable[Requests]) -> str:
    headings = ("operation", "database")
    numbers = ("workers", "clients", "HTTP", "p50", "p99", "p99/p50", "CPU", "clients'")
    ratios = ("KMS", "HTTP/KMS", "backend", "HTTP/backend")
    rows = [
        (
            each.operation,
            each.server.database,
            str(each.server.workers),
            str(each.threads),
            f"{each.rate(HTTP):.0f}",
            f"{each.p50(HTTP) * 1e3:.1f}",
            f"{each.p99(HTTP) * 1e3:.1f}",
            f"{each.p99(HTTP) / each.p50(HTTP):.1f}",
            f"{statistics.median(each.cpu) * 1e3:.2f}",
            f"{each.client_cpu:.0%}",
            *(
                text
                for side in (KMS, BACKEND)
                for text in (
                    (f"{each.rate(side):.0f}", f"{each.of(side):.2f}")
                    if side in each.bursts
                    else ("–", "–")
                )
            ),
        )
        for each in requests
    ]
    return render((*headings, *numbers, *ratios), rows, right=(*numbers, *ratios))


def _costs(costs: Iterable[Cost]) -> str:
    numbers = ("outstanding", "issue", "import", "raw loop", "issue/raw", "import/raw")
    rows = [
        (
            each.custody,
            f"{each.outstanding}",
            _ms(each.issue),
            _ms(each.bring_in),
            _ms(each.raw),
            f"{each.relative_issue:.2f}",
            f"{each.relative:.2f}",
        )
        for each in costs
    ]
    return render(("custody", *numbers), rows, right=numbers)


def _targets(judged: Iterable[Target], *, judge: bool) -> str:
    rows = [
        (
            ("met" if each.met else "MISSED") if judge else "?",
            each.name,
            f"{each.value:.3f}",
            f"{'>=' if each.at_least else '<='} {each.limit:.2f}",
            each.remark,
        )
        for each in judged
    ]
    return render(("", "target", "value", "limit", "remark"), rows, right=("value",))
