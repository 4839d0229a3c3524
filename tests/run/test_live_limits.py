"""A run while it works: its deadline, its limits, its progress. Real processes against the simulator's ledger."""

import json
import re
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from batchrun.dispatch import live_limits
from batchrun.dispatch.learned_limits import LearnedLimits
from batchrun.dispatch.live_limits import ControlFile, LimitChange
from batchrun.errors import JobError
from batchrun.job.settings import Budget, Limits
from batchrun.run_summary import InForce
from batchrun.simulator import SimulatorConfig
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.rundir import RunDirectory
from tests.cli_process import batchrun, finish, read_summary, start, wait_until, write_job, write_rows
from tests.endings import completion
from tests.simulator_process import running_simulator

SLOW = "[limits]\nrequests_per_minute = 600\nmax_in_flight = 8\n"


ALL = (
    "900 requests/s, 60,000 requests/min, 5,000 requests/day, 9,000,000 tokens/min, 8,000,000 input tokens/min, "
    "7,000,000 output tokens/min, 4 in flight, $6 in all"
)


def log(out: Path, event: str) -> list[dict[str, Any]]:
    """The lines of run.log about one kind of event."""
    lines = map(json.loads, (out / "run.log").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def has_log(out: Path, event: str) -> bool:
    return (out / "run.log").exists() and bool(log(out, event))


# ── the deadline ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.heavy
def test_a_deadline_drains_the_start_in_time(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", 200), tmp_path / "out"
    config = SimulatorConfig(latency_s=0.2, latency_sigma=0, ledger=str(tmp_path / "ledger"))
    with running_simulator(config) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, SLOW)
        ended = batchrun("run", job, "-o", out, "--deadline", "4s")
        assert ended.exit_code == 4, ended.stderr
        summary = read_summary(out)
        assert summary["reason"].startswith("the deadline (")
        ended_at, deadline = (datetime.fromisoformat(summary[name]) for name in ("updated_at", "deadline"))
        assert ended_at <= deadline + timedelta(seconds=1)  # what follows the last answer, on a busy machine
        assert summary["elapsed_s"] > 4 - 0.2 - 2  # a beat and more before it, on a busy machine
        served = len(simulator.ledger())
        assert (summary["possibly_billed_count"], 200 - summary["pending"]) == (0, served)
        assert ended.stderr.count("warning: at 600 requests a minute no more than") == 1
        assert log(out, "behind")[0]["limited_by"] == "rpm"
        finished = batchrun("run", job, "-o", out, "--deadline", "6h", "--set", "limits.requests_per_minute=60000")
        assert finished.exit_code == 0, finished.stderr
        assert len(simulator.ledger()) == 200
    assert batchrun("verify", out).exit_code == 0


def test_an_impossible_deadline_is_reported_early(tmp_path: Path) -> None:
    """The day has too few requests for the rows; the start says so before the first request."""
    source, out = write_rows(tmp_path / "in.jsonl", 20), tmp_path / "out"
    with running_simulator() as simulator:
        more = "[limits]\nrequests_per_day = 3\nrequests_per_second = 50\n"
        job = write_job(tmp_path / "job.toml", simulator.url, source, more)
        ended = batchrun("run", job, "-o", out, "--deadline", "2s")
    assert ended.exit_code == 4, ended.stderr
    assert ended.stderr.count("warning: at 3 requests a day no more than") == 1
    assert log(out, "behind")[0]["limited_by"] == "requests per day"
    in_force = read_summary(out)["limits"]
    assert (in_force["requests_per_second"], in_force["requests_per_day"]) == (50, 3)


def test_requests_beyond_the_grace_are_named(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", 20), tmp_path / "out"
    with running_simulator(SimulatorConfig(latency_s=60, latency_sigma=0)) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, "[limits]\nmax_in_flight = 4\n")
        ended = batchrun("run", job, "-o", out, "--deadline", "3s", "--grace", "0.3")
    assert ended.exit_code == 4, ended.stderr
    summary = read_summary(out)
    assert (summary["pending"], summary["possibly_billed_count"]) == (20, 4)
    assert {entry["cause"] for entry in summary["possibly_billed"]} == {"aborted"}


def test_a_past_deadline_sends_nothing(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", 20), tmp_path / "out"
    with running_simulator(SimulatorConfig(ledger=str(tmp_path / "ledger"))) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source)
        ended = batchrun("run", job, "-o", out, "--deadline", "0.01s")
        assert (ended.exit_code, simulator.ledger()) == (4, [])
    refused = batchrun("run", job, "-o", out, "--deadline", "soon")
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)


def test_falling_behind_names_the_tightest_limit(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", 500), tmp_path / "out"
    with running_simulator(SimulatorConfig(latency_s=0.2, latency_sigma=0)) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, "[limits]\nmax_in_flight = 4\n")
        process = start("run", job, "-o", out, "--deadline", "15s")
        wait_until(lambda: has_log(out, "behind"), process)
        process.terminate()
        ended = finish(process)
    assert "% of the rows will be done by " in ended.stderr
    assert "limited by in flight" in ended.stderr
    (reported,) = log(out, "behind")
    assert 0.1 < reported["share"] < 0.9


# ── other limits ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.heavy
def test_a_running_process_takes_new_limits(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", 300), tmp_path / "out"
    with running_simulator(SimulatorConfig(latency_s=0.02, ledger=str(tmp_path / "ledger"))) as simulator:
        more = "[limits]\nrequests_per_minute = 30\nmax_in_flight = 8\n[budget]\nmax_cost_usd = 5\n"
        job = write_job(tmp_path / "job.toml", simulator.url, source, more)
        process = start("run", job, "-o", out)
        wait_until(lambda: simulator.ledger(), process)
        too_many = batchrun("tune", out, "--max-in-flight", "9")
        assert (too_many.exit_code, too_many.stdout) == (2, "")
        assert "max_in_flight can be at most 8" in too_many.stderr
        assert "limits  30 requests/min, 8 in flight, $5 in all\n" in batchrun("status", out).stdout
        wrong = batchrun("tune", out, "--rpm", "0")
        assert (wrong.exit_code, wrong.stderr) == (2, "Error: --rpm 0: expected a number above 0, at most 1e12\n")
        newer = ("--rps", "900", "--rpd", "5000", "--tpm", "9000000", "--input-tpm", "8e6", "--output-tpm", "7e6")
        tuned = batchrun("tune", out, "--rpm", "60000", "--max-in-flight", "4", "--max-cost", "6", *newer)
        assert tuned.exit_code == 0, tuned.stderr
        assert tuned.stdout == f"accepted: {ALL}\n"
        ended = finish(process)  # at 30 a minute it would have taken ten
    assert ended.exit_code == 0, ended.stderr
    assert f"limits now: {ALL}" in ended.stderr
    assert [line["requests_per_minute"] for line in log(out, "tuned")] == [60000.0]
    assert read_summary(out)["limits"]["max_in_flight"] == 4
    assert not (out / "control.json").exists()
    assert batchrun("verify", out).exit_code == 0
    late = batchrun("tune", out, "--rpm", "10")
    assert (late.exit_code, late.stderr.count("\n")) == (2, 1)
    assert "no process is running there" in late.stderr


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (6000.0, "6,000 requests/min, 8 in flight"),
        (
            1318.44,
            "1,318 requests/min, 8 in flight "
            "(limits in force: the server's headers or refusals allow less than 6,000 requests/min)",
        ),
        (2.5, "2.5 requests/min, 8 in flight (limits in force: the server's headers or refusals allow less than 6,000"),
    ],
)
def test_a_lower_rate_says_why(now: float, words: str) -> None:
    wish = live_limits.parse({"requests_per_minute": "6000"})
    limits = InForce(requests_per_minute=now, tokens_per_minute=None, max_in_flight=8)
    assert live_limits.describe(wish, limits).startswith(words)
    assert ("allow less" in live_limits.describe(wish, limits)) == (now < 6000)


def test_a_cap_below_spending_ends_the_run(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", 300), tmp_path / "out"
    with running_simulator(SimulatorConfig(latency_s=0.05, ledger=str(tmp_path / "ledger"))) as simulator:
        more = "[limits]\nmax_in_flight = 4\nrequests_per_minute = 600\n[budget]\nmax_requests = 1000\n"
        job = write_job(tmp_path / "job.toml", simulator.url, source, more)
        process = start("run", job, "-o", out)
        wait_until(lambda: len(simulator.ledger()) > 10, process)
        assert batchrun("tune", out, "--max-requests", "5").exit_code == 0
        ended = finish(process)
        assert ended.exit_code == 4, ended.stderr
        assert "raise budget.max_requests and run again" in ended.stdout
        assert 300 - read_summary(out)["pending"] == len(simulator.ledger())


def test_an_invalid_control_file_changes_nothing(tmp_path: Path) -> None:
    """It is one line in the log."""
    source, out = write_rows(tmp_path / "in.jsonl", 300), tmp_path / "out"
    with running_simulator(SimulatorConfig(latency_s=0.02)) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, SLOW)
        process = start("run", job, "-o", out)
        wait_until(lambda: has_log(out, "started"), process)
        for content in (b"\xff{", b'{"id": "x", "requests_per_hour": 5}', b'{"id": "x", "max_in_flight": 0}'):
            ignored = len(log(out, "control ignored"))
            (out / "control.json").write_bytes(content)
            wait_until(lambda ignored=ignored: len(log(out, "control ignored")) > ignored, process)
        process.terminate()
        ended = finish(process)
    assert ended.exit_code == 143, ended.stderr
    assert ended.stderr.count("control.json is ignored: ") == 3
    limits = {name: value for name, value in read_summary(out)["limits"].items() if value is not None}
    assert limits == {"requests_per_minute": 600, "max_in_flight": 8}
    assert read_summary(out)["tuned"] is None
    assert not (out / "control.json").exists()


def test_a_new_process_ignores_old_requests(tmp_path: Path) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", 20), tmp_path / "out"
    out.mkdir()
    (out / "control.json").write_text('{"id": "old", "requests_per_minute": 1}')
    with running_simulator(SimulatorConfig()) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source)
        assert batchrun("run", job, "-o", out).exit_code == 0
    assert log(out, "tuned") == []


# ── the file ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_control_file_is_read_once(tmp_path: Path) -> None:
    control_file = ControlFile(RunDirectory(tmp_path))
    assert control_file.read_new() is None
    (tmp_path / "control.json").write_text("1")
    assert [control_file.read_new(), control_file.read_new()] == [b"1", None]
    (tmp_path / "control.json").write_text("22")
    assert [control_file.read_new(), control_file.read_new()] == [b"22", None]


def test_every_wish_has_a_name_of_its_own() -> None:
    one, other = live_limits.parse({"max_tokens": "5"}), live_limits.parse({"max_tokens": "5"})
    assert one.id != other.id
    assert (one.max_tokens, one.requests_per_minute) == (5, None)
    assert isinstance(one, LimitChange)


def test_every_limit_of_a_job_is_tunable() -> None:
    """Except for what bounds a single request, and for how shards share limits."""
    single = {"max_output_tokens", "max_image_tokens", "limits_are"}
    over_time = {"per_start_usd", "per_day_usd", "per_month_usd", "name", "state", "time_zone"}
    assert {*Limits.__struct_fields__, *Budget.__struct_fields__} - single - over_time == live_limits.FLAGS.keys()
    reported = live_limits.parse(dict.fromkeys(live_limits.FLAGS, "7"))
    assert live_limits.decode(msgspec.json.encode(reported)) == reported


@pytest.mark.parametrize(
    ("limits", "problem"),
    [
        ({}, "nothing to change: name a limit, such as --rpm 500 or --max-in-flight 32"),
        ({"requests_per_minute": "0"}, "--rpm 0: expected a number above 0, at most 1e12"),
        ({"requests_per_minute": "nan"}, "--rpm nan: expected a number above 0, at most 1e12"),
        ({"requests_per_minute": "fast"}, "--rpm fast: expected a number above 0, at most 1e12"),
        ({"requests_per_second": ""}, "--rps '': expected a number above 0, at most 1e12"),
        ({"tokens_per_minute": "inf"}, "--tpm inf: expected a number above 0, at most 1e12"),
        ({"input_tokens_per_minute": "-1"}, "--input-tpm -1: expected a number above 0, at most 1e12"),
        ({"output_tokens_per_minute": "1e13"}, "--output-tpm 1e13: expected a number above 0, at most 1e12"),
        ({"requests_per_day": "0"}, "--rpd 0: expected a whole number of 1 or more"),
        ({"max_in_flight": "0"}, "--max-in-flight 0: expected a whole number from 1 to 4,096"),
        ({"max_in_flight": "5000"}, "--max-in-flight 5000: expected a whole number from 1 to 4,096"),
        ({"max_in_flight": "2.5"}, "--max-in-flight 2.5: expected a whole number from 1 to 4,096"),
        ({"max_cost_usd": "x"}, "--max-cost x: expected an amount in USD above 0, at most 10,000,000"),
        ({"max_cost_usd": "NaN"}, "--max-cost NaN: expected an amount in USD above 0, at most 10,000,000"),
        ({"max_cost_usd": "1e9"}, "--max-cost 1e9: expected an amount in USD above 0, at most 10,000,000"),
        ({"max_tokens": "0"}, "--max-tokens 0: expected a whole number of 1 or more"),
        ({"requests_per_minute": "5", "max_requests": "-1"}, "--max-requests -1: expected a whole number of 1 or more"),
    ],
)
def test_an_impossible_limit_names_its_flag(limits: dict[str, str], problem: str) -> None:
    with pytest.raises(JobError) as raised:
        live_limits.parse(limits)
    assert str(raised.value) == problem


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xff{", "expected a JSON object of limits"),
        (b"[1]", "expected a JSON object of limits"),
        (b"[" * 100_000, "expected a JSON object of limits"),
        (b'{"requests_per_minute": 5}', "id is missing: expected a text of 1 to 64 characters"),
        (b'{"id": 7}', "id 7: expected a text of 1 to 64 characters"),
        (
            b'{"id": "x", "requests_per_minute": "5"}',
            'requests_per_minute "5": expected a number above 0, at most 1e12',
        ),
        (b'{"id": "x", "requests_per_second": true}', "requests_per_second true: expected a number above 0, at most"),
        (b'{"id": "x", "max_in_flight": 0}', "max_in_flight 0: expected a whole number from 1 to 4,096"),
        (b'{"id": "x", "requests_per_day": 1.5}', "requests_per_day 1.5: expected a whole number of 1 or more"),
        (b'{"id": "x", "max_cost_usd": -1}', "max_cost_usd -1: expected an amount in USD above 0"),
        (b'{"id": "x", "max_tokens": [1, 2]}', "max_tokens [1, 2]: expected a whole number of 1 or more"),
        (b'{"id": "x", "requests_per_hour": 5}', "requests_per_hour: no such limit; there are requests_per_second, "),
    ],
)
def test_control_file_errors_are_plain_words(content: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}") as raised:
        live_limits.decode(content)
    assert not any(word in str(raised.value) for word in ("$", "Expected", "msgspec"))


def test_a_new_daily_limit_counts_today(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "checkpoint.db", free_reserve=lambda: False)
    try:
        checkpoint.start_invocation(0.0, 1, "host", "0")
        checkpoint.listen(lambda endings: None, lambda error: None)
        for row, at in enumerate((time.time(), time.time(), 86_400.0)):
            checkpoint.put(completion(row, finished_at=at))
        assert checkpoint.flushed()
        daily = LearnedLimits(checkpoint, Limits(), 0.0).count_day(6, 3, 0.0)
        assert not daily.is_spent(0.0)  # 2 have ended today, and 3 are out
        daily.take()
        assert daily.is_spent(0.0)
    finally:
        checkpoint.close()
