"""Where runs stand: one that was killed, many of them, and those of earlier nights at a start."""

import json
import shlex
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from batchrun import credentials
from batchrun.commands.run import ACCEPT_INPUT, flags_of, run
from batchrun.dispatch.run_status import RunStatus
from batchrun.limits.admission import Limit
from batchrun.limits.forecast import Forecast
from batchrun.report import resume_command, run_list, status
from batchrun.report.closing import in_words, pace
from batchrun.report.run_state import run_state
from batchrun.report.summary import Moment
from batchrun.report.wording import age_in_words
from batchrun.run_summary import Summary, TotalsLine
from batchrun.simulator import SimulatorConfig
from batchrun.store import run_path
from batchrun.store.rundir import RunDirectory
from tests.cli_process import KEY, KEY_ENV, batchrun, kill_when, read_summary, snapshot, start, write_job, write_rows
from tests.jobs import job_over
from tests.run.test_progress import summary
from tests.simulator_process import running_simulator

ROWS = 150
NOW = datetime(2026, 11, 28, 6, 0, tzinfo=UTC)


class Runs(NamedTuple):
    """Two runs of one job: `killed` a second after it began, and `done`; `job` is the job's file."""

    folder: Path
    job: Path

    @property
    def killed(self) -> Path:
        return self.folder / "runs" / "labels" / "2026-11-20"

    @property
    def done(self) -> Path:
        return self.folder / "runs" / "labels" / "2026-11-21"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("nights")
    source = write_rows(folder / "in.jsonl", ROWS)
    with running_simulator(SimulatorConfig(latency_s=0.2, ledger=str(folder / "ledger"))) as simulator:
        made = Runs(folder, write_job(folder / "labels.toml", simulator.url, source, "[limits]\nmax_in_flight = 16"))
        process = start("run", made.job, "-o", made.killed)
        kill_when(process, lambda: len(simulator.ledger()) >= 64)
        process.communicate()
        assert batchrun("run", made.job, "-o", made.done).exit_code == 0
        yield made


# ── a run that was killed ─────────────────────────────────────────────────────────────────────────────────────────────


def test_status_after_a_kill_reads_the_disk(runs: Runs) -> None:
    """Soon after a kill, `status` reports what is on disk and touches nothing."""
    before = snapshot(runs.killed)
    found = run_state(RunDirectory(runs.killed))
    assert found.died
    assert found.summary.rows - found.summary.pending >= 48
    assert sum(found.summary.by_status.values()) == found.summary.rows - found.summary.pending
    ended = batchrun("status", runs.killed)
    assert (ended.exit_code, ended.stderr) == (0, "")
    done = ROWS - found.summary.pending
    assert f"rows    {done} of {ROWS} done, {found.summary.pending} pending" in ended.stdout
    assert "died; run the same command again to resume" in ended.stdout
    assert snapshot(runs.killed) == before


def test_status_after_a_kill_matches_the_resume(runs: Runs, tmp_path: Path) -> None:
    """What it reports is what the next start finds."""
    shutil.copytree(runs.killed, tmp_path / "run")
    found = run_state(RunDirectory(tmp_path / "run")).summary
    assert 1 <= found.possibly_billed_count <= 16
    ended = batchrun("run", runs.job, "-o", tmp_path / "run")
    assert ended.exit_code == 0
    done, cost = ROWS - found.pending, found.cost_usd
    assert f"{done} of {ROWS} rows done, ${cost:.6f} spent" in ended.stderr
    after = msgspec.convert(read_summary(tmp_path / "run"), Summary)
    assert after.possibly_billed_count == found.possibly_billed_count
    assert after.possibly_billed_usd == found.possibly_billed_usd
    assert found.totals == [line for line in after.totals if line.invocation == 1]


@pytest.mark.parametrize("harm", ["gone", "garbage", "cut"])
def test_status_reports_an_unreadable_disk(runs: Runs, tmp_path: Path, harm: str) -> None:
    """It shows the last known state beside the error."""
    shutil.copytree(runs.killed, tmp_path / "run")
    directory = RunDirectory(tmp_path / "run")
    if harm == "gone":
        directory.checkpoint.unlink()
    else:
        whole = directory.checkpoint.read_bytes()
        directory.checkpoint.write_bytes(bytes(4096) if harm == "garbage" else whole[:1000])
        directory.checkpoint.with_name("checkpoint.db-wal").unlink()
    lines = list(status.lines(directory, run_state(directory)))
    assert any("this may be out of date" in line and "checkpoint.db" in line for line in lines), lines
    assert run_state(directory).died


# ── many runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.heavy
def test_status_lists_unfinished_runs_first(runs: Runs) -> None:
    """Each unfinished run has the command that finishes it."""
    header, first, second, last = batchrun("status", runs.folder / "runs").stdout.splitlines()
    assert header.split() == ["state", "done", "rows", "failed", "pending", "cost", "age", "run", "next"]
    assert first.startswith("died ")
    assert first.endswith(f"{runs.killed}  batchrun run {runs.job} -o {runs.killed}")
    assert second.startswith("complete ")
    assert second.split()[1:5] == [str(ROWS), str(ROWS), "0", "0"]
    assert second.endswith(str(runs.done))
    assert last == "2 runs, 1 unfinished"
    for paths in ([runs.done, runs.killed], [runs.folder, runs.done], [runs.killed, runs.folder / "runs"]):
        assert batchrun("status", *paths).stdout.splitlines()[1].startswith("died ")
        assert batchrun("status", *paths).stdout.splitlines()[-1] == last


def test_the_command_that_status_names_finishes_the_run(runs: Runs, tmp_path: Path) -> None:
    shutil.copytree(runs.killed, tmp_path / "runs" / "a night")
    (reported,) = json.loads(batchrun("status", tmp_path / "runs", "--json").stdout)
    words = shlex.split(reported["next"])
    assert words[:2] == ["batchrun", "run"]
    assert batchrun(*words[1:]).exit_code == 0
    assert batchrun("status", tmp_path / "runs", "--exit-code").exit_code == 0


def test_a_refused_start_leaves_the_command_that_resumes(runs: Runs, tmp_path: Path) -> None:
    """`status` never names a command that was refused: a retry while rows are pending, a changed prompt."""
    night = shutil.copytree(runs.killed, tmp_path / "runs" / "night")
    (before,) = json.loads(batchrun("status", night, "--json").stdout)
    for more in (["--retry-failed", "--set", "request.max_tokens=7"], ["--set", "request.prompt=else"]):
        assert batchrun("run", runs.job, "-o", night, *more).exit_code == 2
        (after,) = json.loads(batchrun("status", night, "--json").stdout)
        assert (after["state"], after["next"]) == ("failed", before["next"])


def test_status_json_is_complete_for_programs(runs: Runs) -> None:
    """It has every field, and the exit code serves a scheduler."""
    ended = batchrun("status", runs.folder / "runs", "--json", "--exit-code")
    killed, done = json.loads(ended.stdout)
    assert tuple(killed) == tuple(done) == run_list.ListedRun.__struct_fields__
    assert (killed["job"], killed["state"], killed["complete"], killed["working"]) == ("labels", "died", False, False)
    assert killed["done"] + killed["pending"] == killed["rows"] == ROWS
    assert Decimal(done["cost_usd"]) > 0
    assert done["next"] is None
    assert ended.exit_code == 4
    assert batchrun("status", runs.killed, "--exit-code").exit_code == 4
    assert batchrun("status", runs.done, "--exit-code").exit_code == 0
    assert json.loads(batchrun("status", runs.done, "--json").stdout)[0]["state"] == "complete"


def test_status_ignores_foreign_files_names_damaged_runs(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    shutil.copytree(runs.done, folder / "night")
    (folder / "report").mkdir()
    (folder / "report" / "summary.json").write_text('{"total": 3}')
    (folder / "night" / "parts" / "summary.json").write_text("{}")
    (folder / "latest").symlink_to("night")
    assert [night.path for night in run_list.collect([folder], NOW)] == [str(folder / "night")]
    (folder / "night" / "summary.json").write_text('{"run_id": 3')
    (unreadable,) = run_list.collect([folder], NOW)
    assert (unreadable.state, unreadable.unfinished) == ("unreadable", True)
    assert batchrun("status", folder, "--exit-code").exit_code == 7
    for place in (tmp_path / "nowhere", folder / "report"):
        ended = batchrun("status", place)
        assert (ended.exit_code, ended.stderr.count("\n")) == (2, 1)
        assert "no run here" in ended.stderr


def test_a_run_at_work_is_not_unfinished(runs: Runs, tmp_path: Path) -> None:
    shutil.copytree(runs.killed, tmp_path / "run")
    with RunDirectory(tmp_path / "run").lock():
        (night,) = run_list.collect([tmp_path / "run"], NOW)
    assert (night.state, night.working, night.unfinished, night.next) == ("running", True, False, None)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "batchrun run a.toml"),
        ({"input_path": "x y.jsonl", "date": "2026-11-20", "new": True}, "batchrun run a.toml -i 'x y.jsonl'"),
        ({"max_cost_usd": Decimal("1E+1"), "max_failures": 0}, "batchrun run a.toml --max-cost 10 --max-failures 0"),
        (
            {"overrides": ("a.b=1", "c.d=it's"), "deadline": "6h"},
            "batchrun run a.toml --set a.b=1 --set 'c.d=it'\"'\"'s'",
        ),
        ({"retry_failed": True, "statuses": "error"}, "batchrun run a.toml --retry-failed --status error"),
        ({"skip_invalid": False, "limit": 3, "grace_s": Decimal(3)}, "batchrun run a.toml"),
    ],
)
def test_the_resume_command_is_complete(options: dict[str, object], expected: str) -> None:
    assert resume_command.command({"job": Path("a.toml"), **options}, flags_of(run)) == expected


def test_a_resume_has_every_lasting_flag() -> None:
    """Any other flag of `batchrun run`, a future one too, is in the command that resumes."""
    flags = flags_of(run)
    words = resume_command.command({"job": "a.toml", **dict.fromkeys(flags, True)}, flags).split()[3:]
    names_the_run = {"-o", "--state-dir", "--date", "--new"}
    of_one_start = {"--deadline", "--limit", "--grace", "--accept-changes", "--accept-canary", ACCEPT_INPUT}
    assert set(words) == set(flags.values()) - names_the_run - of_one_start


def test_the_command_in_the_summary_has_no_key(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    job = job_over("in.jsonl", endpoint={"url": "http://127.0.0.1:9", "api_key_env": KEY_ENV})
    keys = credentials.read(job.endpoint, {KEY_ENV: KEY})
    RunStatus("job", directory, keys, f"batchrun run a.toml --set request.user={KEY}").close()
    assert "batchrun run a.toml --set request.user=" in directory.summary.read_text()
    assert KEY not in directory.summary.read_text()


@pytest.mark.parametrize(
    ("age_s", "words"), [(-3, "0 s"), (59.9, "59 s"), (60, "1 min"), (7199, "1 h"), (86_400 * 40, "40 d")]
)
def test_an_age_uses_its_largest_unit(age_s: float, words: str) -> None:
    assert age_in_words(age_s) == words


# ── earlier runs, at a start ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.heavy
def test_a_start_names_earlier_unfinished_runs(runs: Runs, tmp_path: Path) -> None:
    """Only those of its own job and output pattern."""
    pattern = str(tmp_path / "runs" / "{job}" / "{date}")
    for date, kind in (("2026-11-18", runs.killed), ("2026-11-19", runs.killed), ("2026-11-20", runs.done)):
        shutil.copytree(kind, tmp_path / "runs" / "labels" / date)
    shutil.copytree(runs.killed, tmp_path / "elsewhere" / "2026-11-19")
    ended = batchrun("run", runs.job, "--set", f'output.path="{pattern}"', "--date", "2026-11-21")
    assert ended.exit_code == 0
    reported = [line for line in ended.stderr.splitlines() if "unfinished" in line]
    assert reported == [
        "earlier runs of this job are unfinished: 2026-11-18, 2026-11-19; "
        "this command with --date 2026-11-18 finishes the first"
    ]
    ended = batchrun("run", runs.job, "--set", f'output.path="{pattern}"', "--date", "2026-11-18")
    assert "an earlier run of this job is unfinished: 2026-11-19; this command with --date 2026-11-19" in ended.stderr

    def unfinished(pattern: str, name: str = "labels") -> list[str]:
        job = msgspec.structs.replace(job_over(None, output={"path": pattern}), name=name)
        return [date for date, _ in run_path.unfinished(job, tmp_path)]

    with RunDirectory(tmp_path / "runs" / "labels" / "2026-11-19").lock():
        assert unfinished(pattern) == []
    assert unfinished(pattern) == ["2026-11-19"]
    assert unfinished(pattern, "another") == []
    assert unfinished(str(tmp_path / "runs/labels/2026-11-19")) == []


# ── rates, and the first seconds ──────────────────────────────────────────────────────────────────────────────────────


def spent(**changes: Any) -> Summary:
    totals = [TotalsLine(1, "m", "ok", rows=348, attempts=348, total_tokens=6_960)]
    whole = summary(totals=totals, elapsed_s=10.0, requests_per_minute=2_087.4, tokens_per_minute=41_760.0)
    return msgspec.structs.replace(whole, **changes)


@pytest.mark.parametrize(
    ("changes", "limit", "expected"),
    [
        ({}, 1_500, "348 requests, 6,960 tokens in 10.0 s (1,500 requests/min allowed)"),
        ({}, None, "348 requests, 6,960 tokens in 10.0 s"),
        ({"elapsed_s": 600.0, "requests_per_minute": 1_487.2}, 1_500, "1,487 requests/min of 1,500 allowed, "),
        (
            {"elapsed_s": 65.0, "requests_per_minute": 1_523.0},
            1_500,
            "1,523 requests/min (1,500 allowed after the first burst), ",
        ),
        ({"elapsed_s": 600.0, "requests_per_minute": 0.5}, 0.5, "0 requests/min of 0.5 allowed, "),
    ],
)
def test_a_shown_rate_never_exceeds_the_limit(changes: dict[str, object], limit: float | None, expected: str) -> None:
    (rate,) = [
        line for line in in_words(spent(**changes), requests_per_minute=limit, max_failures=0) if "rate " in line
    ]
    assert rate.startswith(f"rate         {expected}")


@pytest.mark.heavy
def test_a_short_run_reports_counts_not_rates(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", ROWS)
    with running_simulator() as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, "[limits]\nrequests_per_minute = 1500")
        ended = batchrun("run", job, "-o", tmp_path / "run")
    (rate,) = [line for line in ended.stdout.splitlines() if line.startswith("rate ")]
    assert rate.startswith(f"rate         {ROWS} requests, ")
    assert rate.endswith(" s (1,500 requests/min allowed)")


def test_a_run_predicts_nothing_in_its_first_seconds() -> None:
    def eta(seen_s: float) -> datetime | None:
        forecast = Forecast(10.0, 100.0, 30.0, Limit.LATENCY, seen_s)
        return Moment("running", 1, NOW, NOW, seen_s, 10, "latency", 1, "h", forecast=forecast).eta

    assert eta(1.0) is None
    assert eta(6.0) == NOW + timedelta(seconds=30)
    assert pace(spent()) == "348 rows in 10 s"
    assert pace(spent(elapsed_s=90.0, rows_per_minute=232.0)) == "232 rows/min"


def test_a_run_shows_activity_within_one_second(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", 2_000)
    out = tmp_path / "run"
    with running_simulator(SimulatorConfig(latency_s=0.02, ledger=str(tmp_path / "ledger"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, "[limits]\nrequests_per_minute = 3000")
        process = start("run", job, "-o", out)
        kill_when(process, lambda: (out / "summary.json").exists() and read_summary(out)["by_status"])
        served = len(simulator.ledger())
        process.communicate()
    assert served < 3_000 / 60 * 4  # five seconds have 250 requests and more
