"""What a run learns of its limits outlives the process: real processes, a strict simulator, its ledger."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batchrun.limits import daily, token_estimates
from batchrun.simulator import SimulatorConfig
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.totals import Totals
from tests.cli_process import batchrun, finish, start, wait_until, write_job, write_rows
from tests.fault_server import answer, sends, serving_aside
from tests.simulator_process import running_simulator


def logged(out: Path, event: str) -> Iterator[dict[str, Any]]:
    """The run log's lines of an event, in order."""
    for line in (out / "run.log").read_text().splitlines():
        if (entry := json.loads(line))["event"] == event:
            yield entry


def manifest(out: Path) -> dict[str, str]:
    checkpoint = Checkpoint(out / "checkpoint.db", free_reserve=lambda: False)
    try:
        return checkpoint.manifest_entries()
    finally:
        checkpoint.close()


def limited_to(requests_per_minute: int, ledger: Path) -> SimulatorConfig:
    return SimulatorConfig(requests_per_minute=requests_per_minute, latency_s=0.02, ledger=str(ledger))


def test_the_next_start_begins_with_learned_limits(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", 400)
    out, same = tmp_path / "out", ["--set", "endpoint.name=the same"]
    with running_simulator(limited_to(6_000, tmp_path / "first")) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source)
        assert batchrun("run", job, "-o", out, "--limit", "200", *same).exit_code == 0
        known = token_estimates.decode(manifest(out)[token_estimates.ENTRY])
        assert known.requests_per_minute == 6_000
        assert known.in_flight is not None
        (sizes,) = known.sizes.values()
        used = [line for line in simulator.ledger() if line.billed]
        mean = sum(line.completion_tokens for line in used) / len(used)
        assert mean <= sizes.output_tokens <= max(line.completion_tokens for line in used)
    with running_simulator(limited_to(6_000, tmp_path / "second")) as simulator:  # nothing of its limit is used yet
        job = write_job(tmp_path / "job.toml", simulator.url, source)
        assert batchrun("run", job, "-o", out, *same).exit_code == 0
        assert [line.status for line in simulator.ledger()] == [200] * 200
    found = [(entry["limit"], entry["after"], entry["why"]) for entry in logged(out, "pace")]
    assert found == [("rpm", 6_000.0, "stated by the server"), ("rpm", 6_000.0, "learned by an earlier process")]
    before = 0
    for entry in logged(out, "in flight"):
        assert entry["why"]
        assert entry["before"] in (before, 0)
        before = entry["after"]


def test_an_early_kill_keeps_learned_limits(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", 2_000)
    config = SimulatorConfig(requests_per_minute=1_200, latency_s=0.02, ledger=str(tmp_path / "ledger"))
    with running_simulator(config) as simulator:
        job, out = write_job(tmp_path / "job.toml", simulator.url, source), tmp_path / "out"
        process = start("run", job, "-o", out)
        wait_until(simulator.ledger, process)
        time.sleep(4)  # a few heartbeats, far from the minute
        process.kill()
        process.communicate()
    assert token_estimates.decode(manifest(out).get(token_estimates.ENTRY)).requests_per_minute == 1_200


def test_daily_requests_count_over_all_starts(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", 60)
    with running_simulator(SimulatorConfig(ledger=str(tmp_path / "ledger"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, "[limits]\nrequests_per_day = 40\n")
        out = tmp_path / "out"
        assert batchrun("run", job, "-o", out, "--limit", "25").exit_code == 0
        for number in ("KILL", "TERM"):
            process = start("run", job, "-o", out)
            wait_until(lambda: len(simulator.ledger()) >= 40, process)
            wait_until(lambda: "requests per day" in (out / "summary.json").read_text(), process)
            process.kill() if number == "KILL" else process.terminate()
            finish(process)
        assert len(simulator.ledger()) == 40
    assert json.loads(manifest(out)[daily.ENTRY])["requests_before"] == 0


@pytest.mark.heavy
def test_answers_without_usage_count_under_later_caps(
    tmp_path: Path,
) -> None:
    def spent(out: Path) -> Totals:
        checkpoint = Checkpoint(out / "checkpoint.db", free_reserve=lambda: False)
        try:
            return checkpoint.totals
        finally:
            checkpoint.close()

    source, early, late = write_rows(tmp_path / "in.jsonl", 30), tmp_path / "early", tmp_path / "late"
    priced = ("--set", "request.model=gpt-5-mini")
    with serving_aside(sends(answer())) as server:  # its answers state no usage
        job = write_job(tmp_path / "job.toml", server.url, source)
        first = ("--limit", "10", *priced)
        assert batchrun("run", job, "-o", late, *first).exit_code == 0
        caps = ("--max-cost", "5", "--set", "budget.max_tokens=100000")
        assert batchrun("run", job, "-o", early, *first, *caps).exit_code == 0
        assert (spent(late).possibly_billed_count, spent(early).possibly_billed_count) == (0, 10)
        assert spent(late).tokens() == spent(early).tokens() > 10 * 40
        assert spent(late).most_usd() == spent(early).most_usd() > 0
        cap = f"budget.max_tokens={spent(late).tokens() + 1}"
        sent = len(server.exchanges)
        ended = batchrun("run", job, "-o", late, *priced, "--set", cap)
        assert ended.exit_code == 4, ended.stderr
        assert len(server.exchanges) == sent
        assert batchrun("verify", late).exit_code == 0
