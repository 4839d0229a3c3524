"""A canary's rows are spread over the input, sent first, kept, and decide whether the rest is sent."""

import json
import random
import signal
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.dispatch.canary import CanaryOutcome, judge, spread
from batchrun.job.settings import Canary
from batchrun.simulator import SimulatorConfig
from tests.cli_process import Ended, batchrun, kill_when, read_summary, start, write_job
from tests.simulator_process import RunningSimulator, running_simulator

ROWS = 300


def write_input(path: Path, rows: int = ROWS) -> Path:
    path.write_text("".join(json.dumps({"id": row, "text": f"item {row}"}) + "\n" for row in range(rows)))
    return path


def job(folder: Path, url: str, canary: str, more: str = "", rows: int = ROWS) -> Path:
    source = write_input(folder / "in.jsonl", rows)
    file = write_job(folder / "job.toml", url, source, f"[canary]\n{canary}\n[output]\nchunk_rows = 40\n{more}")
    file.write_text(file.read_text().replace("max_tokens = 40", "max_tokens = 400"))
    return file


def rows_sent(simulator: RunningSimulator) -> list[int]:
    """The rows of all requests, in the order in which they came."""
    return [int((line.client_request_id or "").split("-")[-2]) for line in simulator.ledger()]


@pytest.fixture
def simulator(tmp_path: Path) -> Iterator[RunningSimulator]:
    with running_simulator(SimulatorConfig(latency_s=0.02, ledger=str(tmp_path / "ledger"))) as running:
        yield running


@pytest.mark.heavy
def test_a_passing_canary_sends_every_row_once(simulator: RunningSimulator, tmp_path: Path) -> None:
    file = job(tmp_path, simulator.url, "rows = 20\nmin_ok_share = 0.5\nmax_cost_per_row_usd = 1")
    ended = batchrun("run", file, "-o", tmp_path / "out")
    assert ended.exit_code == 0, ended.stderr
    sent = rows_sent(simulator)
    first = sorted(sent[:20])
    assert sorted(sent) == list(range(ROWS))
    assert max(after - before for before, after in pairwise([0, *first, ROWS])) <= 45  # spread over the whole input
    assert first != list(range(20))
    assert "canary: 20 rows, spread over the input, are sent first" in ended.stderr
    assert "canary passed: 20 rows: " in ended.stderr
    assert pq.read_table(tmp_path / "out" / "completions.parquet")["row"].to_pylist() == list(range(ROWS))
    summary = read_summary(tmp_path / "out")
    assert sum(line["attempts"] for line in summary["totals"]) == ROWS
    log = [json.loads(line) for line in (tmp_path / "out" / "run.log").read_text().splitlines()]
    assert [sum(line["by_status"].values()) for line in log if line["event"] == "canary"] == [20]
    assert batchrun("run", file, "-o", tmp_path / "out").exit_code == 0
    assert len(simulator.ledger()) == ROWS


@pytest.mark.heavy
def test_a_failed_canary_stops_until_something_changes(simulator: RunningSimulator, tmp_path: Path) -> None:
    file = job(tmp_path, simulator.url, "rows = 20", rows=200)
    text = file.read_text()
    file.write_text(text.replace("max_tokens = 400", "max_tokens = 1"))  # every answer is cut short
    out = tmp_path / "out"

    def run(*options: str) -> Ended:
        return batchrun("run", file, "-o", out, *options)

    failed = run()
    assert failed.exit_code == 4
    reason = read_summary(out)["reason"]
    assert reason.startswith("the canary failed: 0% are ok (canary.min_ok_share = 0.9), of 20 rows: 20 truncated, $")
    assert "--accept-canary" in reason
    assert len(simulator.ledger()) == 20
    again = run()
    assert (again.exit_code, read_summary(out)["reason"], len(simulator.ledger())) == (4, reason, 20)
    assert batchrun("export", out).exit_code == 0
    kept = Counter(pq.read_table(out / "completions.partial.parquet")["status"].to_pylist())
    assert kept == {"truncated": 20, "pending": 180}
    assert run("--retry-failed").exit_code == 4  # no way round it
    assert len(simulator.ledger()) == 20
    file.write_text(text)
    assert run().exit_code == 2  # the job has changed
    changed = run("--accept-changes")
    assert changed.exit_code == 0, changed.stderr
    assert len(simulator.ledger()) == 20 + 200


def test_a_canary_sees_beyond_a_good_head(simulator: RunningSimulator, tmp_path: Path) -> None:
    file = job(tmp_path, simulator.url, "rows = 20")
    lines = [{"id": row, "text": f"item {row}", "most": 400 if row < ROWS // 2 else 1} for row in range(ROWS)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ended = batchrun("run", file, "-o", tmp_path / "out", "--set", 'request.from_columns.max_tokens="most"')
    assert ended.exit_code == 4
    assert 8 <= read_summary(tmp_path / "out")["by_status"]["truncated"] <= 12


@pytest.mark.heavy
def test_an_accepted_canary_sends_the_rest(simulator: RunningSimulator, tmp_path: Path) -> None:
    file = job(tmp_path, simulator.url, "rows = 10\nmin_ok_share = 1", rows=100)
    options = ("--set", "canary.max_cost_per_row_usd=0.0000001")
    first, second = tmp_path / "first", tmp_path / "second"
    for out in (first, second):
        assert batchrun("run", file, "-o", out, *options).exit_code == 4
    reason = read_summary(first)["reason"]
    assert "a row costs $" in reason
    assert "(canary.max_cost_per_row_usd = 0.0000001)" in reason
    lowered = batchrun("run", file, "-o", first, "--set", "canary.min_ok_share=0")
    assert lowered.exit_code == 0, lowered.stderr
    part = batchrun("run", file, "-o", second, *options, "--accept-canary", "--set", "budget.max_requests=30")
    assert part.exit_code == 4
    assert "the budget is used up" in read_summary(second)["reason"]
    assert "canary accepted: " in part.stderr
    assert batchrun("run", file, "-o", second, *options).exit_code == 0
    assert len(simulator.ledger()) == 200


@pytest.mark.heavy
def test_a_killed_canary_resumes_with_its_rows(tmp_path: Path) -> None:
    with running_simulator(SimulatorConfig(latency_s=0.15, ledger=str(tmp_path / "ledger"))) as simulator:
        file = job(tmp_path, simulator.url, "rows = 20\nmin_ok_share = 0.5", "[limits]\nmax_in_flight = 2", rows=60)
        process = start("run", file, "-o", tmp_path / "out")
        kill_when(process, lambda: len(simulator.ledger()) >= 7, signal.SIGKILL)
        process.communicate()
        fast = ("--set", "limits.max_in_flight=20")
        ended = batchrun("run", file, "-o", tmp_path / "out", *fast)
        assert ended.exit_code == 0, ended.stderr
        sent = rows_sent(simulator)
        assert len(sent) <= 60 + 2
        assert len(set(sent[:20])) >= 18
        assert set(sent) == set(range(60))
        assert "canary passed: 20 rows" in ended.stderr


def test_a_small_run_has_no_canary(simulator: RunningSimulator, tmp_path: Path) -> None:
    file = job(tmp_path, simulator.url, "rows = 20\nmin_ok_share = 1\nmax_cost_per_row_usd = 0.0000001", rows=20)
    ended = batchrun("run", file, "-o", tmp_path / "out")
    assert ended.exit_code == 0
    assert "canary" not in ended.stderr
    unknown = batchrun("run", file, "-o", tmp_path / "other", "--set", "request.model=unknown-model")
    assert unknown.exit_code == 2
    assert "canary.max_cost_per_row_usd: the price of unknown-model is unknown" in unknown.stderr


@pytest.mark.heavy
def test_a_canary_skips_rows_without_a_request(simulator: RunningSimulator, tmp_path: Path) -> None:
    file = job(tmp_path, simulator.url, "rows = 20\nmin_ok_share = 0.5")
    texts = [f"item {row % 100}" for row in range(ROWS)]  # each one three times
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    few = ("sh", "-c", 'ulimit -n 128; exec "$@"', "sh")
    many_chunks = ("--set", "output.chunk_rows=2", "--set", "limits.max_in_flight=8")
    ended = batchrun("run", file, "-o", tmp_path / "one", *many_chunks, before=few)
    assert ended.exit_code == 0, ended.stderr
    assert "canary passed: 20 rows: " in ended.stderr
    assert sorted(rows_sent(simulator)) == list(range(100))
    again = batchrun("run", file, "-o", tmp_path / "two", "--reuse", tmp_path / "one")
    assert again.exit_code == 0, again.stderr
    assert "canary" not in again.stderr
    assert len(simulator.ledger()) == 100
    for out in (tmp_path / "one", tmp_path / "two"):
        assert batchrun("verify", out).exit_code == 0
        rows = pq.read_table(out / "completions.parquet").to_pylist()
        assert [row["text"] for row in rows] == texts
        by_text = {row["text"]: row["content"] for row in rows}
        assert all(row["content"] == by_text[row["text"]] for row in rows)


@pytest.mark.heavy
def test_a_stopped_canary_judges_all_its_rows(simulator: RunningSimulator, tmp_path: Path) -> None:
    file = job(tmp_path, simulator.url, "rows = 20", "chunk_rows = 1", rows=200)
    file.write_text(file.read_text().replace("chunk_rows = 40\n", "").replace("max_tokens = 400", "max_tokens = 1"))
    stopped = batchrun("run", file, "-o", tmp_path / "out", "--set", "budget.max_requests=19")
    assert stopped.exit_code == 4, stopped.stderr
    assert len(simulator.ledger()) == 19
    failed = batchrun("run", file, "-o", tmp_path / "out")
    assert failed.exit_code == 4, failed.stderr
    assert "of 20 rows: 20 truncated" in read_summary(tmp_path / "out")["reason"]
    assert len(simulator.ledger()) == 20


# ── by itself ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@given(st.integers(0, 3000), st.integers(1, 60), st.integers(0, 99))
def test_canary_rows_are_spread_evenly(rows: int, count: int, seed: int) -> None:
    chosen = spread(range(rows), count, random.Random(seed))
    assert len(chosen) == min(rows, count)
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(range(rows))
    if rows >= 4 * count:
        widest = max(after - before for before, after in zip([0, *chosen], [*chosen, rows], strict=True))
        assert widest <= 6 * rows / count


def test_each_bound_of_a_canary_is_judged() -> None:
    seen = CanaryOutcome({"ok": 6, "invalid": 3, "truncated": 1}, Decimal("0.5"), 0, "bad")
    assert list(judge(seen, Canary(rows=10, min_ok_share=0.6, max_invalid_share=0.3))) == []
    assert len(list(judge(seen, Canary(rows=10, min_ok_share=0.61)))) == 1
    assert len(list(judge(seen, Canary(rows=10, min_ok_share=0, max_invalid_share=0.29)))) == 1
    assert len(list(judge(seen, Canary(rows=10, min_ok_share=0, max_cost_per_row_usd=Decimal("0.049"))))) == 1
    assert list(judge(seen, Canary(rows=10, min_ok_share=0, max_cost_per_row_usd=Decimal("0.05")))) == []
    unpriced = CanaryOutcome({"ok": 10}, Decimal(0), 2, None)
    assert "2 rows are of unknown cost" in next(judge(unpriced, Canary(rows=10, max_cost_per_row_usd=Decimal(1))))
    assert list(judge(CanaryOutcome({}, Decimal(0), 0, None), Canary(rows=10))) == []
