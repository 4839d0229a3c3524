"""A run's figures as metrics: parsed back by Prometheus's own parser, named by its rules, bounded in number."""

import re
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from batchrun.records import PossiblyBilled, Status
from batchrun.run_summary import BudgetUse, InForce, Live, Retrying, Summary, TotalsLine
from batchrun.store.totals import LOST, SEVERAL
from batchrun.telemetry.log_lines import figures
from batchrun.telemetry.metrics import METRICS
from batchrun.telemetry.prometheus import render
from batchrun.telemetry.samples import MOST_MODELS, OTHER, STATES, Snapshot, samples_of
from tests.run.test_progress import NOW, summary

Samples = dict[str, dict[tuple[str, ...], float]]


def line(model: str, status: str, **figures: Any) -> TotalsLine:
    return TotalsLine(1, model, status, "2026-11-25", **figures)


PARTS = {"cached_tokens": 64, "cache_write_tokens": 32, "reasoning_tokens": 0}

FULL = summary(
    totals=[
        line("a", "ok", rows=7, attempts=7, prompt_tokens=700, completion_tokens=70, cost_usd=Decimal("0.5")),
        line("a", "discarded", attempts=2, prompt_tokens=200, **PARTS, cost_usd=Decimal("0.1")),
        line("b", "error", rows=1, attempts=4, unpriced=1),
        line(SEVERAL, LOST, attempts=3),
    ],
    wasted_usd=Decimal("0.1"),
    possibly_billed_count=3,
    possibly_billed_usd=Decimal("0.000000000012"),
    limits=InForce(600.0, 60_000.0, 32, max_cost_usd=Decimal(25), requests_per_second=20.0),
    budgets=[BudgetUse("b", "per_day_usd", "2026-11-25", Decimal(5), Decimal(1), Decimal("0.5"), NOW)],
    live=Live(3, 8, 9.5, 4, 0.25, "cooling"),
    last_answer_at=NOW,
    deadline=NOW,
    by_deadline=0.9,
    eta=NOW,
    retrying=Retrying(2, [1, 2], 1, {}, None),
)
"""A run at work that has something of everything."""


def shown(known: Summary, **more: Any) -> Samples:
    """Every sample that Prometheus reads, by the values of its labels without the job's."""
    text = render(Snapshot(known, "/runs/x", **more)).decode()
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels.pop("job") == known.job
            samples.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return samples


def test_prometheus_reads_the_figures_of_the_summary() -> None:
    samples = shown(FULL)
    assert samples["batchrun_rows"]["a", "ok"] == 7
    assert samples["batchrun_rows"]["b", "error"] == 1
    assert samples["batchrun_rows"]["a", "error"] == 0
    assert samples["batchrun_tokens_total"] == {
        ("a", "prompt"): 900,
        ("a", "completion"): 70,
        ("b", "prompt"): 0,
        ("b", "completion"): 0,
    }
    assert samples["batchrun_cached_tokens_total"]["a",] == 64
    assert samples["batchrun_requests_total"] == {("a",): 9, ("b",): 4}
    assert samples["batchrun_lost_requests_total"] == {(): 3}
    assert samples["batchrun_possibly_billed_requests_total"] == {(): 3}
    assert samples["batchrun_possibly_billed_dollars_total"] == {(): 1.2e-11}
    assert samples["batchrun_wasted_cost_dollars"] == {(): 0.1}
    assert samples["batchrun_request_rate_per_second"] == {(): 9.5}
    assert samples["batchrun_request_rate_limit_per_second"] == {(): 10.0}, "600 a minute is less than 20 a second"
    assert samples["batchrun_token_rate_limit_per_second"] == {(): 1000.0}
    assert samples["batchrun_in_flight_requests"] == {(): 3}
    assert samples["batchrun_refused_ratio"] == {(): 0.25}
    assert [state for (state,), value in samples["batchrun_circuit_state"].items() if value] == ["cooling"]
    assert [state for (state,), value in samples["batchrun_run_state"].items() if value] == ["running"]
    assert samples["batchrun_budget_dollars"] == {("per_day_usd",): 5, ("max_cost_usd",): 25}
    assert samples["batchrun_budget_used_dollars"]["per_day_usd",] == 1.5
    assert samples["batchrun_last_answer_timestamp_seconds"] == {(): NOW.timestamp()}


def test_an_unknown_cost_is_absent_and_never_0() -> None:
    assert shown(FULL)["batchrun_cost_dollars_total"] == {("a",): 0.6}, "b has no known price"


@pytest.mark.parametrize(
    ("doubts", "known_usd", "bound", "cost"),
    [
        ((None,), "0", {}, {("a",): 0.5}),
        ((None, Decimal(1)), "1", {(): 1.0}, {("a",): 0.5}),
        ((Decimal(1),), "1", {(): 1.0}, {("a",): 0.5, ("b",): 0.0}),
    ],
)
def test_an_unpriced_doubt_leaves_the_cost_incomplete(
    doubts: tuple[Decimal | None, ...], known_usd: str, bound: dict[Any, float], cost: dict[Any, float]
) -> None:
    """Requests of b have no known end: its cost and the bound on theirs are unknown, not $0."""
    answered = line("a", "ok", rows=7, attempts=7, prompt_tokens=700, total_tokens=700, cost_usd=Decimal("0.5"))
    known = summary(
        totals=[answered, line("b", "discarded", attempts=2)],
        possibly_billed=[PossiblyBilled(0, 1, "k", usd, 100, "timeout", 1) for usd in doubts],
        possibly_billed_count=len(doubts),
        possibly_billed_usd=Decimal(known_usd),
    )
    samples = shown(known)
    assert samples["batchrun_cost_dollars_total"] == cost
    assert samples.get("batchrun_possibly_billed_dollars_total", {}) == bound
    assert samples["batchrun_possibly_billed_unpriced_requests"] == {(): doubts.count(None)}
    assert figures(known)["possibly_billed_usd"] == (Decimal(known_usd) or None)


def test_an_ended_run_has_a_code() -> None:
    """And no rates any more."""
    at_work = shown(FULL)
    assert not {"batchrun_exit_code", "batchrun_end_timestamp_seconds"} & at_work.keys()
    ended = shown(msgspec.structs.replace(FULL, state="stopped", exit_code=4, live=None), last_success_at=NOW)
    assert ended["batchrun_exit_code"] == {(): 4}
    assert ended["batchrun_end_timestamp_seconds"] == {(): NOW.timestamp()}
    assert ended["batchrun_last_success_timestamp_seconds"] == {(): NOW.timestamp()}
    assert not {"batchrun_request_rate_per_second", "batchrun_circuit_state"} & ended.keys()


@given(st.text(min_size=1, max_size=30), st.text(max_size=30))
def test_any_job_or_model_name_round_trips(job: str, model: str) -> None:
    samples = render(Snapshot(summary(job=job, totals=[line(model, "ok", rows=1)]), "/runs/x")).decode()
    assert len(re.findall(r"^batchrun_requests_total\{", samples, re.MULTILINE)) == 1, "one line a sample"
    (rows,) = [family for family in text_string_to_metric_families(samples) if family.name == "batchrun_requests"]
    as_utf8 = [text.encode("utf-8", "replace").decode() for text in (job, model)]
    assert [rows.samples[0].labels["job"], rows.samples[0].labels["model"]] == as_utf8


def test_many_models_make_a_bounded_number_of_samples() -> None:
    lines = [line(f"m{number}", "ok", rows=1, attempts=1) for number in range(500)]
    samples = shown(summary(totals=lines))
    requests = samples["batchrun_requests_total"]
    assert len(requests) == MOST_MODELS + 1
    assert requests[OTHER,] == 500 - MOST_MODELS
    assert sum(map(len, samples.values())) < 600


def test_every_figure_has_a_sample_in_some_run() -> None:
    runs = FULL, msgspec.structs.replace(FULL, exit_code=0)
    assert {name for run in runs for name in samples_of(Snapshot(run, "/runs/x", NOW))} == {
        metric.name for metric in METRICS
    }


def test_names_follow_the_rules_of_prometheus() -> None:
    names = [metric.prometheus_name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert re.fullmatch(r"batchrun(_[a-z]+)+", metric.prometheus_name)
        assert metric.prometheus_name.endswith("_total") == (metric.kind == "counter")
        assert metric.help.endswith(".")
        assert "\n" not in metric.help + metric.name
        assert "timestamp" not in metric.name or metric.prometheus_name.endswith("_timestamp_seconds")


def test_no_sample_has_a_time() -> None:
    """node_exporter skips a file with one."""
    for each in render(Snapshot(FULL, "/runs/x")).decode().splitlines():
        assert each.startswith("# ") or re.fullmatch(r'\w+\{(\w+="[^"]*",?)+\} [\d.e+-]+', each)


def test_every_state_and_status_is_a_label_value() -> None:
    samples = shown(FULL)
    assert [state for (state,) in samples["batchrun_run_state"]] == list(STATES)
    assert {status for _, status in samples["batchrun_rows"]} == {str(status) for status in Status}


@pytest.mark.parametrize("exit_code", [0, 4])
def test_times_are_seconds_of_unix_time(exit_code: int) -> None:
    at = datetime(2026, 11, 25, tzinfo=UTC)
    samples = shown(msgspec.structs.replace(FULL, exit_code=exit_code, updated_at=at))
    assert samples["batchrun_update_timestamp_seconds"] == {(): 1795564800.0}
