"""Half price: flex first, else the standard tier; the bill by the tier that answered."""

import json
from collections import Counter, defaultdict
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from batchrun.job.load import from_tables
from batchrun.records import Row
from batchrun.request.builder import RequestBuilder
from batchrun.simulator import LedgerLine, SimulatorConfig, parse_faults
from tests.cli_process import batchrun, read_summary, write_job, write_rows
from tests.simulator_process import running_simulator

PRICES = """
[pricing."vtrix-gpt-5.3-codex"]
input = 2
output = 10
tiers.flex = { input = 1, output = 5 }
"""
FLEX = '[tiers]\nfallback = "default"\nafter_refusals = 2\n' + PRICES
FLEX_FIRST = ("--set", "request.service_tier=flex")


def _billed_usd(lines: list[LedgerLine]) -> dict[str | None, Decimal]:
    """The simulator's own tokens at the job's prices, by tier."""
    usd: dict[str | None, Decimal] = defaultdict(Decimal)
    for line in lines:
        half = 2 if line.service_tier == "flex" else 1
        usd[line.service_tier] += Decimal(line.prompt_tokens * 2 + line.completion_tokens * 10) / half / 1_000_000
    return dict(usd)


def _tiers_of_rows(ledger: list[LedgerLine]) -> dict[str, list[str]]:
    """By row, what happened to its requests in order: `refused`, or the tier that answered."""
    rows: dict[str, list[str]] = {}
    for line in ledger:
        assert line.client_request_id is not None
        rows.setdefault(line.client_request_id.split("-")[-2], []).append(line.service_tier or "refused")
    return rows


@pytest.mark.heavy
def test_each_row_goes_to_flex_first(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", 200)
    config = SimulatorConfig(faults=parse_faults("flex_unavailable=0.5"), latency_s=0.02)
    with running_simulator(config) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, FLEX + "[retry]\nbackoff_base_s = 0.05\n")
        ended = batchrun("run", job, "-o", tmp_path / "out", *FLEX_FIRST)
        assert ended.exit_code == 0, ended.stderr
        ledger = simulator.ledger()
    rows = _tiers_of_rows(ledger)
    assert len(rows) == 200
    assert {tuple(tiers) for tiers in rows.values()} == {
        ("flex",),
        ("refused", "flex"),
        ("refused", "refused", "default"),
    }
    billed = _billed_usd([line for line in ledger if line.billed])
    table = pq.read_table(tmp_path / "out" / "completions.parquet")
    assert set(table["status"].to_pylist()) <= {"ok", "truncated"}
    by_tier: dict[Any, Decimal] = defaultdict(Decimal)
    for tier, usd in zip(table["service_tier"].to_pylist(), table["cost_usd"].to_pylist(), strict=True):
        by_tier[tier] += usd or 0
    assert dict(by_tier) == billed
    usage = pq.read_table(tmp_path / "out" / "usage.parquet").to_pylist()
    of_lines: dict[Any, Decimal] = defaultdict(Decimal)
    for line in usage:
        of_lines[line["service_tier"]] += line["cost_usd"]
    assert {tier: usd for tier, usd in of_lines.items() if usd} == billed
    assert Decimal(str(read_summary(tmp_path / "out")["cost_usd"])) == sum(billed.values())
    report = batchrun("report", tmp_path / "out", "--by", "service_tier", "--format", "csv").stdout
    assert "flex," in report
    assert "default," in report


@pytest.mark.heavy
def test_capacity_refusals_teach_no_limit(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", 400)
    config = SimulatorConfig(faults=parse_faults("flex_unavailable=0.7"), latency_s=0.02)
    with running_simulator(config) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, FLEX + "[retry]\nbackoff_base_s = 0.05\n")
        ended = batchrun("run", job, "-o", tmp_path / "out", *FLEX_FIRST)
    assert ended.exit_code == 0, ended.stderr
    log = [json.loads(line) for line in (tmp_path / "out" / "run.log").read_text().splitlines()]
    events = [line["event"] for line in log]
    assert not {"pace", "refusals", "gate"} & set(events)
    in_flight = [line["after"] for line in log if line["event"] == "in flight"]
    assert in_flight == sorted(in_flight)


@pytest.mark.heavy
def test_a_deadline_sends_rows_to_the_standard_tier(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", 120)
    config = SimulatorConfig(latency_s=0.02, flex_latency_s=1.0, latency_sigma=0)
    with running_simulator(config) as simulator:
        limits = "[limits]\nmax_in_flight = 4\n"
        job = write_job(tmp_path / "job.toml", simulator.url, source, FLEX + limits)
        ended = batchrun("run", job, "-o", tmp_path / "out", "--deadline", "20s", *FLEX_FIRST)
        tiers = Counter(line.service_tier for line in simulator.ledger())
    log = [json.loads(line) for line in (tmp_path / "out" / "run.log").read_text().splitlines()]
    assert "default" in [line["service_tier"] for line in log if line["event"] == "service tier"]
    assert ended.exit_code == 0, ended.stderr  # 30 s with flex alone
    assert tiers["flex"] >= 4
    assert tiers["default"] >= 40


def test_without_a_fallback_the_run_pauses(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", 20)
    retry = "[retry]\nbackoff_base_s = 0.05\nmax_outage_s = 1\n"
    with running_simulator(SimulatorConfig(faults=parse_faults("flex_unavailable=1"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, PRICES + retry)
        paused = batchrun("run", job, "-o", tmp_path / "out", *FLEX_FIRST)
        assert paused.exit_code == 5, paused.stderr
        assert "no capacity" in paused.stdout + paused.stderr
        assert read_summary(tmp_path / "out")["pending"] == 20
        resumed = batchrun("run", job, "-o", tmp_path / "out", "--set", "request.service_tier=default")
        assert resumed.exit_code == 0, resumed.stderr
        ledger = [line for line in simulator.ledger() if line.billed]
    assert Counter(line.service_tier for line in ledger) == {"default": 20}


@pytest.mark.heavy
@pytest.mark.parametrize("served_by", ["flex", "default"])
def test_tiers_can_be_rehearsed_on_the_simulator(tmp_path: Path, served_by: str) -> None:
    source = write_rows(tmp_path / "in.jsonl", 10)
    job = tmp_path / "job.toml"
    lines = [
        *('[endpoint]\nurl = "simulator"', f'[input]\npath = "{source}"', FLEX, "[simulator]\nlatency_s = 0"),
        f'faults = "flex_unavailable={0 if served_by == "flex" else 1}"',
        *('[request]\nmodel = "vtrix-gpt-5.3-codex"', 'prompt = "Say: {{ text }}"', 'service_tier = "flex"'),
        "[retry]\nbackoff_base_s = 0.01",
    ]
    job.write_text("\n".join(lines))
    ended = batchrun("run", job, "-o", tmp_path / "out")
    assert ended.exit_code == 0, ended.stderr
    table = pq.read_table(tmp_path / "out" / "completions.parquet")
    assert set(table["service_tier"].to_pylist()) == {served_by}


def test_every_tier_has_the_same_request_key() -> None:
    def key(**request: object) -> bytes:
        tables = {"endpoint": {"url": "simulator"}, "request": {"model": "m", "prompt": "{{ text }}", **request}}
        return RequestBuilder(from_tables(tables), "columns").build(Row(0, {"text": "a"})).key

    assert key() == key(service_tier="flex") == key(cache_prefix=True) == key(extra={"prompt_cache_key": "k"})
    lines = [
        {"messages": [{"role": "user", "content": "a"}], "model": "m"} | more for more in ({}, {"service_tier": "flex"})
    ]
    builder = RequestBuilder(from_tables({"endpoint": {"url": "simulator"}}), "openai-batch")
    assert len({builder.build(Row(0, {"body": line})).key for line in lines}) == 1
