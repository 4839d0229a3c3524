"""The figures of a run as metrics: one table for every monitoring system. PURE.

Each is computed from the summary that progress and summary.json show, so all of them agree. Names and units are
OpenTelemetry's; `prometheus_name` translates them as a collector would, so a metric has one name whichever way it came.
"""

from collections.abc import Callable, Iterator
from typing import Literal

import msgspec

from batchrun.store.totals import LOST
from batchrun.telemetry import samples
from batchrun.telemetry.samples import Labels, Samples, Snapshot, Value

STATES = ("checking", "running", "writing", "complete", "stopped", "failed")
CIRCUIT = {"open": "sending", "cooling": "cooling", "probing": "probing", "stopped": "stopped"}
"""Label values for the circuit's phases: an open circuit sends here, and elsewhere it is one that does not."""

Kind = Literal["gauge", "counter"]


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


METRICS: tuple[Metric, ...] = (
    # ── the run ──
    Metric("batchrun.run_info", "gauge", "", "Always 1; its labels name the run.", samples.run_info),
    Metric(
        "batchrun.run_state",
        "gauge",
        "",
        "1 for the state of the last start, 0 for the other states.",
        samples.one_of("state", STATES, lambda summary: summary.state),
    ),
    Metric(
        "batchrun.exit_code",
        "gauge",
        "",
        "Exit code of the last start; absent while it is at work.",
        samples.of_summary(lambda summary: summary.exit_code),
    ),
    Metric(
        "batchrun.start_timestamp",
        "gauge",
        "s",
        "When the last start began.",
        samples.moment_of(lambda summary: summary.started_at),
    ),
    Metric(
        "batchrun.update_timestamp",
        "gauge",
        "s",
        "When these figures were made: the heartbeat of a start at work.",
        samples.moment_of(lambda summary: summary.updated_at),
    ),
    Metric(
        "batchrun.end_timestamp",
        "gauge",
        "s",
        "When the last start ended; absent while it is at work.",
        samples.moment_of(lambda summary: None if summary.exit_code is None else summary.updated_at),
    ),
    Metric(
        "batchrun.last_success_timestamp",
        "gauge",
        "s",
        "When a run of the job last ended with exit code 0; absent if none has.",
        samples.last_success,
    ),
    Metric(
        "batchrun.last_answer_timestamp",
        "gauge",
        "s",
        "When the endpoint last gave a usable answer.",
        samples.moment_of(lambda summary: summary.last_answer_at),
    ),
    Metric(
        "batchrun.deadline_timestamp",
        "gauge",
        "s",
        "The deadline of the last start.",
        samples.moment_of(lambda summary: summary.deadline),
    ),
    Metric(
        "batchrun.expected_end_timestamp",
        "gauge",
        "s",
        "When every row will be settled, at the present pace.",
        samples.moment_of(lambda summary: summary.eta),
    ),
    # ── rows ──
    Metric("batchrun.rows", "gauge", "{row}", "Rows of the run that have ended, by their status.", samples.rows),
    Metric(
        "batchrun.input_rows", "gauge", "{row}", "Rows of the input.", samples.of_summary(lambda summary: summary.rows)
    ),
    Metric(
        "batchrun.pending_rows",
        "gauge",
        "{row}",
        "Rows without an outcome.",
        samples.of_summary(lambda summary: summary.pending),
    ),
    Metric(
        "batchrun.retrying_rows",
        "gauge",
        "{row}",
        "Pending rows that failed and wait for a retry.",
        samples.of_summary(lambda summary: 0 if summary.retrying is None else summary.retrying.rows),
    ),
    Metric(
        "batchrun.rejected_rows",
        "gauge",
        "{row}",
        "Records of the input that were set aside as invalid.",
        samples.of_summary(lambda summary: summary.rejected),
    ),
    Metric(
        "batchrun.reused_rows",
        "gauge",
        "{row}",
        "Rows that took an answer without a request.",
        samples.of_summary(lambda summary: summary.reused),
    ),
    Metric(
        "batchrun.rows_by_deadline",
        "gauge",
        "1",
        "The share of all rows that will be settled by the deadline.",
        samples.of_summary(lambda summary: summary.by_deadline),
    ),
    # ── what it used ──
    Metric(
        "batchrun.requests",
        "counter",
        "{request}",
        "Requests of the run that ended, retries included.",
        samples.per_model(samples.requests),
    ),
    Metric(
        "batchrun.lost_requests",
        "counter",
        "{request}",
        "Requests whose end is unknown: a process was killed, or stopped at once.",
        samples.of_summary(
            lambda summary: samples.added_up((line for line in summary.totals if line.status == LOST), "attempts")
        ),
    ),
    Metric(
        "batchrun.tokens",
        "counter",
        "{token}",
        "Tokens used by the run, of prompts and of completions.",
        samples.tokens,
    ),
    Metric(
        "batchrun.cached_tokens",
        "counter",
        "{token}",
        "The part of the prompt tokens that came from the provider's cache.",
        samples.sum_per_model("cached_tokens"),
    ),
    Metric(
        "batchrun.cache_write_tokens",
        "counter",
        "{token}",
        "The part of the prompt tokens that was written to the provider's cache.",
        samples.sum_per_model("cache_write_tokens"),
    ),
    Metric(
        "batchrun.reasoning_tokens",
        "counter",
        "{token}",
        "Reasoning tokens; most vendors count them as completion tokens, too.",
        samples.sum_per_model("reasoning_tokens"),
    ),
    Metric(
        "batchrun.cost_dollars",
        "counter",
        "{USD}",
        "The certain cost of the run; absent where no price is known.",
        samples.per_model(samples.cost),
    ),
    Metric(
        "batchrun.wasted_cost_dollars",
        "gauge",
        "{USD}",
        "The part of the cost for answers that are not in the output.",
        samples.of_summary(lambda summary: summary.wasted_usd),
    ),
    Metric(
        "batchrun.possibly_billed_requests",
        "counter",
        "{request}",
        "Requests without a known outcome, which may have been billed.",
        samples.of_summary(lambda summary: summary.possibly_billed_count),
    ),
    Metric(
        "batchrun.possibly_billed_dollars",
        "counter",
        "{USD}",
        "The most that these can have cost, beyond the certain cost.",
        samples.of_summary(lambda summary: summary.possibly_billed_usd),
    ),
    Metric(
        "batchrun.unpriced_requests",
        "counter",
        "{request}",
        "Requests whose price is unknown; they are in no cost.",
        samples.of_summary(lambda summary: summary.unpriced),
    ),
    Metric(
        "batchrun.unmetered_requests",
        "counter",
        "{request}",
        "Answers that stated no usage; they are in no tokens and no cost.",
        samples.of_summary(lambda summary: summary.without_usage),
    ),
    # ── now ──
    Metric(
        "batchrun.request_rate",
        "gauge",
        "{request}/s",
        "Requests sent, over the last half minute.",
        samples.live("requests_per_second"),
    ),
    Metric(
        "batchrun.request_rate_limit",
        "gauge",
        "{request}/s",
        "The limit on requests that applies now; absent without one.",
        samples.of_summary(samples.request_limit),
    ),
    Metric(
        "batchrun.token_rate",
        "gauge",
        "{token}/s",
        "Tokens used, over the last half minute.",
        samples.of_summary(lambda summary: None if summary.live is None else summary.tokens_per_second),
    ),
    Metric(
        "batchrun.token_rate_limit",
        "gauge",
        "{token}/s",
        "The limit on tokens that applies now; absent without one.",
        samples.of_summary(samples.token_limit),
    ),
    Metric("batchrun.in_flight_requests", "gauge", "{request}", "Requests in flight.", samples.live("in_flight")),
    Metric(
        "batchrun.in_flight_requests_limit",
        "gauge",
        "{request}",
        "How many requests may be in flight now.",
        samples.live("allowed_in_flight"),
    ),
    Metric(
        "batchrun.refused_requests",
        "counter",
        "{request}",
        "Requests of this start that a rate limit or an overload refused.",
        samples.live("refused"),
    ),
    Metric(
        "batchrun.refused",
        "gauge",
        "1",
        "The refused share of requests, over the last half minute.",
        samples.live("refused_share"),
    ),
    Metric(
        "batchrun.circuit_state",
        "gauge",
        "",
        "1 for the state of the endpoint as the run sees it: sending, cooling, probing or stopped.",
        samples.one_of(
            "state", CIRCUIT.values(), lambda summary: None if summary.live is None else CIRCUIT[summary.live.circuit]
        ),
    ),
    Metric(
        "batchrun.budget_dollars",
        "gauge",
        "{USD}",
        "The cap on cost, by its setting in [budget].",
        samples.budget_caps(lambda use: use.cap_usd),
    ),
    Metric(
        "batchrun.budget_used_dollars",
        "gauge",
        "{USD}",
        "What is used of the cap, with what may have been billed.",
        samples.budget_caps(lambda use: use.spent_usd + use.in_doubt_usd),
    ),
)
