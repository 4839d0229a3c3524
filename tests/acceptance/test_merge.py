"""Merged shards are the run that one process would have made; what does not fit is named, and nothing is written."""

import json
import re
import shutil
import signal
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from batchrun.simulator import Fault, SimulatorConfig
from tests.cli_process import batchrun, finish, kill_when, read_summary, snapshot, start, write_job
from tests.simulator_process import RunningSimulator, running_simulator

MORE = """
[retry]
backoff_base_s = 0.02
[output]
chunk_rows = 9
path = "{out}"
max_failures = {max_failures}
[limits]
max_in_flight = 24
"""

OF_A_START = {"finished_at", "latency_s", "completion_id", "request_id", "created", "invocation", "raw", "reused_from"}
"""Columns of times and ids."""


@pytest.fixture(scope="module")
def server() -> Iterator[RunningSimulator]:
    bad = Fault(kind="status", status=400, message="bad", match="item 17 ")
    with running_simulator(SimulatorConfig(latency_s=0.002, faults=(bad,))) as simulator:
        yield simulator


def write_input(path: Path, rows: int = 60) -> Path:
    """JSON lines whose column types no single shard shows: `mixed` is JSON text, `score` a double, `late` a struct."""
    lines = []
    for row in range(rows):
        line: dict[str, object] = {"id": row, "text": f"item {row} end", "score": row if row < 20 else row / 4}
        line["mixed"] = "text" if row % 50 else row
        if row > rows - 5:
            line["late"] = {"a": row}
        lines.append(line)
    table = pa.Table.from_pylist(
        [{name: line[name] for name in ("id", "text")} | {"shape": str(line["id"])[-1]} for line in lines]
    )
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=7)
    else:
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def job_at(folder: Path, url: str, source: Path, more: str = "", max_failures: int = 9) -> Path:
    text = MORE.format(out=folder / "runs/night", max_failures=max_failures)
    return write_job(folder / "job.toml", url, source, text + more)


def shards_of(job: Path, count: int, *arguments: str) -> list[Path]:
    """The directories of all shards, run one after the other."""
    folder = job.parent / "runs"
    running = [start("run", job, "--shard", f"{number}/{count}", *arguments) for number in range(count)]
    for process in running:
        ended = finish(process)
        assert ended.exit_code in (0, 3), ended.stderr
    return [folder / f"night.shard-{number}-of-{count}" for number in range(count)]


def table(out: Path) -> pa.Table:
    path = out / "completions"
    found = pq.read_table(path if path.is_dir() else out / "completions.parquet")
    return found.sort_by("row") if path.is_dir() else found


def content(out: Path) -> pa.Table:
    """The result without times and ids."""
    found = table(out)
    return found.drop_columns([name for name in found.column_names if name in OF_A_START])


@pytest.mark.heavy
@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("name", "setting", "count"),
    [
        ("in.jsonl", "layout=file", 3),
        ("in.parquet", "layout=file", 7),
        ("in.jsonl", "layout=parts", 2),
        ("in.parquet", 'partition_by=["shape"]', 2),
    ],
)
def test_merged_shards_are_the_run_of_one_process(
    tmp_path: Path, server: RunningSimulator, name: str, setting: str, count: int
) -> None:
    source = write_input(tmp_path / name)
    job = job_at(tmp_path, server.url, source)
    chosen = ("--set", f"output.{setting}")
    one = tmp_path / "one"
    assert batchrun("run", job, "-o", one, *chosen).exit_code == 0
    folders = shards_of(job, count, *chosen)
    before = [snapshot(folder) for folder in folders]
    merged = batchrun("merge", *reversed(folders))
    assert merged.exit_code == 0, merged.stderr
    out = tmp_path / "runs/night"
    assert [snapshot(folder) for folder in folders] == before
    assert table(out).schema.equals(table(one).schema)
    assert content(out).equals(content(one))

    mine, whole = read_summary(out), read_summary(one)
    for field in ("rows", "rows_in_output", "by_status", "models", "complete", "exit_code", "cost_usd", "rejected"):
        assert mine[field] == whole[field], field
    assert (mine["shard"], len(mine["merged"])) == (None, count)
    assert Decimal(mine["cost_usd"]) == sum(Decimal(read_summary(folder)["cost_usd"]) for folder in folders)
    bill = pq.read_table(out / "usage.parquet")
    assert pc.sum(bill.column("rows")).as_py() == 60
    assert pc.sum(bill.column("cost_usd")).as_py() == Decimal(mine["cost_usd"])
    checked = batchrun("verify", out)
    assert checked.exit_code == 0, checked.stdout

    # a report counts the merged run, or the shards without it
    for places, runs in (((tmp_path / "runs",), 1), (folders, count), ((out, *folders), 1)):
        reported = batchrun("report", *places, "--format", "csv", "--by", "job", "--columns", "runs,cost_usd").stdout
        (total,) = reported.splitlines()[1:]
        assert Decimal(total.removeprefix(f"job,{runs},")) == Decimal(mine["cost_usd"]), reported

    # again: nothing is written; elsewhere: the same bytes
    before_again = snapshot(out)
    again = batchrun("merge", *folders)
    assert (again.exit_code, "merged already" in again.stdout) == (0, True), again.stderr
    assert snapshot(out) == before_again
    assert batchrun("merge", *folders, "-o", tmp_path / "other").exit_code == 0
    ours = {name: each[3] for name, each in snapshot(out).items() if not name.startswith("checkpoint")}
    other = {name: each[3] for name, each in snapshot(tmp_path / "other").items() if not name.startswith("checkpoint")}
    assert ours.keys() == other.keys()
    assert [name for name in ours if ours[name] != other[name] and name != "summary.json"] == []

    # it is a run like any other
    assert "complete already" in batchrun("run", job, "-o", out, *chosen).stderr
    retried = batchrun("run", job, "-o", out, "--retry-failed", *chosen)
    assert "1 row that ended as" in retried.stderr, retried.stderr
    assert content(out).drop_columns(["attempts"]).equals(content(one).drop_columns(["attempts"]))
    assert batchrun("verify", out).exit_code == 0


@pytest.mark.heavy
def test_rejected_records_leave_no_gap_in_numbers(tmp_path: Path, server: RunningSimulator) -> None:
    source = write_input(tmp_path / "in.jsonl")
    lines = source.read_text().splitlines()
    lines[3], lines[25], lines[40] = "nonsense", "{}", lines[41].replace('"id": 41', '"id": 40')
    source.write_text("\n".join(lines) + "\n")
    job = job_at(tmp_path, server.url, source)
    one = tmp_path / "one"
    assert batchrun("run", job, "-o", one, "--skip-invalid").exit_code == 0
    folders = shards_of(job, 3, "--skip-invalid")
    merged = batchrun("merge", *folders)
    assert merged.exit_code == 0, merged.stderr
    out = tmp_path / "runs/night"
    assert content(out).equals(content(one))
    assert table(out).column("duplicate_of").to_pylist()[39] == 38
    assert (out / "rejects.jsonl").read_bytes() == (one / "rejects.jsonl").read_bytes()
    assert batchrun("verify", out).exit_code == 0


@pytest.mark.heavy
def test_other_forms_of_a_result_are_merged_too(tmp_path: Path, server: RunningSimulator) -> None:
    job = job_at(tmp_path, server.url, write_input(tmp_path / "in.parquet"))
    chosen = ("--set", "output.format=jsonl")
    assert batchrun("run", job, "-o", tmp_path / "one", *chosen).exit_code == 0
    assert batchrun("merge", *shards_of(job, 3, *chosen)).exit_code == 0

    def lines(out: Path) -> list[dict[str, object]]:
        found = map(json.loads, (out / "completions.jsonl").read_text().splitlines())
        return [{name: value for name, value in line.items() if name not in OF_A_START} for line in found]

    out = tmp_path / "runs/night"
    assert lines(out) == lines(tmp_path / "one")
    assert batchrun("verify", out).exit_code == 0
    shutil.rmtree(tmp_path / "runs")

    shared = tmp_path / "shared"
    settings = ("--set", 'output.partition_by=["shape"]', "--set", f"output.dataset={shared}")
    folders = shards_of(job, 2, *settings)
    assert not shared.exists()  # a shard has some rows of each partition, and would replace the others' rows
    assert batchrun("merge", *folders).exit_code == 0
    assert pq.read_table(shared).sort_by("row").column("row").to_pylist() == list(range(60))


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, server: RunningSimulator) -> Path:
    """A folder with three complete shards."""
    folder = tmp_path_factory.mktemp("three")
    job = job_at(folder, server.url, write_input(folder / "in.jsonl"), max_failures=0)
    shards_of(job, 3)
    return folder


@pytest.mark.heavy
def test_everything_unfit_is_named_at_once(tmp_path: Path, three: Path, server: RunningSimulator) -> None:
    shutil.copytree(three, tmp_path / "t")
    runs, job = tmp_path / "t/runs", tmp_path / "t/job.toml"
    job.write_text(job.read_text().replace(str(three), str(tmp_path / "t")))
    zero, one, two = (runs / f"night.shard-{number}-of-3" for number in range(3))
    other_n = tmp_path / "n"
    assert batchrun("run", job, "--shard", "1/4", "-o", other_n).exit_code in (0, 3)
    warm = tmp_path / "warm"
    assert batchrun("run", job, "--shard", "1/3", "-o", warm, "--set", "request.temperature=1.0").exit_code in (0, 3)
    priced = tmp_path / "priced"
    price = 'pricing."vtrix-gpt-5.3-codex"={input=1,output=2}'
    assert batchrun("run", job, "--shard", "1/3", "-o", priced, "--set", price).exit_code in (0, 3)
    write_input(tmp_path / "t/in.jsonl", rows=61)
    longer = tmp_path / "longer"
    assert batchrun("run", job, "--shard", "1/3", "-o", longer).exit_code in (0, 3)
    pilot = tmp_path / "pilot"
    assert batchrun("run", job, "--shard", "2/3", "-o", pilot, "--limit", "2").exit_code == 0
    whole = tmp_path / "whole"
    assert batchrun("run", job, "-o", whole, "--limit", "2").exit_code in (0, 3)
    damaged = tmp_path / "damaged.shard-1-of-3"
    shutil.copytree(one, damaged)
    (damaged / "usage.parquet").write_bytes(b"PAR1")
    copy = tmp_path / "copy.shard-1-of-3"
    shutil.copytree(one, copy)
    suffixes = {"n": "1-of-4", "warm": "1-of-3", "priced": "1-of-3", "longer": "1-of-3", "pilot": "2-of-3"}
    at = {name: tmp_path / f"{name}.shard-{suffix}" for name, suffix in suffixes.items()}
    cases: list[tuple[list[Path], int, list[str]]] = [
        ([zero, two], 4, ["shard 1 of 3 is not among these directories"]),
        ([two], 4, ["shards 0, 1 of 3 are not among"]),
        ([zero, one, two, copy], 2, ["both are shard 1/3"]),
        ([zero, two, at["n"]], 2, ["one of 4 shards, not of 3", "shard 1 of 3 is not"]),
        ([zero, two, at["warm"]], 2, ["request.temperature"]),
        ([zero, two, at["priced"]], 2, ["the price of vtrix-gpt-5.3-codex"]),
        ([zero, two, at["longer"]], 2, ["another input"]),
        ([zero, one, at["pilot"]], 4, ["shard 2/3: 18 rows are pending; run it to its end"]),
        ([zero, two, whole], 2, ["is not a shard"]),
        ([zero, two, tmp_path / "nothing"], 2, ["no run here"]),
        ([zero, two, damaged], 7, ["damaged: usage.parquet"]),
        ([zero, at["warm"], damaged, whole, at["pilot"]], 7, ["temperature", "damaged: ", "is not a shard", "pending"]),
    ]
    for places, code, says in cases:
        ended = batchrun("merge", *places, "-o", tmp_path / "result")
        assert (ended.exit_code, [each for each in says if each not in ended.stderr]) == (code, []), ended.stderr
        assert not list(tmp_path.glob("result*"))
    with_job = start("run", job, "--shard", "2/3", "-o", tmp_path / "busy", "--set", "limits.requests_per_minute=60")
    busy = Path(f"{tmp_path / 'busy'}.shard-2-of-3")
    kill_when(with_job, lambda: (busy / "inflight.bin").exists(), signal.SIGSTOP)
    ended = batchrun("merge", zero, one, busy, "-o", tmp_path / "result")
    with_job.send_signal(signal.SIGKILL)
    with_job.communicate()
    assert (ended.exit_code, "a process works on it" in ended.stderr) == (4, True), ended.stderr
    (tmp_path / "taken").mkdir()
    ended = batchrun("merge", zero, one, two, "-o", tmp_path / "taken")
    assert (ended.exit_code, "exists already" in ended.stderr) == (2, True), ended.stderr
    merged = batchrun("merge", zero, one, two)
    assert merged.exit_code == 3, merged.stderr  # a row failed, and the job allows none


@pytest.mark.heavy
def test_a_cut_merge_does_not_look_finished(tmp_path: Path, three: Path) -> None:
    folders = sorted((three / "runs").glob("night.shard-*"))
    out = tmp_path / "night"
    building = tmp_path / "night.tmp"
    for written in ("checkpoint.db", "completions.parquet", "usage.parquet"):
        process = start("merge", *folders, "-o", out)
        kill_when(process, lambda path=building / written: path.exists() or out.exists())
        process.communicate()
        if not out.exists():
            assert batchrun("report", tmp_path).exit_code == 2  # no run there
        else:
            assert batchrun("verify", out).exit_code == 0
            shutil.rmtree(out)
    assert batchrun("merge", *folders, "-o", out).exit_code == 3
    assert batchrun("verify", out).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["night"]


@pytest.mark.heavy
def test_a_shard_resumed_after_merging_is_named(tmp_path: Path, three: Path) -> None:
    shutil.copytree(three, tmp_path / "t")
    job = tmp_path / "t/job.toml"
    job.write_text(job.read_text().replace(str(three), str(tmp_path / "t")))
    runs = tmp_path / "t/runs"
    folders = sorted(runs.glob("night.shard-*"))
    assert batchrun("merge", *folders).exit_code == 3
    ended = batchrun("run", job, "--shard", "1/3", "--retry-failed", "--status", "truncated")
    assert "will be sent again" in batchrun("run", job, "--shard", "0/3", "--retry-failed").stderr or ended.stderr
    reported = batchrun("report", runs)
    assert "but resumed since: no figure includes at least $" in reported.stdout + reported.stderr
    again = batchrun("merge", *folders)
    assert (again.exit_code, "exists already" in again.stderr) == (2, True)
    assert batchrun("merge", *folders, "-o", runs / "second").exit_code == 3
    assert batchrun("verify", runs / "second").exit_code == 0
    assert re.search(r"runs +pending", batchrun("report", runs).stdout)
