"""The figures of a run as metrics: one table for every monitoring system. PURE.

Each is computed from the summary that progress and summary.json show, so all of them agree. Names and units are
OpenTelemetry's; `prometheus_name` translates them as a collector would, so a metric has one name whichever way it came.
"""

from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from decimal import Decimal
from typing import Literal

import msgspec

from batchrun import __version__
from batchrun.records import Status
from batchrun.report.cost_lines import known_cost
from batchrun.run_summary import BudgetUse, Summary, TotalsLine
from batchrun.store.totals import LOST, SEVERAL

MOST_MODELS = 20
"""Models that have a label value of their own, the first that were used; a column of models must not flood a server."""

OTHER = "(other)"

STATES = ("checking", "running", "writing", "complete", "stopped", "failed")
CIRCUIT = {"open": "sending", "cooling": "cooling", "probing": "probing", "stopped": "stopped"}
"""Label values for the circuit's phases: an open circuit sends here, and elsewhere it is one that does not."""

Kind = Literal["gauge", "counter"]
Value = int | float | Decimal
Labels = dict[str, str]


class Snapshot(msgspec.Struct, frozen=True):
    """A run at one moment. `last_success_at`: when a run of the job last ended with exit code 0.

    `shard` is such as `3/16`; None: the run has the whole input.
    """

    summary: Summary
    directory: str
    last_success_at: datetime | None = None
    shard: str | None = None

    def labels(self, prefix: str = "") -> Labels:
        """What every sample has."""
        job = {f"{prefix}job": self.summary.job}
        return job if self.shard is None else {**job, f"{prefix}shard": self.shard}


Samples = Iterable[tuple[Labels, Value | None]]


class Metric(msgspec.Struct, frozen=True):
    """A metric. A counter never falls within a run. A sample without a value (None) is left out.

    `unit` is in UCUM: words in braces are no unit, `1` is a share.
    """

    name: str
    kind: Kind
    unit: str
    help: str
    samples: Callable[[Snapshot], Samples]

    @property
    def prometheus_name(self) -> str:
        """The name by the rules with which OpenTelemetry's metrics become Prometheus's."""
        name = self.name.replace(".", "_")
        if self.unit == "s":
            name += "_seconds"
        elif self.unit.endswith("/s"):
            name += "_per_second"
        elif self.unit == "1":
            name += "_ratio"
        return name + ("_total" if self.kind == "counter" else "")

    def present(self, snapshot: Snapshot) -> Iterator[tuple[Labels, Value]]:
        """The samples that have a value."""
        for labels, value in self.samples(snapshot):
            if value is not None:
                yield labels, value


def _one(value: Callable[[Summary], Value | None]) -> Callable[[Snapshot], Samples]:
    return lambda snapshot: [({}, value(snapshot.summary))]


def _at(moment: Callable[[Summary], datetime | None]) -> Callable[[Snapshot], Samples]:
    return _one(lambda summary: _seconds(moment(summary)))


def _seconds(moment: datetime | None) -> float | None:
    return None if moment is None else moment.timestamp()


def _one_of(label: str, values: Iterable[str], now: Callable[[Summary], str | None]) -> Callable[[Snapshot], Samples]:
    """1 for the value that holds now and 0 for the others; nothing where none does."""

    def samples(snapshot: Snapshot) -> Samples:
        held = now(snapshot.summary)
        return [] if held is None else [({label: value}, int(value == held)) for value in values]

    return samples


def _by_model(summary: Summary) -> dict[str, list[TotalsLine]]:
    """The lines of each model; those of all models beyond the first are one."""
    lines: dict[str, list[TotalsLine]] = {}
    for line in summary.totals:
        if line.status == LOST and line.model == SEVERAL:
            continue
        name = line.model if line.model in lines or len(lines) < MOST_MODELS else OTHER
        lines.setdefault(name, []).append(line)
    return lines


def _per_model(value: Callable[[list[TotalsLine]], Value | None]) -> Callable[[Snapshot], Samples]:
    return lambda snapshot: [({"model": model}, value(lines)) for model, lines in _by_model(snapshot.summary).items()]


def _requests(lines: list[TotalsLine]) -> int:
    # a lost attempt's model is a guess that may change, and a counter must not fall
    return _sum((line for line in lines if line.status != LOST), "attempts")


def _sum_per_model(field: str) -> Callable[[Snapshot], Samples]:
    return _per_model(lambda lines: _sum(lines, field))


def _sum(lines: Iterable[TotalsLine], field: str) -> int:
    return sum(int(getattr(line, field)) for line in lines)


def _rows(snapshot: Snapshot) -> Iterator[tuple[Labels, Value]]:
    for model, lines in _by_model(snapshot.summary).items():
        for status in Status:
            yield {"model": model, "status": str(status)}, _sum((x for x in lines if x.status == status), "rows")


def _tokens(snapshot: Snapshot) -> Iterator[tuple[Labels, Value]]:
    for model, lines in _by_model(snapshot.summary).items():
        for kind in ("prompt", "completion"):
            yield {"model": model, "kind": kind}, _sum(lines, f"{kind}_tokens")


def _cost(lines: list[TotalsLine]) -> Decimal | None:
    cost_usd = sum((line.cost_usd for line in lines), Decimal(0))
    return known_cost(cost_usd, _sum(lines, "unpriced") + _sum(lines, "without_usage"))


def _info(snapshot: Snapshot) -> Samples:
    return [({"run_id": snapshot.summary.run_id, "directory": snapshot.directory, "version": __version__}, 1)]


def _last_success(snapshot: Snapshot) -> Samples:
    return [({}, _seconds(snapshot.last_success_at))]


def _request_limit(summary: Summary) -> float | None:
    """The lower of the limits on requests, a second."""
    limits = summary.limits
    if limits is None:
        return None
    per_minute = limits.requests_per_minute
    known = (limits.requests_per_second, None if per_minute is None else per_minute / 60)
    return min((limit for limit in known if limit is not None), default=None)


def _token_limit(summary: Summary) -> float | None:
    limits = summary.limits
    return None if limits is None or limits.tokens_per_minute is None else limits.tokens_per_minute / 60


def _caps(value: Callable[[BudgetUse], Decimal]) -> Callable[[Snapshot], Samples]:
    """A value of each cap on money. The whole run's cap is not in `Summary.budgets`."""

    def samples(snapshot: Snapshot) -> Samples:
        summary = snapshot.summary
        caps = list(summary.budgets)
        if summary.limits is not None and (cap := summary.limits.max_cost_usd) is not None:
            used = summary.cost_usd, summary.possibly_billed_usd
            caps.append(BudgetUse(summary.job, "max_cost_usd", "run", cap, *used, None))
        return [({"budget": use.setting}, value(use)) for use in caps]

    return samples


def _live(field: str) -> Callable[[Snapshot], Samples]:
    return _one(lambda summary: None if summary.live is None else getattr(summary.live, field))


METRICS: tuple[Metric, ...] = (
    # ── the run ──
    Metric("batchrun.run_info", "gauge", "", "Always 1; its labels name the run.", _info),
    Metric(
        "batchrun.run_state",
        "gauge",
        "",
        "1 for the state of the last start, 0 for the other states.",
        _one_of("state", STATES, lambda summary: summary.state),
    ),
    Metric(
        "batchrun.exit_code",
        "gauge",
        "",
        "Exit code of the last start; absent while it is at work.",
        _one(lambda summary: summary.exit_code),
    ),
    Metric(
        "batchrun.start_timestamp", "gauge", "s", "When the last start began.", _at(lambda summary: summary.started_at)
    ),
    Metric(
        "batchrun.update_timestamp",
        "gauge",
        "s",
        "When these figures were made: the heartbeat of a start at work.",
        _at(lambda summary: summary.updated_at),
    ),
    Metric(
        "batchrun.end_timestamp",
        "gauge",
        "s",
        "When the last start ended; absent while it is at work.",
        _at(lambda summary: None if summary.exit_code is None else summary.updated_at),
    ),
    Metric(
        "batchrun.last_success_timestamp",
        "gauge",
        "s",
        "When a run of the job last ended with exit code 0; absent if none has.",
        _last_success,
    ),
    Metric(
        "batchrun.last_answer_timestamp",
        "gauge",
        "s",
        "When the endpoint last gave a usable answer.",
        _at(lambda summary: summary.last_answer_at),
    ),
    Metric(
        "batchrun.deadline_timestamp",
        "gauge",
        "s",
        "The deadline of the last start.",
        _at(lambda summary: summary.deadline),
    ),
    Metric(
        "batchrun.expected_end_timestamp",
        "gauge",
        "s",
        "When every row will be settled, at the present pace.",
        _at(lambda summary: summary.eta),
    ),
    # ── rows ──
    Metric("batchrun.rows", "gauge", "{row}", "Rows of the run that have ended, by their status.", _rows),
    Metric("batchrun.input_rows", "gauge", "{row}", "Rows of the input.", _one(lambda summary: summary.rows)),
    Metric(
        "batchrun.pending_rows", "gauge", "{row}", "Rows without an outcome.", _one(lambda summary: summary.pending)
    ),
    Metric(
        "batchrun.retrying_rows",
        "gauge",
        "{row}",
        "Pending rows that failed and wait for a retry.",
        _one(lambda summary: 0 if summary.retrying is None else summary.retrying.rows),
    ),
    Metric(
        "batchrun.rejected_rows",
        "gauge",
        "{row}",
        "Records of the input that were set aside as invalid.",
        _one(lambda summary: summary.rejected),
    ),
    Metric(
        "batchrun.reused_rows",
        "gauge",
        "{row}",
        "Rows that took an answer without a request.",
        _one(lambda summary: summary.reused),
    ),
    Metric(
        "batchrun.rows_by_deadline",
        "gauge",
        "1",
        "The share of all rows that will be settled by the deadline.",
        _one(lambda summary: summary.by_deadline),
    ),
    # ── what it used ──
    Metric(
        "batchrun.requests",
        "counter",
        "{request}",
        "Requests of the run that ended, retries included.",
        _per_model(_requests),
    ),
    Metric(
        "batchrun.lost_requests",
        "counter",
        "{request}",
        "Requests whose end is unknown: a process was killed, or stopped at once.",
        _one(lambda summary: _sum((line for line in summary.totals if line.status == LOST), "attempts")),
    ),
    Metric("batchrun.tokens", "counter", "{token}", "Tokens used by the run, of prompts and of completions.", _tokens),
    Metric(
        "batchrun.cached_tokens",
        "counter",
        "{token}",
        "The part of the prompt tokens that came from the provider's cache.",
        _sum_per_model("cached_tokens"),
    ),
    Metric(
        "batchrun.cache_write_tokens",
        "counter",
        "{token}",
        "The part of the prompt tokens that was written to the provider's cache.",
        _sum_per_model("cache_write_tokens"),
    ),
    Metric(
        "batchrun.reasoning_tokens",
        "counter",
        "{token}",
        "Reasoning tokens; most vendors count them as completion tokens, too.",
        _sum_per_model("reasoning_tokens"),
    ),
    Metric(
        "batchrun.cost_dollars",
        "counter",
        "{USD}",
        "The certain cost of the run; absent where no price is known.",
        _per_model(_cost),
    ),
    Metric(
        "batchrun.wasted_cost_dollars",
        "gauge",
        "{USD}",
        "The part of the cost for answers that are not in the output.",
        _one(lambda summary: summary.wasted_usd),
    ),
    Metric(
        "batchrun.possibly_billed_requests",
        "counter",
        "{request}",
        "Requests without a known outcome, which may have been billed.",
        _one(lambda summary: summary.possibly_billed_count),
    ),
    Metric(
        "batchrun.possibly_billed_dollars",
        "counter",
        "{USD}",
        "The most that these can have cost, beyond the certain cost.",
        _one(lambda summary: summary.possibly_billed_usd),
    ),
    Metric(
        "batchrun.unpriced_requests",
        "counter",
        "{request}",
        "Requests whose price is unknown; they are in no cost.",
        _one(lambda summary: summary.unpriced),
    ),
    Metric(
        "batchrun.unmetered_requests",
        "counter",
        "{request}",
        "Answers that stated no usage; they are in no tokens and no cost.",
        _one(lambda summary: summary.without_usage),
    ),
    # ── now ──
    Metric(
        "batchrun.request_rate",
        "gauge",
        "{request}/s",
        "Requests sent, over the last half minute.",
        _live("requests_per_second"),
    ),
    Metric(
        "batchrun.request_rate_limit",
        "gauge",
        "{request}/s",
        "The limit on requests that applies now; absent without one.",
        _one(_request_limit),
    ),
    Metric(
        "batchrun.token_rate",
        "gauge",
        "{token}/s",
        "Tokens used, over the last half minute.",
        _one(lambda summary: None if summary.live is None else summary.tokens_per_second),
    ),
    Metric(
        "batchrun.token_rate_limit",
        "gauge",
        "{token}/s",
        "The limit on tokens that applies now; absent without one.",
        _one(_token_limit),
    ),
    Metric("batchrun.in_flight_requests", "gauge", "{request}", "Requests in flight.", _live("in_flight")),
    Metric(
        "batchrun.in_flight_requests_limit",
        "gauge",
        "{request}",
        "How many requests may be in flight now.",
        _live("allowed_in_flight"),
    ),
    Metric(
        "batchrun.refused_requests",
        "counter",
        "{request}",
        "Requests of this start that a rate limit or an overload refused.",
        _live("refused"),
    ),
    Metric(
        "batchrun.refused",
        "gauge",
        "1",
        "The refused share of requests, over the last half minute.",
        _live("refused_share"),
    ),
    Metric(
        "batchrun.circuit_state",
        "gauge",
        "",
        "1 for the state of the endpoint as the run sees it: sending, cooling, probing or stopped.",
        _one_of(
            "state", CIRCUIT.values(), lambda summary: None if summary.live is None else CIRCUIT[summary.live.circuit]
        ),
    ),
    Metric(
        "batchrun.budget_dollars",
        "gauge",
        "{USD}",
        "The cap on cost, by its setting in [budget].",
        _caps(lambda use: use.cap_usd),
    ),
    Metric(
        "batchrun.budget_used_dollars",
        "gauge",
        "{USD}",
        "What is used of the cap, with what may have been billed.",
        _caps(lambda use: use.spent_usd + use.in_doubt_usd),
    ),
)
