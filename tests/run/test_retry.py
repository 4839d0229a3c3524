"""Rows of a complete run are sent again: only these, killed or not, and no answer that was paid for is lost."""

import json
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.simulator import Fault, SimulatorConfig
from tests.cli_process import batchrun, kill_when, read_summary, start, write_job, write_rows
from tests.simulator_process import running_simulator

SMALL_CHUNKS = "[retry]\nbackoff_base_s = 0.02\n[output]\nchunk_rows = 40\n"
FAILING = (
    Fault(kind="status", status=400, message="bad", match="item 7 "),
    Fault(kind="status", status=400, message="bad", match="item 90 "),
    Fault(kind="status", status=400, message="bad", match="item 91 "),
)


def table(out: Path) -> pa.Table:
    return pq.read_table(out / "completions.parquet", page_checksum_verification=True)


def finished(tmp_path: Path, more: str = SMALL_CHUNKS, rows: int = 150) -> tuple[Path, Path]:
    """A complete run of which rows 7, 90 and 91 failed; its job and directory."""
    source = write_rows(tmp_path / "in.jsonl", rows)
    out = tmp_path / "out"
    with running_simulator(SimulatorConfig(faults=FAILING)) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, more)
        ended = batchrun("run", job, "-o", out)
        assert ended.exit_code == 3, ended.stderr
    return job, out


@pytest.mark.heavy
@pytest.mark.parametrize("layout", ["file", "parts"])
def test_a_retry_sends_failed_rows_only(tmp_path: Path, layout: str) -> None:
    job, out = finished(tmp_path, SMALL_CHUNKS + f'layout = "{layout}"\n')
    read = table if layout == "file" else lambda out: pq.read_table(out / "completions")
    before = read(out)
    more = SMALL_CHUNKS + f'layout = "{layout}"\n'
    with running_simulator(SimulatorConfig(ledger=str(tmp_path / "ledger"))) as simulator:
        write_job(job, simulator.url, tmp_path / "in.jsonl", more)
        ended = batchrun("run", job, "-o", out, "--retry-failed")
        assert ended.exit_code == 0, ended.stderr
        assert "3 rows that ended as empty, error, invalid will be sent again, about $0." in ended.stderr
        assert "without --retry-failed" not in ended.stderr
        assert len(simulator.ledger()) == 3
    after = read(out)
    assert after.schema == before.schema
    rows = list(zip(before.to_pylist(), after.to_pylist(), strict=True))
    assert [new["row"] for old, new in rows if old != new] == [7, 90, 91]
    assert {new["attempts"] for old, new in rows if old != new} == {2}
    assert {new["status"] for old, new in rows if old != new} <= {"ok", "truncated"}
    summary = read_summary(out)
    assert summary["by_status"] == dict(Counter(new["status"] for _, new in rows))
    assert Decimal(summary["cost_usd"]) == sum(new["cost_usd"] for _, new in rows)
    bill = json.loads(batchrun("report", out, "--by", "status", "--format", "json").stdout)
    assert (bill["total"]["rows"], bill["total"]["attempts"]) == (150, 153)
    assert {line["status"]: line["rows"] for line in bill["lines"] if line["rows"]} == summary["by_status"]
    assert Decimal(bill["total"]["cost_usd"]) == Decimal(summary["cost_usd"])
    assert batchrun("run", job, "-o", out).exit_code == 0
    assert batchrun("run", job, "-o", out, "--retry-failed").exit_code == 0


def test_a_retry_without_a_run_sends_nothing(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", 5)
    with running_simulator(SimulatorConfig(ledger=str(tmp_path / "ledger"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source)
        ended = batchrun("run", job, "-o", tmp_path / "typo", "--retry-failed")
        assert ended.exit_code == 2
        assert ended.stderr.startswith(f"Error: {tmp_path}/typo: no run was started here, so no rows can be retried;")
        assert simulator.ledger() == []


@pytest.mark.heavy
def test_retried_rows_name_their_variant(tmp_path: Path) -> None:
    job, out = finished(tmp_path)
    truncated = table(out).column("status").to_pylist().count("truncated")
    assert truncated > 20
    longer = ("--retry-failed", "--status", "truncated,error", "--set", "request.max_tokens=4000")
    with running_simulator(SimulatorConfig(ledger=str(tmp_path / "ledger"))) as simulator:
        write_job(job, simulator.url, tmp_path / "in.jsonl", SMALL_CHUNKS)
        assert batchrun("run", job, "-o", out, "--set", "request.max_tokens=4000").exit_code == 2
        assert batchrun("run", job, "-o", out, *longer[:3], "--set", "endpoint.name=other").exit_code == 2
        assert simulator.ledger() == []
        ended = batchrun("run", job, "-o", out, *longer)
        assert ended.exit_code == 0, ended.stderr
        assert len(simulator.ledger()) == truncated + 3
    after = table(out).to_pylist()
    assert Counter(row["variant"] for row in after) == {0: 150 - truncated - 3, 1: truncated + 3}
    assert {row["status"] for row in after} == {"ok"}


@pytest.mark.heavy
def test_a_killed_retry_resumes_by_plain_command(tmp_path: Path) -> None:
    job, out = finished(tmp_path)
    before = {row["row"]: row for row in table(out).to_pylist()}
    longer = ("--retry-failed", "--status", "truncated,error", "--set", "request.max_tokens=4000")
    config = SimulatorConfig(latency_s=0.3, latency_sigma=0.2, ledger=str(tmp_path / "ledger"))
    with running_simulator(config) as simulator:
        write_job(job, simulator.url, tmp_path / "in.jsonl", SMALL_CHUNKS)
        process = start("run", job, "-o", out, *longer)
        kill_when(process, lambda: len(simulator.ledger()) >= 15)
        process.communicate()
        assert {row["row"]: row for row in table(out).to_pylist()} == before, "the result stands until a new one does"
        ended = batchrun("run", job, "-o", out)
        assert ended.exit_code == 0, ended.stderr
        lost = read_summary(out)["possibly_billed_count"]
        requested = sum(row["status"] != "ok" for row in before.values())
        assert requested <= len(simulator.ledger()) <= requested + lost
    after = {row["row"]: row for row in table(out).to_pylist()}
    assert {row["status"] for row in after.values()} == {"ok"}
    assert {row["variant"] for number, row in after.items() if before[number] != row} == {1}


@pytest.mark.heavy
def test_retrying_an_unfinished_run_sends_both(tmp_path: Path) -> None:
    """First what is pending, then what failed."""
    source, out = write_rows(tmp_path / "in.jsonl", 150), tmp_path / "out"
    slow = SMALL_CHUNKS + "[limits]\nmax_in_flight = 4\n"
    with running_simulator(SimulatorConfig(faults=FAILING, latency_s=0.1, ledger=str(tmp_path / "slow"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, slow)
        process = start("run", job, "-o", out)
        kill_when(process, lambda: len(simulator.ledger()) >= 30)
        process.communicate()
    still = FAILING[1:2]
    with running_simulator(SimulatorConfig(faults=still, ledger=str(tmp_path / "ledger"))) as simulator:
        write_job(job, simulator.url, source, SMALL_CHUNKS)
        ended = batchrun("run", job, "-o", out, "--retry-failed")
        assert ended.exit_code == 3, ended.stderr
        assert "still pending; sent first" in ended.stderr
        assert "2 rows that ended as empty, error, invalid will be sent again" in ended.stderr
    failed = {row["row"]: row["attempts"] for row in table(out).to_pylist() if row["status"] == "error"}
    assert failed == {90: 2}


@pytest.mark.heavy
def test_a_failure_never_replaces_an_answer(tmp_path: Path) -> None:
    job, out = finished(tmp_path, rows=60)
    before = table(out).to_pylist()
    everything = (Fault(kind="status", status=400, message="no more"),)
    with running_simulator(SimulatorConfig(faults=everything)) as simulator:
        write_job(job, simulator.url, tmp_path / "in.jsonl", SMALL_CHUNKS)
        ended = batchrun("run", job, "-o", out, "--retry-failed", "--status", "truncated,error")
        assert ended.exit_code == 3, ended.stderr
    after = table(out).to_pylist()
    assert [row["status"] for row in after] == [row["status"] for row in before]
    assert [row for row in after if row["status"] == "truncated"] == [r for r in before if r["status"] == "truncated"]
    assert read_summary(out)["by_status"] == dict(Counter(row["status"] for row in after))
