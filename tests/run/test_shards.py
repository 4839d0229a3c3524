"""A shard is a run like any other: killed, resumed, retried, exported, salvaged; rows keep the input's numbers."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchrun.simulator import Fault, SimulatorConfig
from tests.cli_process import batchrun, kill_when, read_summary, start, write_job, write_rows
from tests.simulator_process import RunningSimulator, running_simulator

MORE = """
[retry]
backoff_base_s = 0.02
[output]
chunk_rows = 20
path = "{folder}/runs/day"
[limits]
max_in_flight = 24
requests_per_minute = 60000
"""


@pytest.fixture(scope="module")
def server() -> Iterator[RunningSimulator]:
    bad = Fault(kind="status", status=400, message="bad", match="item 57 ")
    with running_simulator(SimulatorConfig(latency_s=0.01, faults=(bad,))) as simulator:
        yield simulator


def shard_job(folder: Path, url: str, rows: int = 100, more: str = "") -> Path:
    write_rows(folder / "in.jsonl", rows)
    return write_job(folder / "job.toml", url, folder / "in.jsonl", MORE.format(folder=folder) + more)


def out(folder: Path, number: int, count: int = 3) -> Path:
    return folder / f"runs/day.shard-{number}-of-{count}"


def rows_in(path: Path) -> list[int]:
    rows: list[int] = pq.read_table(path).column("row").to_pylist()  # type: ignore[assignment]
    return rows


@pytest.mark.heavy
def test_a_shard_is_treated_like_any_run(tmp_path: Path, server: RunningSimulator) -> None:
    job = shard_job(tmp_path, server.url)
    process = start("run", job, "--shard", "1/3", "--set", "limits.max_in_flight=6")
    kill_when(process, lambda: len(list((out(tmp_path, 1) / "parts").glob("*.parquet"))) >= 1)
    process.communicate()
    status = batchrun("status", out(tmp_path, 1))
    assert "of 33" in status.stdout, status.stdout
    exported = batchrun("export", out(tmp_path, 1))
    assert exported.exit_code == 0, exported.stderr
    assert rows_in(out(tmp_path, 1) / "completions.partial.parquet") == list(range(34, 67))
    assert batchrun("verify", out(tmp_path, 1)).exit_code == 0

    other = batchrun("run", job, "-o", out(tmp_path, 1))
    assert (other.exit_code, "resume it with --shard 1/3" in other.stderr) == (2, True), other.stderr
    shutil.copytree(out(tmp_path, 1), out(tmp_path, 2))
    other = batchrun("run", job, "--shard", "2/3")
    assert (other.exit_code, "the run there is shard 1/3" in other.stderr) == (2, True), other.stderr

    ended = batchrun("run", job, "--shard", "1/3")
    assert ended.exit_code == 3, ended.stderr  # row 57 failed
    assert "20,000 of 60,000 requests/min, 8 of 24 in flight" in ended.stderr
    summary = read_summary(out(tmp_path, 1))
    assert (summary["shard"], summary["rows"], summary["by_status"]["error"]) == ("1/3", 33, 1)
    assert summary["command"] == f"batchrun run {job} --shard 1/3"
    table = pq.read_table(out(tmp_path, 1) / "completions.parquet")
    assert table.column("row").to_pylist() == table.column("id").to_pylist() == list(range(34, 67))
    assert batchrun("verify", out(tmp_path, 1)).exit_code == 0
    again = batchrun("run", job, "--shard", "1/3", "--retry-failed")
    assert (again.exit_code, "1 row that ended" in again.stderr) == (3, True), again.stderr
    assert rows_in(out(tmp_path, 1) / "completions.parquet") == list(range(34, 67))
    assert batchrun("verify", out(tmp_path, 1)).exit_code == 0
    assert batchrun("show", out(tmp_path, 1), "--row", "57").stdout.count("item 57") >= 1

    part = out(tmp_path, 1) / "completions.parquet"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 0xFF
    part.write_bytes(content)
    assert batchrun("verify", out(tmp_path, 1), "--salvage").exit_code == 7
    salvaged = out(tmp_path, 1).with_name(out(tmp_path, 1).name + ".salvaged")
    shutil.rmtree(out(tmp_path, 1))
    salvaged.rename(out(tmp_path, 1))
    ended = batchrun("run", job, "--shard", "1/3")
    assert ended.exit_code == 3, ended.stderr
    assert rows_in(part) == list(range(34, 67))


@pytest.mark.heavy
def test_a_shards_input_and_question_cannot_change(tmp_path: Path, server: RunningSimulator) -> None:
    job = shard_job(tmp_path, server.url)
    assert batchrun("run", job, "--shard", "0/3").exit_code == 0
    changed = batchrun("run", job, "--shard", "0/3", "--set", "request.temperature=0.5", "--accept-changes")
    assert (changed.exit_code, "request.temperature has changed: the input" in changed.stderr) == (2, True)
    write_rows(tmp_path / "in.jsonl", 101)
    changed = batchrun("run", job, "--shard", "0/3", "--accept-changes")
    assert (changed.exit_code, "of a shard can't change" in changed.stderr) == (2, True)
    assert read_summary(out(tmp_path, 0))["complete"]


@pytest.mark.heavy
def test_a_shard_finds_equal_and_reused_rows(tmp_path: Path, server: RunningSimulator) -> None:
    job = shard_job(tmp_path, server.url, rows=90)
    lines = (tmp_path / "in.jsonl").read_text().splitlines()
    lines[31:60] = [json.dumps(json.loads(lines[30]) | {"id": number}) for number in range(31, 60)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    ended = batchrun("run", job, "--shard", "1/3")
    assert ended.exit_code == 0, ended.stderr
    table = pq.read_table(out(tmp_path, 1) / "completions.parquet")
    assert table.column("duplicate_of").to_pylist() == [None, *([30] * 29)]
    assert read_summary(out(tmp_path, 1))["duplicates"] == 29
    assert batchrun("verify", out(tmp_path, 1)).exit_code == 0
    statuses = 'input.reuse_status=["ok","truncated"]'
    reused = batchrun("run", job, "--shard", "1/2", "--reuse", out(tmp_path, 1), "--set", statuses)
    assert reused.exit_code == 0, reused.stderr
    summary = read_summary(out(tmp_path, 1, 2))
    assert (summary["rows"], summary["reused"], summary["duplicates"]) == (45, 15, 14)


def test_a_shard_without_rows_is_complete(tmp_path: Path, server: RunningSimulator) -> None:
    job = shard_job(tmp_path, server.url, rows=2)
    ended = batchrun("run", job, "--shard", "2/3")
    assert ended.exit_code == 0, ended.stderr
    assert "this shard has no rows" in ended.stderr
    assert rows_in(out(tmp_path, 2) / "completions.parquet") == []
    few = batchrun("run", job, "--shard", "0/3", "--set", "input.min_rows=3")
    assert (few.exit_code, "input.min_rows expects 3 or more" in few.stderr) == (2, True)


def test_check_and_estimate_know_the_shard(tmp_path: Path, server: RunningSimulator) -> None:
    job = shard_job(tmp_path, server.url)
    checked = batchrun("check", job, "--shard", "0/3")
    assert checked.stdout.startswith("34 rows in 1 file")
    assert "20,000 of 60,000 requests/min" in checked.stderr
    assert "to send      33 rows" in batchrun("estimate", job, "--shard", "2/3").stdout
    (tmp_path / "in.jsonl").write_text((tmp_path / "in.jsonl").read_text() + "{}\n")
    assert batchrun("check", job, "--shard", "0/3").exit_code == 0
    assert batchrun("check", job, "--shard", "2/3").exit_code == 2
