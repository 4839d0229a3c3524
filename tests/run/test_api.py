"""`batchrun.run`: what the command line can do, from a program, and with jobs and rows made in code."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_type

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batchrun
from batchrun.job.job import Job
from batchrun.job.load import checked, load
from batchrun.simulator import SimulatorConfig, parse_faults
from tests import cli_process
from tests.cli_process import KEY, KEY_ENV, kill_when, snapshot, start, write_job, write_rows
from tests.simulator_process import RunningSimulator, running_simulator

ROOT = Path(__file__).parents[2]
MODEL = "vtrix-gpt-5.3-codex"
KEYS = {KEY_ENV: KEY}
MODULE: Any = batchrun  # no setting can be one


@pytest.fixture(scope="module")
def simulator() -> Iterator[RunningSimulator]:
    with running_simulator(SimulatorConfig(latency_s=0.01)) as running:
        yield running


def job_at(url: str, **tables: Any) -> Job:
    return Job(
        endpoint=batchrun.Endpoint(url=url, name="test", api_key_env=KEY_ENV),
        request=batchrun.RequestTemplate(model=MODEL, prompt="Say: {{ text }}", max_tokens=400),
        **tables,
    )


def texts(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [{"id": number, "text": f"item {number}"} for number in range(first, first + count)]


def result_of(summary: batchrun.Summary) -> list[dict[str, Any]]:
    return pq.read_table(summary.files["completions"]).to_pylist()


# ── jobs made in code ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("file", sorted((ROOT / "jobs").glob("*.toml")), ids=lambda file: file.name)
def test_jobs_in_code_equal_jobs_in_files(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    loaded = load(file)
    assert checked(loaded) == loaded
    assert checked(loaded).fingerprint() == loaded.fingerprint()


def test_jobs_in_code_send_the_same_questions(tmp_path: Path) -> None:
    file = write_job(tmp_path / "job.toml", "http://127.0.0.1:1/v1", "in.jsonl")
    file.write_text(file.read_text().replace("max_tokens = 40", "max_tokens = 400"))
    in_code = job_at("http://127.0.0.1:1/v1", input=batchrun.Input(path="in.jsonl"))
    assert checked(in_code) == load(file)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"limits": batchrun.Limits(max_in_flight=0)}, "limits.max_in_flight: expected an integer >= 1 (is 0)"),
        ({"limits": {"max_in_flihgt": 1}}, "limits.max_in_flihgt: unknown setting: did you mean limits.max_in_flight?"),
        ({"budget": batchrun.Budget(max_cost_usd=Decimal("NaN"))}, "budget.max_cost_usd: expected 0 to 10,000,000 USD"),
        ({"pricing": {"m": batchrun.Price(input=MODULE, output=Decimal(1))}}, "no setting takes a module"),
    ],
)
def test_mistakes_in_code_read_as_in_files(tmp_path: Path, change: Any, problem: str) -> None:
    with pytest.raises(batchrun.JobError) as caught:
        batchrun.run(job_at("simulator", **change), texts(1), output=tmp_path / "out")
    assert str(caught.value).startswith(problem)
    assert not (tmp_path / "out").exists()


def test_settings_take_paths_as_well_as_texts(tmp_path: Path) -> None:
    source: Any = write_rows(tmp_path / "in.jsonl", 1)
    assert checked(job_at("simulator", input=batchrun.Input(path=source))).input.path == str(source)


# ── rows made in code ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_given_rows_are_sent_once(tmp_path: Path, simulator: RunningSimulator) -> None:
    """A finished run is left as it is."""
    served = len(simulator.ledger())
    job = job_at(simulator.url)
    summary = batchrun.run(job, texts(30), output=tmp_path / "out", environ=KEYS)
    assert (summary.complete, summary.exit_code, summary.by_status) == (True, 0, {"ok": 30})
    assert [(row["id"], row["row"], row["status"]) for row in result_of(summary)] == [(n, n, "ok") for n in range(30)]
    before = snapshot(tmp_path / "out")
    again = batchrun.run(job, iter(texts(30)), output=tmp_path / "out", environ=KEYS)
    assert (again.complete, again.cost_usd) == (True, summary.cost_usd)
    assert snapshot(tmp_path / "out") == before
    assert len(simulator.ledger()) - served == 30


def test_a_table_equals_the_same_dicts(tmp_path: Path, simulator: RunningSimulator) -> None:
    table = pa.table({"text": [f"item {n}" for n in range(5)], "price": pa.array([Decimal("1.50")] * 5)})
    job = job_at(simulator.url)
    of_table = batchrun.run(job, table, output=tmp_path / "table", environ=KEYS)
    of_dicts = batchrun.run(job, texts(5), output=tmp_path / "dicts", environ=KEYS)
    assert pq.read_schema(of_table.files["completions"]).field("price").type == pa.decimal128(3, 2)
    keys = [[row["request_key"] for row in result_of(summary)] for summary in (of_table, of_dicts)]
    assert keys[0] == keys[1]
    assert batchrun.run(job, table, output=tmp_path / "table", environ=KEYS).complete


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"text": "a"}, ["b"]], "rows[1]: expected a dict with a value for each column (is a list)"),
        ([{"text": "a"}, {"text": b"b"}], "rows[1]: JSON can't represent it: Object of type bytes is not JSON"),
        ([{"text": "a"}, {"text": float("nan")}], "1 of 2 input records make no valid request"),
    ],
)
def test_an_unserialisable_row_is_named_early(
    tmp_path: Path, rows: Any, problem: str, simulator: RunningSimulator
) -> None:
    served, notes = len(simulator.ledger()), list[str]()
    with pytest.raises(batchrun.InputError) as caught:
        batchrun.run(job_at(simulator.url), rows, output=tmp_path / "out", environ=KEYS, note=notes.append)
    assert str(caught.value).startswith(problem)
    assert len(simulator.ledger()) == served


def test_rows_beside_a_path_are_refused(tmp_path: Path) -> None:
    job = job_at("simulator", input=batchrun.Input(path="in.jsonl"))
    with pytest.raises(batchrun.JobError, match=r"the call has rows and the job has in\.jsonl; keep one of them"):
        batchrun.run(job, texts(1), output=tmp_path / "out")


def test_the_built_in_simulator_answers_a_program_too(tmp_path: Path) -> None:
    job = job_at("simulator", simulator=batchrun.Simulator(latency_s=0))
    assert batchrun.run(job, texts(3), output=tmp_path / "out").by_status == {"ok": 3}


def test_changed_rows_send_only_what_lacks_answers(tmp_path: Path, simulator: RunningSimulator) -> None:
    job, out, served = job_at(simulator.url), tmp_path / "out", len(simulator.ledger())
    batchrun.run(job, texts(10), output=out, environ=KEYS)
    appended = batchrun.run(job, texts(12), output=out, environ=KEYS)
    assert (appended.rows, len(simulator.ledger()) - served) == (12, 12)
    before = (out / "completions.parquet").read_bytes()
    with pytest.raises(batchrun.ChangedError, match="9 answers stay, 1 row will be sent") as caught:
        batchrun.run(job, texts(10, 3), output=out, environ=KEYS)
    assert (caught.value.changes.rows, caught.value.changes.kept) == (10, 9)
    assert (out / "completions.parquet").read_bytes() == before
    assert batchrun.run(job, texts(12), output=out, environ=KEYS).complete
    changed = batchrun.run(job, texts(10, 3), output=out, environ=KEYS, accept_changes=True)
    assert [row["id"] for row in result_of(changed)] == list(range(3, 13))
    assert len(simulator.ledger()) - served == 13
    assert sorted(path.name for path in out.glob("input*")) == ["input.jsonl"]


# ── how a run ends ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stopped_run_raises_and_resumes(tmp_path: Path, simulator: RunningSimulator) -> None:
    """The exception has the summary; the same call resumes."""
    budget = batchrun.Budget(max_cost_usd=Decimal("0.02"))
    seen: list[batchrun.Summary] = []
    with pytest.raises(batchrun.RunIncompleteError) as caught:
        batchrun.run(
            job_at(simulator.url, budget=budget), texts(40), output=tmp_path / "out", environ=KEYS, progress=seen.append
        )
    summary = caught.value.summary
    assert (caught.value.exit_code, summary.state, summary.complete) == (batchrun.ExitCode.STOPPED, "stopped", False)
    assert "budget" in str(caught.value)
    assert 0 < summary.pending < 40
    served = len(simulator.ledger())
    rest = batchrun.run(job_at(simulator.url), texts(40), output=tmp_path / "out", environ=KEYS)
    assert rest.by_status == {"ok": 40}
    assert len(simulator.ledger()) - served == summary.pending


def test_failed_rows_are_data_and_no_exception(tmp_path: Path) -> None:
    faults = parse_faults("400=0.4")
    with running_simulator(SimulatorConfig(latency_s=0, faults=faults)) as strict:
        summary = batchrun.run(job_at(strict.url), texts(30), output=tmp_path / "out", environ=KEYS)
        assert summary.complete
        assert summary.exit_code == batchrun.ExitCode.TOO_MANY_FAILURES
        failed = summary.by_status["error"]
        retried = batchrun.run(
            job_at(strict.url), texts(30), output=tmp_path / "out", environ=KEYS, retry_failed=["error"]
        )
        assert retried.complete
        assert len(strict.ledger()) == 30 + failed
    with pytest.raises(batchrun.JobError, match="expected some of truncated"):
        batchrun.run(job_at(strict.url), texts(30), output=tmp_path / "out", environ=KEYS, retry_failed=["ok"])


@pytest.mark.parametrize("state", ["checking", "running"])
def test_what_a_callback_raises_ends_the_run_drained(tmp_path: Path, state: str) -> None:
    def progress(summary: batchrun.Summary) -> None:
        if summary.state == state:
            raise KeyError("a bug of the program's")

    with running_simulator(SimulatorConfig(latency_s=0.2)) as slow:
        job = job_at(slow.url, limits=batchrun.Limits(max_in_flight=2))
        with pytest.raises(KeyError):
            batchrun.run(job, texts(40), output=tmp_path / "out", environ=KEYS, progress=progress)
        summary = cli_process.read_summary(tmp_path / "out")
        settled = 0 if state == "checking" else summary["rows"] - summary["pending"]
        assert (summary["state"], summary["possibly_billed_count"]) == ("failed", 0)
        assert settled == len(slow.ledger()) < 40


def test_a_missing_key_is_reported_first(tmp_path: Path) -> None:
    with pytest.raises(batchrun.JobError, match=f"the environment variable {KEY_ENV} is not set"):
        batchrun.run(job_at("http://127.0.0.1:1/v1"), texts(1), output=tmp_path / "out", environ={})


def test_an_unknown_option_is_named() -> None:
    options: Any = {"limt": 3}
    with pytest.raises(TypeError, match="unknown option limt; expected some of output, "):
        batchrun.run(job_at("simulator"), texts(1), **options)


def test_a_running_loop_is_never_blocked_silently() -> None:
    async def ask() -> None:
        batchrun.run(job_at("simulator"), texts(1))

    with pytest.raises(RuntimeError, match=r"use `async with batchrun\.Runner"):
        asyncio.run(ask())


def test_another_thread_can_run_without_signals(tmp_path: Path, simulator: RunningSimulator) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    ended: list[batchrun.Summary] = []

    def ask() -> None:
        ended.append(batchrun.run(job_at(simulator.url), texts(5), output=tmp_path / "out", environ=KEYS))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert ended[0].complete
    batchrun.run(job_at(simulator.url), texts(5), output=tmp_path / "main", environ=KEYS)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


PROGRAM = """
import signal, sys
import batchrun

signal.signal(signal.SIGTERM, lambda *_: print("the program's own", flush=True))
try:
    batchrun.run(sys.argv[1], output=sys.argv[2])
except KeyboardInterrupt as interrupt:
    print("KeyboardInterrupt", interrupt.__cause__.summary.pending > 0, flush=True)
except batchrun.RunIncompleteError as stopped:
    print(stopped.exit_code.name, flush=True)
signal.raise_signal(signal.SIGTERM)
"""


@pytest.mark.heavy
@pytest.mark.parametrize(("number", "words"), [(signal.SIGINT, "KeyboardInterrupt True"), (signal.SIGTERM, "SIGTERM")])
def test_signals_drain_and_are_restored(tmp_path: Path, number: int, words: str) -> None:
    with running_simulator(SimulatorConfig(latency_s=0.3)) as slow:
        source = write_rows(tmp_path / "in.jsonl", 40)
        job = write_job(tmp_path / "job.toml", slow.url, source, "[limits]\nmax_in_flight = 4\n")
        command = [sys.executable, "-c", PROGRAM, str(job), str(tmp_path / "out")]
        environ = {**os.environ, KEY_ENV: KEY}
        process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
        kill_when(process, lambda: len(slow.ledger()) >= 4, number)
        out, _ = process.communicate(timeout=30)
    assert out.splitlines() == [words, "the program's own"]
    summary = cli_process.read_summary(tmp_path / "out")
    assert (summary["complete"], summary["possibly_billed_count"]) == (False, 0)


# ── one run, whoever starts it ────────────────────────────────────────────────────────────────────────────────────────


def test_command_line_and_library_share_runs(tmp_path: Path) -> None:
    rows = 60
    with running_simulator(SimulatorConfig(latency_s=0.05)) as slow:
        source = write_rows(tmp_path / "in.jsonl", rows)
        file = write_job(tmp_path / "job.toml", slow.url, source, "[limits]\nmax_in_flight = 4\n")
        file.write_text(file.read_text().replace("max_tokens = 40", "max_tokens = 400"))
        out = tmp_path / "out"
        _killed(slow, lambda: start("run", file, "-o", out), 15)
        limited = {"input": batchrun.Input(path=str(source)), "limits": batchrun.Limits(max_in_flight=4)}
        capped = job_at(slow.url, **limited, budget=batchrun.Budget(max_cost_usd=Decimal("0.04")))
        with pytest.raises(batchrun.RunIncompleteError):
            batchrun.run(capped, output=out, environ=KEYS)
        ended = cli_process.batchrun("run", file, "-o", out)
        assert ended.exit_code == 0, ended.stderr
        whole = batchrun.run(job_at(slow.url, **limited), output=out, environ=KEYS)
        assert (whole.by_status, whole.invocation) == ({"ok": rows}, 3)
        assert rows <= len(slow.ledger()) <= rows + 4


def _killed(simulator: RunningSimulator, begin: Callable[[], "subprocess.Popen[str]"], served: int) -> None:
    process = begin()
    kill_when(process, lambda: len(simulator.ledger()) >= served)
    process.communicate()


# ── the package ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_importing_the_package_is_light() -> None:
    """Every public name is there."""
    code = (
        "import sys, batchrun; loaded = set(sys.modules); assert not loaded & {'asyncio', 'msgspec', 'pyarrow'};"
        "print(all(getattr(batchrun, name) is not None for name in batchrun.__all__), hasattr(batchrun, 'xyzzy'));"
        "import batchrun.job, batchrun.api; print(set(batchrun.__all__) <= set(dir(batchrun)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.split() == ["True", "False", "True"]


if TYPE_CHECKING:

    def test_a_type_checker_sees_every_name() -> None:
        """Never run: the check of types fails where a line that is ignored here is not wrong."""
        summary = batchrun.run(Job(endpoint=batchrun.Endpoint(url="simulator")), [{"text": "a"}], limit=3)
        assert_type(summary, batchrun.Summary)
        batchrun.run("job.toml", limit="three")  # type: ignore[arg-type]
        batchrun.run("job.toml", limt=3)  # type: ignore[call-arg]
        batchrun.run("job.toml", 3)  # type: ignore[arg-type]
        batchrun.rum()  # type: ignore[attr-defined]
        batchrun.Limits(max_in_flihgt=3)  # type: ignore[call-arg]
