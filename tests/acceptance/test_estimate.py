"""What a run will take, before it takes it: bracketed by bounds, learned from its own answers, and nothing touched."""

from array import array
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest

from batchrun.job.job import Job
from batchrun.job.load import from_tables
from batchrun.job.settings import Budget
from batchrun.prices import PriceTable, Tier
from batchrun.simulator import SimulatorConfig
from batchrun.startup.estimate import estimate, in_words
from batchrun.startup.input_check import Survey
from tests.cli_process import batchrun, read_summary, snapshot, write_job, write_rows
from tests.simulator_process import running_simulator

PRICE = PriceTable("m", (Tier(0, Decimal(1), Decimal("0.1"), Decimal(10)),), "test", "2026-01-01")


def surveyed(rows: int) -> Survey:
    no_keys, sums = array("Q"), {"m": (1000 * rows, 50 * rows)}
    return Survey("columns", rows, no_keys, (), {"m": rows}, 1000 * rows, {"m": (1000, 50)}, sums, None)


def job(**limits: float) -> Job:
    request = {"model": "m", "prompt": "{{ text }}", "max_tokens": 50}
    return from_tables({"endpoint": {"url": "simulator"}, "request": request, "limits": limits})


def test_expected_cost_lies_between_valid_bounds() -> None:
    found = estimate(surveyed(100), job(), {"m": PRICE}, 100, None)
    assert (found.prompt_tokens, found.completion_tokens) == (30_000, 5_000)
    assert found.low_usd is not None
    assert found.expected_usd == Decimal("0.08")
    assert found.high_usd == Decimal("0.15")
    assert found.low_usd < found.expected_usd < found.high_usd


def test_images_count_as_images_and_not_as_bytes() -> None:
    found = msgspec.structs.replace(surveyed(100), image_tokens=100 * 765)
    estimated = estimate(found, job(), {"m": PRICE}, 50, None)
    assert estimated.prompt_tokens == 15_000 + 50 * 765
    assert "765 an image" in estimated.basis


@pytest.mark.parametrize(
    ("limits", "minutes", "limited_by"),
    [
        ({}, None, "latency"),
        ({"requests_per_minute": 50}, 2.0, "rpm"),
        ({"requests_per_minute": 50, "tokens_per_minute": 3500}, 10.0, "tpm"),
        ({"requests_per_second": 0.5}, 100 / 30, "rps"),
        ({"requests_per_minute": 60, "input_tokens_per_minute": 3000}, 10.0, "input tpm"),
        ({"tokens_per_minute": 35_000, "output_tokens_per_minute": 500}, 10.0, "output tpm"),
        ({"requests_per_day": 100}, None, "latency"),
        ({"requests_per_day": 99}, 60.0, "requests per day"),
        ({"requests_per_day": 10, "requests_per_minute": 1}, 60.0 + 8 * 1440, "requests per day"),
        ({"requests_per_day": 60, "requests_per_minute": 1}, 100.0, "rpm"),
    ],
)
def test_estimated_time_follows_the_tightest_limit(
    limits: Mapping[str, float], minutes: float | None, limited_by: str
) -> None:
    found = estimate(surveyed(100), job(**limits), {"m": PRICE}, 100, None, day_left_s=3600)
    assert found.limited_by == limited_by
    if minutes is None:
        assert found.minutes is None
    else:  # a bound: the first request does not wait, and two seconds of the limit may go at once
        assert found.minutes is not None
        assert minutes - 1.04 <= found.minutes <= minutes


@pytest.mark.parametrize(
    ("budget", "binds"),
    [
        ({"max_cost_usd": Decimal("0.08"), "max_tokens": 35_000, "max_requests": 100}, []),
        ({"max_cost_usd": Decimal("0.07")}, ["max_cost_usd = 0.07"]),
        ({"max_tokens": 34_999}, ["max_tokens = 34,999"]),
        ({"max_requests": 99}, ["max_requests = 99"]),
        ({"per_start_usd": Decimal("0.08"), "per_day_usd": Decimal("0.08")}, []),
        ({"per_month_usd": Decimal("0.07")}, ["per_month_usd = 0.07"]),
    ],
)
def test_a_budget_that_will_stop_is_named(budget: Mapping[str, object], binds: list[str]) -> None:
    requested = msgspec.structs.replace(job(), budget=Budget(**budget))  # type: ignore[arg-type]
    found = estimate(surveyed(100), requested, {"m": PRICE}, 100, None)
    lines = [line for line in in_words(found, {"m": PRICE}) if line.startswith("budget")]
    ends = "a start" if "per_month_usd" in budget else "the run"
    assert lines == [f"budget       {cap} will end {ends} before its last row" for cap in binds]


def test_unknown_prices_leave_estimates_incomplete() -> None:
    """An unknown price is shown as unknown, and the priced part is still estimated."""
    assert estimate(surveyed(100), job(), {"m": None}, 100, None).expected_usd is None
    part = estimate(surveyed(100), job(), {"m": PRICE}, 25, None)
    assert (part.expected_usd, part.high_usd) == (Decimal("0.02"), Decimal("0.0375"))


def test_the_estimate_learns_from_the_pilot(tmp_path: Path) -> None:
    """The estimate of the rest of a run learns from its own answers and comes true."""
    source = write_rows(tmp_path / "in.jsonl", 200)
    with running_simulator(SimulatorConfig(ledger=str(tmp_path / "ledger"))) as simulator:
        written = write_job(tmp_path / "job.toml", simulator.url, source)
        assert batchrun("run", written, "-o", tmp_path / "out", "--limit", "50").exit_code == 0
        before = snapshot(tmp_path / "out")
        reported = batchrun("estimate", written, "-o", tmp_path / "out")
        assert reported.exit_code == 0, reported.stderr
        assert "run          50 of 50 rows done" in reported.stdout
        assert "to send      150 rows" in reported.stdout
        assert "the mean of 50 answers" in reported.stdout
        changed = batchrun("estimate", written, "-o", tmp_path / "out", "--set", "request.max_tokens=30")
        assert "changed      request.max_tokens has changed: 0 answers stay, 200 rows will be sent" in changed.stdout
        after = snapshot(tmp_path / "out")
        assert after.keys() == before.keys()
        assert [name for name in after if after[name][3] != before[name][3]] in ([], ["checkpoint.db"])  # a counter
        assert len(simulator.ledger()) == 50
        spent = Decimal(read_summary(tmp_path / "out")["cost_usd"])
        assert batchrun("run", written, "-o", tmp_path / "out").exit_code == 0
        rest = Decimal(read_summary(tmp_path / "out")["cost_usd"]) - spent
    expected = Decimal(reported.stdout.split("about $")[1].split(";")[0])
    assert abs(rest - expected) < expected * Decimal("0.25")
    assert batchrun("estimate", written, "-o", tmp_path / "nowhere").exit_code == 2


def test_an_estimate_after_a_single_answer_says_so(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", 5)
    with running_simulator() as simulator:
        written = write_job(tmp_path / "job.toml", simulator.url, source)
        assert batchrun("run", written, "-o", tmp_path / "out", "--limit", "1").exit_code == 0
        assert "(the one answer of " in batchrun("estimate", written, "-o", tmp_path / "out").stdout
