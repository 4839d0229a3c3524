"""The figures of a run as metrics: one table for every monitoring system. PURE.

Names and units are OpenTelemetry's; `prometheus_name` translates them as a collector would, so a metric has one name
whichever way it came. `samples.samples_of` computes their values.
"""

from typing import Literal

import msgspec

Kind = Literal["gauge", "counter"]


class Metric(msgspec.Struct, frozen=True):
    """A metric. A counter never falls within a run. `unit` is in UCUM: words in braces annotate, `1` is a share."""

    name: str
    kind: Kind
    unit: str
    help: str

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


_TABLE: tuple[tuple[str, Kind, str, str], ...] = (
    # ── the run ──
    ("run_info", "gauge", "", "Always 1; its labels name the run."),
    ("run_state", "gauge", "", "1 for the state of the last start, 0 for the other states."),
    ("exit_code", "gauge", "", "Exit code of the last start; absent while it is at work."),
    ("start_timestamp", "gauge", "s", "When the last start began."),
    ("update_timestamp", "gauge", "s", "When these figures were made: the heartbeat of a start at work."),
    ("end_timestamp", "gauge", "s", "When the last start ended; absent while it is at work."),
    ("last_success_timestamp", "gauge", "s", "When a run of the job last ended with exit code 0; absent if none has."),
    ("last_answer_timestamp", "gauge", "s", "When the endpoint last gave a usable answer."),
    ("deadline_timestamp", "gauge", "s", "The deadline of the last start."),
    ("expected_end_timestamp", "gauge", "s", "When every row will be settled, at the present pace."),
    # ── rows ──
    ("rows", "gauge", "{row}", "Rows of the run that have ended, by their status."),
    ("input_rows", "gauge", "{row}", "Rows of the input."),
    ("pending_rows", "gauge", "{row}", "Rows without an outcome."),
    ("retrying_rows", "gauge", "{row}", "Pending rows that failed and wait for a retry."),
    ("rejected_rows", "gauge", "{row}", "Records of the input that were set aside as invalid."),
    ("reused_rows", "gauge", "{row}", "Rows that took an answer without a request."),
    ("rows_by_deadline", "gauge", "1", "The share of all rows that will be settled by the deadline."),
    # ── what it used ──
    ("requests", "counter", "{request}", "Requests of the run that ended, retries included."),
    (
        "lost_requests",
        "counter",
        "{request}",
        "Requests whose end is unknown: a process was killed, or stopped at once.",
    ),
    ("tokens", "counter", "{token}", "Tokens used by the run, of prompts and of completions."),
    ("cached_tokens", "counter", "{token}", "The part of the prompt tokens that came from the provider's cache."),
    (
        "cache_write_tokens",
        "counter",
        "{token}",
        "The part of the prompt tokens that was written to the provider's cache.",
    ),
    ("reasoning_tokens", "counter", "{token}", "Reasoning tokens; most vendors count them as completion tokens, too."),
    ("cost_dollars", "counter", "{USD}", "The certain cost of the run; absent where no price is known."),
    ("wasted_cost_dollars", "gauge", "{USD}", "The part of the cost for answers that are not in the output."),
    (
        "possibly_billed_requests",
        "counter",
        "{request}",
        "Requests without a known outcome, which may have been billed.",
    ),
    (
        "possibly_billed_dollars",
        "counter",
        "{USD}",
        "The most that these can have cost, beyond the certain cost; absent where no price is known.",
    ),
    (
        "possibly_billed_unpriced_requests",
        "gauge",
        "{request}",
        "Those of them whose price is unknown, of the first 1,000; they are in no cost and no bound.",
    ),
    ("unpriced_requests", "counter", "{request}", "Requests whose price is unknown; they are in no cost."),
    ("unmetered_requests", "counter", "{request}", "Answers that stated no usage; they are in no tokens and no cost."),
    # ── now ──
    ("request_rate", "gauge", "{request}/s", "Requests sent, over the last half minute."),
    ("request_rate_limit", "gauge", "{request}/s", "The limit on requests that applies now; absent without one."),
    ("token_rate", "gauge", "{token}/s", "Tokens used, over the last half minute."),
    ("token_rate_limit", "gauge", "{token}/s", "The limit on tokens that applies now; absent without one."),
    ("in_flight_requests", "gauge", "{request}", "Requests in flight."),
    ("in_flight_requests_limit", "gauge", "{request}", "How many requests may be in flight now."),
    ("refused_requests", "counter", "{request}", "Requests of this start that a rate limit or an overload refused."),
    ("refused", "gauge", "1", "The refused share of requests, over the last half minute."),
    (
        "circuit_state",
        "gauge",
        "",
        "1 for the state of the endpoint as the run sees it: sending, cooling, probing or stopped.",
    ),
    ("budget_dollars", "gauge", "{USD}", "The cap on cost, by its setting in [budget]."),
    ("budget_used_dollars", "gauge", "{USD}", "What is used of the cap, with what may have been billed."),
)

METRICS = tuple(Metric(f"batchrun.{name}", kind, unit, text) for name, kind, unit, text in _TABLE)
