"""What a stopped run leaves: its rows so far, those without an outcome as pending, and its bill."""

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from batchrun.errors import CheckpointError, InputError, JobError
from batchrun.integrity.export import export, in_words
from batchrun.integrity.verify import verify
from batchrun.report.summary import read
from batchrun.simulator import Fault, SimulatorConfig
from batchrun.store import partial
from batchrun.store.rundir import RunDirectory
from batchrun.tables import files
from batchrun.tables.pending import PENDING, with_pending
from batchrun.tables.rows import own_table
from tests.cli_process import batchrun, kill_when, read_summary, snapshot, start, write_job, write_rows
from tests.crash.test_verify import flip, last_of_a_page
from tests.endings import completion, discarded
from tests.money import pico
from tests.run_copies import Runs
from tests.simulator_process import running_simulator

ROWS = 200
MORE = """
[limits]
max_in_flight = 8

[output]
chunk_rows = 30
layout = "{layout}"
"""

HANGS = "item 65 "
"""A row that is still in flight when later chunks are sealed."""

SAME = ["id", "text", "row", "status", "content", "request_key", "cost_usd"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """A run that was killed in the middle, the same run undisturbed, and the same in parts."""
    folder = tmp_path_factory.mktemp("runs")
    source = write_rows(folder / "in.jsonl", ROWS)
    config = SimulatorConfig(
        latency_s=0.02, faults=(Fault(kind="hang", match=HANGS, times=1),), ledger=str(folder / "ledger")
    )
    with running_simulator(config) as simulator:
        for layout in ("file", "parts"):
            write_job(folder / f"{layout}.toml", simulator.url, source, MORE.format(layout=layout))
        killed = RunDirectory(folder / "killed")
        process = start("run", folder / "file.toml", "-o", killed.path)
        kill_when(process, (killed.parts / "000003.g1.parquet").exists)
        process.communicate()
        for name, layout in (("done", "file"), ("in-parts", "parts")):
            assert batchrun("run", folder / f"{layout}.toml", "-o", folder / name).exit_code == 0
        yield Runs(folder, simulator, pq.read_table(folder / "done" / "completions.parquet"))


def by_status(table: pa.Table) -> Counter[str]:
    return Counter(cast(list[str], table.column("status").to_pylist()))


def settled(table: pa.Table) -> pa.Table:
    return table.filter(pc.not_equal(table.column("status"), pa.scalar(PENDING)))


# ── the rows of a run that was killed ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.heavy
def test_a_killed_run_exports_rows_in_order(runs: Runs, tmp_path: Path) -> None:
    """Rows without an answer are pending."""
    directory = runs.copy("killed", tmp_path / "run")
    before, served = snapshot(directory.path), len(runs.simulator.ledger())
    ended = batchrun("export", directory.path)
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert len(runs.simulator.ledger()) == served
    table = pq.read_table(directory.partial)
    done = settled(table)
    assert f"{ROWS} rows, {done.num_rows} done, {ROWS - done.num_rows} pending" in ended.stdout
    assert 90 <= done.num_rows < ROWS  # three sealed chunks, and rows of open ones
    assert table.schema == runs.undisturbed.schema
    assert table.column("row").to_pylist() == list(range(ROWS))
    for column in ("id", "text"):
        assert table.column(column) == runs.undisturbed.column(column)
    assert done.select(SAME) == runs.undisturbed.take(done.column("row")).select(SAME)
    pending = table.filter(pc.equal(table.column("status"), pa.scalar(PENDING)))
    assert 65 in pending.column("row").to_pylist()
    assert {row["content"] for row in pending.to_pylist()} == {None}
    assert {row["cost_usd"] for row in pending.to_pylist()} == {Decimal(0)}
    after = snapshot(directory.path)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {directory.partial.name, directory.usage.name}


def test_the_bill_is_exported_with_the_rows(runs: Runs, tmp_path: Path) -> None:
    """In a file beside them and in their footer."""
    directory = runs.copy("killed", tmp_path / "run")
    exported = export(directory)
    footer: dict[str, Any] = files.read_footer(directory.partial) or {}
    table = pq.read_table(directory.partial)
    assert (footer["complete"], footer["rows_in_output"], footer["pending"]) == (False, ROWS, exported.pending)
    assert footer["by_status"] == dict(by_status(settled(table)))
    usage = pq.read_table(directory.usage)
    costs = cast(list[Decimal], table.column("cost_usd").to_pylist())
    assert sum(cast(list[Decimal], usage.column("cost_usd").to_pylist())) == sum(costs) == Decimal(footer["cost_usd"])
    assert sum(cast(list[int], usage.column("rows").to_pylist())) == ROWS - exported.pending
    assert footer["possibly_billed_count"] >= 1  # the row that hung
    reported = batchrun("report", directory.partial, "--by", "job").stdout
    assert f"{ROWS - exported.pending}" in reported


def test_the_finished_result_replaces_the_export(runs: Runs, tmp_path: Path) -> None:
    directory = runs.copy("killed", tmp_path / "run")
    export(directory)
    assert runs.resume(directory).complete
    assert not directory.partial.exists()
    assert pq.read_table(directory.completions).select(SAME[:-1]) == runs.undisturbed.select(SAME[:-1])
    assert verify(directory).damages == ()


def test_exporting_elsewhere_leaves_the_run_untouched(runs: Runs, tmp_path: Path) -> None:
    directory = runs.copy("killed", tmp_path / "run")
    before = snapshot(directory.path)
    exported = export(directory, tmp_path / "so far.parquet")
    assert snapshot(directory.path) == before
    assert exported.path == tmp_path / "so far.parquet"
    assert pq.read_metadata(exported.path).num_rows == ROWS


def test_a_flipped_bit_in_an_export_is_named(runs: Runs, tmp_path: Path) -> None:
    """The run is not harmed."""
    directory = runs.copy("killed", tmp_path / "run")
    export(directory)
    assert verify(directory).damages == ()
    flip(directory.partial, last_of_a_page(directory.partial))
    (damage,) = verify(directory).damages
    assert (damage.file, damage.rows) == (directory.partial.name, ())
    assert "export" in damage.then


@pytest.mark.parametrize("what", ["gone", "changed"])
def test_an_export_works_without_the_input(runs: Runs, tmp_path: Path, what: str) -> None:
    """Rows that were never read say why they have no columns."""
    directory = runs.copy("killed", tmp_path / "run")
    source, whole = runs.folder / "in.jsonl", (runs.folder / "in.jsonl").read_bytes()
    try:
        source.unlink()
        if what == "changed":
            write_rows(source, 3)
        exported = export(directory)
    finally:
        source.write_bytes(whole)
    table = pq.read_table(directory.partial)
    assert table.column("row").to_pylist() == list(range(ROWS))
    assert settled(table).column("text").null_count == 0
    assert table.column("text")[ROWS - 1].as_py() is None
    assert "in.jsonl" in str(exported.problem)
    assert "no input columns" in "\n".join(in_words(exported))


def test_a_missing_parquet_input_leaves_its_columns(tmp_path: Path) -> None:
    source = tmp_path / "in.parquet"
    text = pa.field("text", pa.string(), nullable=False)
    given = pa.table({"text": [f"item {row}" for row in range(100)], "n": pa.array(range(100), pa.int16())})
    pq.write_table(given.cast(pa.schema([text, given.schema.field("n")])), source)
    more = "[output]\nchunk_rows = 10\n[budget]\nmax_requests = 25\n[limits]\nmax_in_flight = 1"
    with running_simulator() as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, more)
        assert batchrun("run", job, "-o", tmp_path / "run").exit_code == 4
    source.unlink()
    export(RunDirectory(tmp_path / "run"), tmp_path / "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.schema.field("n").type == pa.int16()
    assert by_status(table)[PENDING] == 75
    numbers = table.column("n").to_pylist()
    opened = numbers.index(None)
    assert 25 <= opened < 100
    assert numbers == [*range(opened), *[None] * (100 - opened)]


# ── other runs ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["done", "in-parts"])
def test_a_complete_run_is_copied_on_request(runs: Runs, tmp_path: Path, name: str) -> None:
    directory = RunDirectory(runs.folder / name)
    before = snapshot(directory.path)
    ended = batchrun("export", directory.path)
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert "the run is complete" in ended.stdout
    export(directory, tmp_path / "copy.parquet")
    assert pq.read_table(tmp_path / "copy.parquet").select(SAME) == runs.undisturbed.select(SAME)
    footer: dict[str, Any] = files.read_footer(tmp_path / "copy.parquet") or {}
    assert (footer["complete"], footer["rows_in_output"]) == (True, ROWS)
    assert snapshot(directory.path) == before


def test_a_row_sent_again_keeps_its_record(runs: Runs, tmp_path: Path) -> None:
    """Until the new one is there."""
    directory = runs.copy("done", tmp_path / "run")
    truncated = by_status(runs.undisturbed)["truncated"]
    assert truncated > 10
    flags = ["--retry-failed", "--status", "truncated", "--set", "request.max_tokens=41"]
    spent = str(len(pq.read_table(directory.usage)) and ROWS + 5)
    job = runs.folder / "file.toml"
    ended = batchrun("run", job, "-o", directory.path, *flags, "--set", f"budget.max_requests={spent}")
    assert ended.exit_code == 4, ended
    export(directory)
    table = pq.read_table(directory.partial)
    assert PENDING not in by_status(table)
    assert table.column("content").null_count == 0
    assert Counter(table.column("variant").to_pylist()) == {0: ROWS - 5, 1: 5}


def test_a_stopped_pilot_exports_its_rows(runs: Runs, tmp_path: Path) -> None:
    limits = ["--limit", "100", "--set", "budget.max_requests=40"]
    ended = batchrun("run", runs.folder / "file.toml", "-o", tmp_path / "run", *limits)
    assert ended.exit_code == 4, ended
    exported = export(RunDirectory(tmp_path / "run"))
    assert (exported.rows, exported.pending) == (100, 60)


# ── what is refused ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("target", "what"),
    [
        ("run/completions.parquet", "is in the run directory"),
        ("run/../run/x.parquet", "is in the run directory"),
        ("folder", "is a directory"),
        ("nowhere/x.parquet", "there is no directory"),
        ("/dev/null", "is not a regular file"),
        ("in.jsonl", "is the run's input"),
    ],
)
def test_no_other_file_is_overwritten(runs: Runs, tmp_path: Path, target: str, what: str) -> None:
    directory = runs.copy("killed", tmp_path / "run")
    (tmp_path / "folder").mkdir()
    (tmp_path / "in.jsonl").symlink_to(runs.folder / "in.jsonl")
    before = snapshot(tmp_path)
    with pytest.raises(JobError, match=what):
        export(directory, tmp_path / target)
    assert snapshot(tmp_path) == before
    assert Path("/dev/null").is_char_device()


def test_no_rows_are_no_export(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in ("empty", "nowhere"):
        ended = batchrun("export", tmp_path / place)
        assert (ended.exit_code, ended.stderr.count("\n")) == (2, 1)
        assert "no run here" in ended.stderr
    write_rows(tmp_path / "in.jsonl", 3)
    bad = write_job(tmp_path / "job.toml", "http://127.0.0.1:9", tmp_path / "in.jsonl", "[budget]\nmax_tokens = 1")
    assert batchrun("run", bad, "-o", tmp_path / "run").exit_code == 2
    with pytest.raises(InputError, match="run it again"):
        export(RunDirectory(tmp_path / "run"))


def test_active_and_damaged_runs_are_not_exported(runs: Runs, tmp_path: Path) -> None:
    directory = runs.copy("killed", tmp_path / "run")
    with directory.lock():
        assert batchrun("export", directory.path).exit_code == 6
    part = directory.part_of(0, 1)
    part.write_bytes(part.read_bytes()[:-100])
    ended = batchrun("export", directory.path)
    assert (ended.exit_code, ended.stderr.count("\n")) == (7, 1)
    assert not directory.partial.exists()


def test_an_interrupted_export_leaves_the_one_before(runs: Runs, tmp_path: Path) -> None:
    schema = runs.undisturbed.schema
    summary = read(RunDirectory(runs.folder / "done"))

    def cut() -> Iterator[pa.RecordBatch]:
        yield from runs.undisturbed.to_batches(50)[:2]
        raise InputError("the input ends here")

    (tmp_path / "x.parquet").write_bytes(b"before")
    with pytest.raises(InputError):
        partial.write(tmp_path / "x.parquet", cut(), schema, "zstd", summary)
    with pytest.raises(CheckpointError, match="the run has 200 rows, 100 were found"):
        partial.write(tmp_path / "x.parquet", runs.undisturbed.to_batches(50)[:2], schema, "zstd", summary)
    assert [path.name for path in tmp_path.iterdir()] == ["x.parquet"]
    assert (tmp_path / "x.parquet").read_bytes() == b"before"


# ── on the way out ────────────────────────────────────────────────────────────────────────────────────────────────────

STOPS = {
    "budget": (4, ["--set", "budget.max_requests=60"]),
    "cost": (4, ["--max-cost", "0.03"]),
    "deadline": (4, ["--deadline", "4s", "--set", "limits.requests_per_minute=600"]),
    "key": (5, []),
}


@pytest.mark.heavy
@pytest.mark.sampled(3)
@pytest.mark.parametrize("rows", ["rows", "no rows"])
@pytest.mark.parametrize("stop", STOPS)
def test_every_stop_exports_if_the_job_says(tmp_path: Path, stop: str, rows: str) -> None:
    source = write_rows(tmp_path / "in.jsonl", ROWS)
    exit_code, flags = STOPS[stop]
    revoked = Fault(kind="status", status=401, from_request=50)
    out = RunDirectory(tmp_path / "run")
    with running_simulator(SimulatorConfig(faults=(revoked,) if stop == "key" else ())) as simulator:
        more = f"[output]\nchunk_rows = 30\npartial = {'true' if rows == 'rows' else 'false'}"
        job = write_job(tmp_path / "job.toml", simulator.url, source, more)
        ended = batchrun("run", job, "-o", out.path, *flags)
    assert ended.exit_code == exit_code, ended
    summary = read_summary(out.path)
    usage = pq.read_table(out.usage)
    assert sum(cast(list[int], usage.column("rows").to_pylist())) == ROWS - summary["pending"] > 0
    assert summary["files"]["usage"] == str(out.usage)
    assert out.partial.exists() == (rows == "rows")
    if rows == "no rows":
        assert f"batchrun export {out.path}" in ended.stdout
        return
    table = pq.read_table(out.partial)
    assert summary["files"]["partial"] == str(out.partial)
    assert f"partial      {out.partial}" in ended.stdout
    assert (table.num_rows, by_status(table)[PENDING]) == (ROWS, summary["pending"])


def test_the_printed_export_command_works(tmp_path: Path) -> None:
    """In a shell, although the directory's name has a space and a byte that is not UTF-8."""
    source = write_rows(tmp_path / "in.jsonl", ROWS)
    out = RunDirectory(tmp_path / os.fsdecode(b"my r\xe9sum\xe9s"))
    with running_simulator() as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source)
        ended = batchrun("run", job, "-o", out.path, "--set", "budget.max_requests=60")
    assert ended.exit_code == 4, ended
    (command,) = (line.split(maxsplit=3)[3] for line in ended.stdout.splitlines() if line.startswith("rows so far"))
    assert read_summary(out.path)["export"] == command
    shown = batchrun("show", out.path).stderr
    assert f"{command} writes the rows so far" in shown
    assert command.startswith("batchrun export ")
    typed = f"{sys.executable} -c 'from batchrun.cli import main; main()' {command.removeprefix('batchrun ')}"
    subprocess.run(["bash", "-c", typed], check=True)
    assert pq.read_table(pa.BufferReader(out.partial.read_bytes())).num_rows == ROWS


def test_a_failed_export_keeps_the_stops_exit_code(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", ROWS)
    out = RunDirectory(tmp_path / "run")
    out.partial.with_name(out.partial.name + ".tmp").mkdir(parents=True)
    with running_simulator() as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, "[output]\npartial = true")
        ended = batchrun("run", job, "-o", out.path, "--set", "budget.max_requests=60")
    assert ended.exit_code == 4, ended
    assert f"batchrun export {out.path} writes the rows so far" in ended.stderr
    assert (read_summary(out.path)["state"], read_summary(out.path)["pending"]) == ("stopped", ROWS - 60)
    assert '"event":"export failed"' in out.log.read_text()


def test_a_signal_leaves_the_rows_too(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", ROWS)
    out = RunDirectory(tmp_path / "run")
    with running_simulator(SimulatorConfig(latency_s=0.1)) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, "[output]\nchunk_rows = 30\npartial = true")
        process = start("run", job, "-o", out.path)
        kill_when(process, (out.parts / "000001.input.arrow").exists, signal.SIGTERM)
        process.communicate()
    assert process.returncode == 143
    assert pq.read_metadata(out.partial).num_rows == ROWS
    assert by_status(pq.read_table(out.partial))[PENDING] == read_summary(out.path)["pending"]


def test_a_pending_row_lists_its_attempts() -> None:
    """How often it was sent, what that cost and how it ended."""
    own = own_table([completion(1)], keep_raw=False)
    tried = [discarded(2, 1, cost_pico_usd=pico("0.5")), discarded(2, 2, http_status=503, error_kind="overloaded")]
    rows = with_pending(own, 0, 5, {2: tried, 3: [discarded(3, cost_pico_usd=None)]}, {4: 3}).to_pylist()
    assert [row["status"] for row in rows] == ["pending", "ok", "pending", "pending", "pending"]
    assert [row["attempts"] for row in rows] == [0, 1, 2, 1, 3]
    assert [row["cost_usd"] for row in rows] == [0, Decimal("0.0000455"), Decimal("0.5"), None, 0]
    assert [row["error"] and row["error"]["kind"] for row in rows] == [
        *(None, None, "overloaded", "server_error", None),
    ]
    assert rows[0]["request_key"] is rows[0]["variant"] is None
