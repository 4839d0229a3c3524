"""The input or the job changes between starts: answers that fit are kept, and nothing is sent or given up silently."""

import json
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from batchrun.simulator import SimulatorConfig
from tests.cli_process import batchrun, kill_when, read_summary, snapshot, start, write_job
from tests.simulator_process import RunningSimulator, running_simulator

SMALL_CHUNKS = "[output]\nchunk_rows = 25\n"
SAME = ["id", "text", "note", "row", "request_key", "status", "content", "finish_reason"]
Record = dict[str, Any]


def records(rows: int) -> list[Record]:
    return [{"id": row, "text": f"item {row} " + "word " * (row % 7), "note": f"n{row}"} for row in range(rows)]


def write(path: Path, rows: list[Record]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def rows_of(out: Path) -> list[Record]:
    table = pq.read_table(out / "completions.parquet", columns=SAME, page_checksum_verification=True)
    return table.to_pylist()


def fresh(tmp_path: Path, simulator: RunningSimulator, rows: list[Record]) -> list[Record]:
    """What a run that never knew another input brings."""
    job = write_job(tmp_path / "fresh.toml", simulator.url, write(tmp_path / "fresh.jsonl", rows))
    out = tmp_path / f"fresh-{len(list(tmp_path.iterdir()))}"
    ended = batchrun("run", job, "-o", out)
    assert ended.exit_code == 0, ended.stderr
    return rows_of(out)


def inserted(rows: list[Record]) -> list[Record]:
    return [{"id": 900, "text": "new at the top", "note": "x"}, *rows]


def edited(rows: list[Record]) -> list[Record]:
    return [{**row, "text": row["text"] + "!"} if row["id"] in (3, 30) else row for row in rows]


def shuffled(rows: list[Record]) -> list[Record]:
    return random.Random(5).sample(rows, len(rows))


def deleted(rows: list[Record]) -> list[Record]:
    return [row for row in rows if row["id"] % 9]


def mixed(rows: list[Record]) -> list[Record]:
    chance = random.Random(11)
    kept = [row for row in shuffled(rows) if chance.random() > 0.2]
    return [*inserted(edited(kept)), *[dict(row) for row in kept[:5]]]  # five questions stand there twice


@pytest.mark.heavy
@pytest.mark.sampled(3)
@pytest.mark.parametrize("change", [inserted, edited, shuffled, deleted, mixed], ids=lambda change: change.__name__)
@pytest.mark.parametrize("killed", [False, True], ids=["finished", "unfinished"])
def test_a_changed_input_stops_with_its_cost(tmp_path: Path, change: Any, killed: bool) -> None:
    """By consent it sends what has no answer."""
    before, after = records(90), change(records(90))
    out = tmp_path / "out"
    source = write(tmp_path / "in.jsonl", before)
    ledger = str(tmp_path / "ledger")
    with running_simulator(SimulatorConfig(latency_s=0.05 if killed else 0, ledger=ledger)) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, SMALL_CHUNKS)
        process = start("run", job, "-o", out)
        if killed:
            kill_when(process, lambda: len(simulator.ledger()) >= 55)
        process.communicate()
        write(source, after)
        requested = len(simulator.ledger())
        refused = batchrun("run", job, "-o", out)
        if refused.exit_code:
            assert refused.exit_code == 2, refused.stderr
            for word in ("in.jsonl", "answers stay", "--accept-changes"):
                assert word in refused.stderr
            assert killed or len(simulator.ledger()) == requested  # what was in flight at a kill is still served
        else:
            assert killed, "what was paid for and is dropped needs consent"
        ended = batchrun("run", job, "-o", out, "--accept-changes")
        assert ended.exit_code == 0, ended.stderr
        served = simulator.ledger()
        lost = read_summary(out)["possibly_billed_count"]
        questions = Counter(line.question for line in served)
        assert rows_of(out) == fresh(tmp_path, simulator, after)
    wanted = len({row["text"] for row in before} | {row["text"] for row in after}) + (5 if change is mixed else 0)
    assert len(served) <= wanted + lost
    assert max(questions.values()) <= 2 + (lost > 0)


@pytest.mark.heavy
def test_rows_that_are_appended_are_no_change(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", records(60))
    with running_simulator(SimulatorConfig(ledger=str(tmp_path / "ledger"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, SMALL_CHUNKS)
        assert batchrun("run", job, "-o", tmp_path / "out").exit_code == 0
        write(source, records(100))
        ended = batchrun("run", job, "-o", tmp_path / "out")
        assert ended.exit_code == 0, ended.stderr
        assert "60 answers stay, 40 rows will be sent" in ended.stderr
        assert len(simulator.ledger()) == 100
        assert rows_of(tmp_path / "out") == fresh(tmp_path, simulator, records(100))


@pytest.mark.heavy
def test_a_column_that_no_question_uses_may_change(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", records(60))
    with running_simulator(SimulatorConfig(ledger=str(tmp_path / "ledger"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, SMALL_CHUNKS)
        assert batchrun("run", job, "-o", tmp_path / "out").exit_code == 0
        write(source, [{**row, "note": row["id"]} for row in records(60)])
        ended = batchrun("run", job, "-o", tmp_path / "out")
        assert ended.exit_code == 0, ended.stderr
        assert len(simulator.ledger()) == 60
    assert [row["note"] for row in rows_of(tmp_path / "out")] == list(range(60))


@pytest.mark.heavy
def test_a_refused_change_leaves_the_run_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", records(60))
    out = tmp_path / "out"
    with running_simulator() as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, SMALL_CHUNKS)
        assert batchrun("run", job, "-o", out).exit_code == 0
        before = {name: entry[3] for name, entry in snapshot(out).items() if name in ("summary.json",) or "pq" in name}
        result = (out / "completions.parquet").read_bytes()
        assert batchrun("run", job, "-o", out, "--set", "request.temperature=0.5").exit_code == 2
        write(source, deleted(records(60)))
        assert batchrun("run", job, "-o", out).exit_code == 2
        assert {name: snapshot(out)[name][3] for name in before} == before
        assert (out / "completions.parquet").read_bytes() == result
        assert sorted(path.name for path in out.iterdir()) == [
            "checkpoint.db",
            "completions.parquet",
            "parts",
            "run.log",
            "summary.json",
            "usage.parquet",
        ]
        write(source, records(60))
        again = batchrun("run", job, "-o", out)
        assert again.exit_code == 0
        assert "60 of 60 done" in again.stdout


@pytest.mark.heavy
def test_another_template_needs_the_users_consent(tmp_path: Path) -> None:
    """Then every row is sent again."""
    source = write(tmp_path / "in.jsonl", records(40))
    out = tmp_path / "out"
    with running_simulator(SimulatorConfig(ledger=str(tmp_path / "ledger"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, SMALL_CHUNKS)
        assert batchrun("run", job, "-o", out).exit_code == 0
        other = ("--set", "request.prompt=Tell: {{ text }}")
        ended = batchrun("run", job, "-o", out, *other)
        assert ended.exit_code == 2
        assert "request.prompt has changed: 0 answers stay, 40 rows will be sent, about $" in ended.stderr
        assert "40 paid answers no longer fit any row" in ended.stderr
        assert batchrun("run", job, "-o", out, *other, "--accept-changes").exit_code == 0
        assert len(simulator.ledger()) == 80
        assert batchrun("run", job, "-o", out, *other).exit_code == 0
        assert len(simulator.ledger()) == 80
    variants = pq.read_table(out / "completions.parquet", columns=["variant"]).column("variant").to_pylist()
    assert variants == [1] * 40
    summary = read_summary(out)
    assert sum(line["rows"] for line in summary["totals"]) == 40
    assert sum(line["attempts"] for line in summary["totals"]) == 80
    assert sum(summary["by_status"].values()) == 40


@pytest.mark.heavy
def test_a_pilot_of_first_rows_is_resumed(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", records(120))
    out = tmp_path / "out"
    with running_simulator(SimulatorConfig(ledger=str(tmp_path / "ledger"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, SMALL_CHUNKS)
        for limit, rows in (("10", 10), ("10", 10), ("60", 60), ("30", 60), (None, 120)):
            ended = batchrun("run", job, "-o", out, *(("--limit", limit) if limit else ()))
            assert ended.exit_code == 0, ended.stderr
            assert len(simulator.ledger()) == rows
            assert [row["row"] for row in rows_of(out)] == list(range(rows))
        assert rows_of(out) == fresh(tmp_path, simulator, records(120))


@pytest.mark.heavy
def test_a_shorter_input_always_needs_consent(tmp_path: Path) -> None:
    """Even if only rows without an answer are gone."""
    rows: list[Record] = [{"id": n, "text": f"item {n}", "note": ""} for n in range(60)]
    with running_simulator(SimulatorConfig(ledger=str(tmp_path / "ledger"))) as simulator:
        job, out = write_job(tmp_path / "job.toml", simulator.url, write(tmp_path / "in.jsonl", rows)), tmp_path / "out"
        assert batchrun("run", job, "-o", out, "--limit", "20").exit_code == 0
        write(tmp_path / "in.jsonl", rows[:59])
        refused = batchrun("run", job, "-o", out)
        assert refused.exit_code == 2
        assert "20 answers stay, 39 rows will be sent" in refused.stderr
        assert "; 1 fewer than before. Resume with --accept-changes" in refused.stderr
        assert len(simulator.ledger()) == 20
        assert batchrun("run", job, "-o", out, "--accept-changes").exit_code == 0
        assert len(simulator.ledger()) == 59


@pytest.mark.heavy
def test_a_kill_during_a_change_loses_nothing(tmp_path: Path) -> None:
    after = mixed(records(90))
    source = write(tmp_path / "in.jsonl", records(90))
    out = tmp_path / "out"
    with running_simulator(SimulatorConfig(ledger=str(tmp_path / "ledger"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, SMALL_CHUNKS)
        assert batchrun("run", job, "-o", out).exit_code == 0
        write(source, after)
        parts = out / "parts"
        for name in ("000001.g2.parquet", "000000.1.input.arrow", "000002.g3.parquet"):
            process = start("run", job, "-o", out, "--accept-changes")
            kill_when(process, lambda: (parts / name).exists() or process.poll() is not None)  # noqa: B023
            process.communicate()
        ended = batchrun("run", job, "-o", out, "--accept-changes")
        assert ended.exit_code == 0, ended.stderr
        served = simulator.ledger()
        lost = read_summary(out)["possibly_billed_count"]
        assert rows_of(out) == fresh(tmp_path, simulator, after)
    new = len({row["text"] for row in after} - {row["text"] for row in records(90)}) + 5
    assert len(served) <= 90 + new + lost


@pytest.mark.heavy
def test_a_late_limit_is_reported_and_sends_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", records(120))
    out = tmp_path / "out"
    with running_simulator(SimulatorConfig(latency_s=0.1, ledger=str(tmp_path / "ledger"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, SMALL_CHUNKS + "[limits]\nmax_in_flight = 8\n")
        kill_when(process := start("run", job, "-o", out), lambda: len(simulator.ledger()) >= 30, signal.SIGTERM)
        process.communicate()
        requested = len(simulator.ledger())
        ended = batchrun("run", job, "-o", out, "--limit", "10")
        assert ended.exit_code == 2
        started = ended.stderr.partition("at least --limit ")[2].partition(",")[0]
        assert requested <= int(started) < 120, ended.stderr
        assert len(simulator.ledger()) == requested
        assert batchrun("run", job, "-o", out, "--limit", started).exit_code == 0
        assert len(simulator.ledger()) == len(rows_of(out)) == int(started)


@pytest.mark.heavy
def test_a_pilot_over_changes_keeps_its_limit(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", records(120))
    out = tmp_path / "out"
    with running_simulator(SimulatorConfig(ledger=str(tmp_path / "ledger"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, SMALL_CHUNKS)
        pilot = ("--limit", "10", "--accept-changes")
        assert batchrun("run", job, "-o", out, *pilot).exit_code == 0
        write(source, inserted(edited(records(120))))
        ended = batchrun("run", job, "-o", out, *pilot)
        assert ended.exit_code == 0, ended.stderr
        assert len(simulator.ledger()) == 10 + 2, "the new row at the top and the edited one; the tenth answer stays"
        assert len(rows_of(out)) == 11
        assert batchrun("run", job, "-o", out).exit_code == 0
        assert rows_of(out) == fresh(tmp_path, simulator, inserted(edited(records(120))))
