"""Computes the samples of the metrics from a run's summary, which progress and summary.json show, too. PURE."""

from collections.abc import Iterator, Mapping
from datetime import datetime
from decimal import Decimal

import msgspec

from batchrun import __version__
from batchrun.records import Status
from batchrun.report.cost_lines import bound_usd, known_cost, unbounded
from batchrun.run_summary import BudgetUse, Summary, TotalsLine, stated
from batchrun.store.totals import LOST, SEVERAL

STATES = ("checking", "running", "writing", "complete", "stopped", "failed")
CIRCUIT = {"open": "sending", "cooling": "cooling", "probing": "probing", "stopped": "stopped"}
"""Label values for the circuit's phases: an open circuit sends here, and elsewhere it is one that does not."""

MOST_MODELS = 20
"""Models that get their own label value, the first that were used; a column of models must not flood a server."""

OTHER = "(other)"

Value = int | float | Decimal
Labels = dict[str, str]
Samples = Mapping[str, list[tuple[Labels, Value]]]
"""The samples of each metric, by its name."""


class Snapshot(msgspec.Struct, frozen=True):
    """A run at one moment. `last_success_at`: when a run of the job last ended with exit code 0.

    `shard` is such as `3/16`; None: the run has the whole input.
    """

    summary: Summary
    directory: str
    last_success_at: datetime | None = None
    shard: str | None = None

    def labels(self, prefix: str = "") -> Labels:
        """The labels that every sample has."""
        job = {f"{prefix}job": self.summary.job}
        return job if self.shard is None else {**job, f"{prefix}shard": self.shard}


def samples_of(snapshot: Snapshot) -> Samples:
    """The known value of each metric; an unknown figure has no sample."""
    summary, limits, live = snapshot.summary, snapshot.summary.limits, snapshot.summary.live
    per_minute = None if limits is None else limits.requests_per_minute
    request_limits = (None if limits is None else limits.requests_per_second, per_minute and per_minute / 60)
    tokens_per_minute = None if limits is None else limits.tokens_per_minute
    single: dict[str, Value | datetime | None] = {
        "exit_code": summary.exit_code,
        "start_timestamp": summary.started_at,
        "update_timestamp": summary.updated_at,
        "end_timestamp": None if summary.exit_code is None else summary.updated_at,
        "last_success_timestamp": snapshot.last_success_at,
        "last_answer_timestamp": summary.last_answer_at,
        "deadline_timestamp": summary.deadline,
        "expected_end_timestamp": summary.eta,
        "input_rows": summary.rows,
        "pending_rows": summary.pending,
        "retrying_rows": 0 if summary.retrying is None else summary.retrying.rows,
        "rejected_rows": summary.rejected,
        "reused_rows": summary.reused,
        "rows_by_deadline": summary.by_deadline,
        "lost_requests": sum(line.attempts for line in summary.totals if line.status == LOST),
        "wasted_cost_dollars": summary.wasted_usd,
        "possibly_billed_requests": summary.possibly_billed_count,
        "possibly_billed_dollars": bound_usd(summary),
        "possibly_billed_unpriced_requests": unbounded(summary),
        "unpriced_requests": summary.unpriced,
        "unmetered_requests": summary.without_usage,
        "request_rate_limit": min((limit for limit in request_limits if limit is not None), default=None),
        "token_rate_limit": None if tokens_per_minute is None else tokens_per_minute / 60,
    }
    if live is not None:  # between two starts these have no value
        single |= {
            "request_rate": live.requests_per_second,
            "token_rate": summary.tokens_per_second,
            "in_flight_requests": live.in_flight,
            "in_flight_requests_limit": live.allowed_in_flight,
            "refused_requests": live.refused,
            "refused": live.refused_share,
        }
    run = {"run_id": summary.run_id, "directory": snapshot.directory, "version": __version__}
    found: dict[str, list[tuple[Labels, Value]]] = {
        "run_info": [(run, 1)],
        "run_state": [({"state": state}, int(summary.state == state)) for state in STATES],
    }
    for name, value in single.items():
        if value is not None:
            found[name] = [({}, value.timestamp() if isinstance(value, datetime) else value)]
    if live is not None:
        phase = CIRCUIT[live.circuit]
        found["circuit_state"] = [({"state": each}, int(each == phase)) for each in CIRCUIT.values()]
    caps = list(summary.budgets)
    if limits is not None and (cap := limits.max_cost_usd) is not None:  # the whole run's is not among the budgets
        caps.append(
            BudgetUse(summary.job, "max_cost_usd", "run", cap, summary.cost_usd, summary.possibly_billed_usd, None)
        )
    for use in caps:
        label = {"budget": use.setting}
        found.setdefault("budget_dollars", []).append((label, use.cap_usd))
        found.setdefault("budget_used_dollars", []).append((label, use.spent_usd + use.in_doubt_usd))
    by_model: dict[str, list[TotalsLine]] = {}  # the lines of all models beyond the first are one
    for line in summary.totals:
        if line.status != LOST or line.model != SEVERAL:
            name = line.model if line.model in by_model or len(by_model) < MOST_MODELS else OTHER
            by_model.setdefault(name, []).append(line)
    for model, lines in by_model.items():
        for name, labels, value in _of_model(lines, unbounded(summary)):
            found.setdefault(name, []).append(({"model": model, **labels}, value))
    return {f"batchrun.{name}": samples for name, samples in found.items()}


def _of_model(lines: list[TotalsLine], doubts: int) -> Iterator[tuple[str, Labels, Value]]:
    """Name, labels and value of each sample that there is for every model. `doubts`: requests of the run that may have
    been billed, at an unknown price, whatever their model.
    """
    for status in Status:
        yield "rows", {"status": str(status)}, sum(line.rows for line in lines if line.status == status)
    # a lost attempt's model is a guess that may change, and a counter must not fall
    yield "requests", {}, sum(line.attempts for line in lines if line.status != LOST)
    yield "tokens", {"kind": "prompt"}, sum(line.prompt_tokens for line in lines)
    yield "tokens", {"kind": "completion"}, sum(line.completion_tokens for line in lines)
    for name in ("cached_tokens", "cache_write_tokens", "reasoning_tokens"):
        if (count := stated(lines, name)) is not None:
            yield name, {}, count
    cost_usd = sum((line.cost_usd for line in lines), Decimal(0))
    unknown = sum(line.unpriced + line.without_usage for line in lines)
    if not any(line.total_tokens for line in lines):  # no answer: its requests may be the ones in doubt
        unknown += doubts
    if (known := known_cost(cost_usd, unknown)) is not None:
        yield "cost_dollars", {}, known
