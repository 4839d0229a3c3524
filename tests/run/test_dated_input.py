"""`{date}` in `input.path` is the logical date: the run's own, whenever it is started again."""

from datetime import datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from batchrun.simulator import SimulatorConfig
from tests.cli_process import batchrun, read_summary, write_job, write_rows
from tests.simulator_process import running_simulator
from tests.timing import zone_before_midnight

ZONE = zone_before_midnight()
TODAY = datetime.now(ZoneInfo(ZONE)).date()
YESTERDAY = TODAY - timedelta(days=1)


@pytest.fixture(autouse=True)
def _no_day_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", ZONE)


@pytest.mark.heavy
def test_each_run_reads_the_input_of_its_date(tmp_path: Path) -> None:
    for day, rows in ((YESTERDAY, 3), (TODAY, 5)):
        write_rows(tmp_path / f"{day}.jsonl", rows)
    with running_simulator(SimulatorConfig(latency_s=0.02)) as simulator:
        job = write_job(
            tmp_path / "job.toml",
            simulator.url,
            f"{tmp_path}/{{date}}.jsonl",
            f'[output]\npath = "{tmp_path}/{{date}}"',
        )
        for arguments in ((), ("--date", str(YESTERDAY))):
            assert batchrun("check", job, *arguments).stdout.startswith("3 rows" if arguments else "5 rows")
            assert f"to send      {'3' if arguments else '5'} rows" in batchrun("estimate", job, *arguments).stdout
        stopped = batchrun("run", job, "--date", str(YESTERDAY), "--set", "budget.max_requests=1")
        assert stopped.exit_code == 4
        command = read_summary(tmp_path / str(YESTERDAY))["command"]
        assert command.endswith(f" --date {YESTERDAY}")
        resumed = batchrun("run", job)  # another day: the unfinished run resumes with its own input
        assert resumed.exit_code == 0, resumed.stderr
        assert read_summary(tmp_path / str(YESTERDAY))["rows"] == 3
        assert batchrun("run", job).exit_code == 0
        assert read_summary(tmp_path / str(TODAY))["rows"] == 5
        again = batchrun("run", job, "--date", str(TODAY), "--new")
        assert again.exit_code == 0
        assert read_summary(tmp_path / f"{TODAY}-2")["rows"] == 5
        assert len(simulator.ledger()) == 13


@pytest.mark.parametrize("command", ["check", "estimate", "run"])
def test_a_missing_input_of_a_date_is_named(tmp_path: Path, command: str) -> None:
    job = write_job(tmp_path / "job.toml", "http://127.0.0.1:9", f"{tmp_path}/in-{{date}}.jsonl")
    ended = batchrun(command, job, "--date", "2026-11-02", cwd=tmp_path)
    assert ended.exit_code == 2
    assert "in-2026-11-02.jsonl" in ended.stderr
    assert batchrun(command, job, "--date", "tomorrow", cwd=tmp_path).exit_code == 2


def test_partition_filters_choose_what_is_sent(tmp_path: Path) -> None:
    """By `{date}`, by --set; a filter that can't be meant is the same line in run, check and estimate."""
    for lang in ("de", "en"):
        for day, rows in ((YESTERDAY, 2), (TODAY, 3)):
            (folder := tmp_path / "in" / f"lang={lang}" / f"day={day}").mkdir(parents=True)
            write_rows(folder / "a.jsonl", rows)
    (tmp_path / "in" / "lang=it").mkdir()
    (tmp_path / "in" / "lang=it" / "a.parquet").write_bytes(b"of another format, and never opened")
    with running_simulator(SimulatorConfig(latency_s=0.01)) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, f"{tmp_path}/in", '[input.partitions]\nday = "{date}"')
        ended = batchrun("run", job, "-o", tmp_path / "a", "--date", str(YESTERDAY))
        assert (ended.exit_code, read_summary(tmp_path / "a")["rows"]) == (0, 4), ended.stderr
        chosen = ("--set", 'input.partitions.lang=["en"]', "--date", str(TODAY))
        ended = batchrun("run", job, "-o", tmp_path / "b", *chosen)
        assert (ended.exit_code, read_summary(tmp_path / "b")["rows"]) == (0, 3), ended.stderr
        again = batchrun("run", job, "-o", tmp_path / "b", *chosen[:-1], str(YESTERDAY))
        assert again.exit_code == 2  # another day is a changed input
        lines = set()
        for command in ("run", "check", "estimate"):
            ended = batchrun(command, job, "--set", "input.partitions.lang=fr", cwd=tmp_path)
            assert ended.exit_code == 2
            lines.add(ended.stderr)
        assert len(lines) == 1
        assert "match (5 in all)" in lines.pop()
