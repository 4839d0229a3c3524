"""`batchrun.Runner`: a run inside a program's own event loop, its completions one by one."""

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_type

import msgspec
import pyarrow.parquet as pq
import pydantic
import pytest

import batchrun
from batchrun.dispatch.result_queue import MAX_ROWS
from batchrun.simulator import SimulatorConfig, parse_faults
from batchrun.tables.rows import OWN_COLUMNS
from tests.cli_process import kill_when, read_summary, start, write_job, write_rows
from tests.run.test_api import KEYS, job_at, texts
from tests.simulator_process import RunningSimulator, running_simulator

IN_FLIGHT = batchrun.Limits(max_in_flight=4)


@pytest.fixture(scope="module")
def simulator() -> Iterator[RunningSimulator]:
    with running_simulator(SimulatorConfig(latency_s=0.01)) as running:
        yield running


@pytest.fixture(scope="module")
def slow() -> Iterator[RunningSimulator]:
    with running_simulator(SimulatorConfig(latency_s=0.1)) as running:
        yield running


async def read(runner: batchrun.Runner, upto: int | None = None) -> list[batchrun.Completion]:
    """The completions as they are handed out: all, or the first so many."""
    found: list[batchrun.Completion] = []
    async for completion in runner:
        found.append(completion)
        if len(found) == upto:
            break
    return found


def rows_of(found: list[batchrun.Completion]) -> list[int]:
    return sorted(completion.row for completion in found)


async def the_whole(job: batchrun.Job, out: Path, rows: Any = None, **options: Any) -> list[batchrun.Completion]:
    async with batchrun.Runner(job, rows, output=out, environ=KEYS, **options) as runner:
        found = await read(runner)
    assert runner.summary.complete
    return found


# ── what is handed out ────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_row_is_yielded_once_as_written(tmp_path: Path, simulator: RunningSimulator) -> None:
    template = batchrun.RequestTemplate(model="vtrix-gpt-5.3-codex", prompt="{{ text }}", max_tokens=40)
    job = msgspec.structs.replace(job_at(simulator.url), request=template)
    found = asyncio.run(the_whole(job, tmp_path / "out", texts(50)))
    written = pq.read_table(tmp_path / "out/completions.parquet").to_pylist()
    assert rows_of(found) == list(range(50))
    for completion in found:
        row = written[completion.row]
        assert completion.input == {"id": row["id"], "text": row["text"]}
        for name in OWN_COLUMNS.names:
            value: Any = getattr(completion, name)
            as_written = msgspec.structs.asdict(value) if isinstance(value, msgspec.Struct) else value
            empty = name in ("choices", "set_aside")  # null in the file
            assert as_written == (() if empty else row[name]), name
    assert {str(completion.status) for completion in found} == {"ok", "truncated"}


def test_a_finished_run_is_yielded_without_sending(tmp_path: Path, simulator: RunningSimulator) -> None:
    for layout in ("file", "parts"):
        job = job_at(simulator.url, output=batchrun.Output(layout=layout, chunk_rows=7, prefix="b_"))
        found = asyncio.run(the_whole(job, tmp_path / layout, texts(20)))
        served = len(simulator.ledger())
        again = asyncio.run(the_whole(job, tmp_path / layout, texts(20)))
        assert again == sorted(found, key=lambda completion: completion.row)
        assert asyncio.run(the_whole(job, tmp_path / layout, texts(20), replay=False)) == []
        assert len(simulator.ledger()) == served


def test_settled_rows_of_killed_runs_come_first(tmp_path: Path) -> None:
    """None is yielded twice."""
    source, out = write_rows(tmp_path / "in.jsonl", 60), tmp_path / "out"
    with running_simulator(SimulatorConfig(latency_s=0.05)) as running:
        more = "[limits]\nmax_in_flight = 4\n[output]\nchunk_rows = 10\n"
        process = start("run", write_job(tmp_path / "job.toml", running.url, source, more), "-o", out)
        kill_when(process, lambda: len(running.ledger()) >= 26)
        process.communicate()
        served = len(running.ledger())
        job = batchrun.load_job(tmp_path / "job.toml")
        found = asyncio.run(the_whole(job, out))
        asked_again = len(running.ledger()) - served
    assert rows_of(found) == list(range(60))
    settled = 60 - asked_again
    assert settled >= served - 4
    assert rows_of(found[:settled]) == [completion.row for completion in found[:settled]]
    assert {completion.input["id"] for completion in found} == set(range(60))


def test_json_columns_are_yielded_as_values(tmp_path: Path, simulator: RunningSimulator) -> None:
    wanted = batchrun.ResponseFormat.of(Label)
    template = batchrun.RequestTemplate(
        model="vtrix-gpt-5.3-codex", prompt="{{ text }}", max_tokens=400, response_format=wanted
    )
    job = msgspec.structs.replace(job_at(simulator.url), request=template)
    found = asyncio.run(the_whole(job, tmp_path / "out", texts(5)))
    for completion in found:
        assert completion.parsed["sentiment"] == completion.parse(Label).sentiment
        assert completion.status == "ok"
    of_model = batchrun.ResponseFormat.of(Model)
    assert (of_model.name, of_model.schema and list(of_model.schema["properties"])) == ("Model", ["sentiment"])
    with pytest.raises(batchrun.JobError, match="has no JSON schema"):
        batchrun.ResponseFormat.of(object())


def test_retried_rows_are_yielded_with_new_results(tmp_path: Path) -> None:
    with running_simulator(SimulatorConfig(latency_s=0, faults=parse_faults("400=0.3"))) as strict:
        job = job_at(strict.url, output=batchrun.Output(max_failures=40), limits=batchrun.Limits(max_in_flight=1))

        async def leave_after(rows: int) -> None:
            options: batchrun.Options = {"output": tmp_path / "out", "environ": KEYS, "retry_failed": True}
            async with batchrun.Runner(job, texts(40), **options) as runner:
                await read(runner, rows)

        first = asyncio.run(the_whole(job, tmp_path / "out", texts(40)))
        failed = {completion.row for completion in first if completion.status == "error"}
        asyncio.run(leave_after(42 - len(failed)))  # two of them are retried, and settled when the next one starts
        again = asyncio.run(the_whole(job, tmp_path / "out", texts(40)))
    assert len(failed) > 4
    assert rows_of(again) == list(range(40))
    error = next(completion.error for completion in again if completion.error is not None)
    assert (error.http_status, error.kind) == (400, "bad_request")


@dataclasses.dataclass
class Label:
    sentiment: str


class Model(pydantic.BaseModel):
    sentiment: str


def completion_of(content: str | None) -> batchrun.Completion:
    values: dict[str, Any] = dict.fromkeys(batchrun.Completion.__struct_fields__)
    return batchrun.Completion(**{**values, "content": content})


def test_an_answer_is_read_as_the_wanted_type() -> None:
    good, bad, none = completion_of('{"sentiment": "good"}'), completion_of('{"sentiment": 3}'), completion_of(None)
    assert good.parse(Label) == Label("good")
    assert good.parse(Model) == Model(sentiment="good")
    for completion in (bad, none):
        for kind in (Label, Model):
            with pytest.raises(ValueError, match=r"."):
                completion.parse(kind)


# ── leaving early ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_leaving_early_drains_and_resumes_later(tmp_path: Path, slow: RunningSimulator) -> None:
    job, served = job_at(slow.url, limits=IN_FLIGHT), len(slow.ledger())

    async def leave(how: str) -> batchrun.Summary:
        runner = batchrun.Runner(job, texts(40), output=tmp_path / "out", environ=KEYS, replay=False)
        async with runner:
            assert not runner.summary.complete
            await read(runner, 3)
            if how == "exception":
                raise KeyError(how)
            if how == "stop":
                runner.stop()
                rest = await read(runner)
                assert 0 < len(rest) <= 8
        return runner.summary

    with pytest.raises(KeyError):
        asyncio.run(leave("exception"))
    assert asyncio.run(leave("stop")).reason == "stopped by the program: drained"
    summary = asyncio.run(leave("break"))
    assert (summary.exit_code, summary.complete, summary.possibly_billed_count) == (4, False, 0)
    assert 9 <= 40 - summary.pending <= 9 + 3 * 8
    assert len(slow.ledger()) - served == 40 - summary.pending
    rest = asyncio.run(the_whole(job, tmp_path / "out", texts(40), replay=False))
    assert len(rest) == summary.pending
    assert len(slow.ledger()) - served == 40


def test_a_cancelled_task_leaves_a_resumable_run(tmp_path: Path, slow: RunningSimulator) -> None:
    job, served = job_at(slow.url, limits=IN_FLIGHT), len(slow.ledger())

    async def cancel() -> None:
        task = asyncio.create_task(the_whole(job, tmp_path / "out", texts(40)))
        while len(slow.ledger()) < served + 8:
            await asyncio.sleep(0.01)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancel())
    assert rows_of(asyncio.run(the_whole(job, tmp_path / "out", texts(40)))) == list(range(40))
    assert len(slow.ledger()) - served == 40


PROGRAM = """
import asyncio, sys
import batchrun

async def main():
    async with batchrun.Runner(sys.argv[1], output=sys.argv[2]) as runner:
        async for completion in runner:
            print(completion.row, flush=True)

asyncio.run(main())
"""


@pytest.mark.heavy
def test_ctrl_c_in_a_program_drains_its_run(tmp_path: Path) -> None:
    with running_simulator(SimulatorConfig(latency_s=0.3)) as running:
        source, more = write_rows(tmp_path / "in.jsonl", 400), "[limits]\nmax_in_flight = 4\n"
        file = write_job(tmp_path / "job.toml", running.url, source, more)
        command = [sys.executable, "-c", PROGRAM, str(file), str(tmp_path / "out")]
        environ = {**os.environ, **KEYS}
        process = subprocess.Popen(
            command,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
        )
        kill_when(process, lambda: len(running.ledger()) >= 4, signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert err.splitlines()[-1] == "KeyboardInterrupt"
        summary = read_summary(tmp_path / "out")
        assert (summary["state"], summary["possibly_billed_count"]) == ("stopped", 0)
        assert len(out.splitlines()) <= 400 - summary["pending"] == len(running.ledger())


def test_a_second_stop_ends_at_once(tmp_path: Path) -> None:
    """It names the requests in flight."""

    async def stop_twice(url: str) -> batchrun.Summary:
        runner = batchrun.Runner(job_at(url, limits=IN_FLIGHT), texts(9), output=tmp_path / "out", environ=KEYS)
        async with runner:
            flying = tmp_path / "out/inflight.bin"
            while not flying.exists() or not any(flying.read_bytes()):
                await asyncio.sleep(0.01)
            runner.stop()
            runner.stop()
            assert await read(runner) == []
        return runner.summary

    with running_simulator(SimulatorConfig(latency_s=30)) as stuck:
        summary = asyncio.run(stop_twice(stuck.url))
    assert 1 <= summary.possibly_billed_count <= 4
    assert summary.by_status == {}


# ── how it ends ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stopped_run_raises_after_its_completions(tmp_path: Path, simulator: RunningSimulator) -> None:
    found: list[batchrun.Completion] = []

    async def ask() -> None:
        job = job_at(simulator.url, budget=batchrun.Budget(max_cost_usd=Decimal("0.02")))
        async with batchrun.Runner(job, texts(40), output=tmp_path / "out", environ=KEYS) as runner:
            async for completion in runner:
                found.append(completion)

    with pytest.raises(batchrun.RunIncompleteError) as caught:
        asyncio.run(ask())
    assert caught.value.exit_code == batchrun.ExitCode.STOPPED
    assert len(found) == 40 - caught.value.summary.pending > 0


def test_start_errors_raise_on_entering(tmp_path: Path) -> None:
    """Errors of rows are raised by the loop."""

    async def ask(job: batchrun.Job, rows: Any, environ: dict[str, str]) -> str:
        async with batchrun.Runner(job, rows, output=tmp_path / "out", environ=environ) as runner:
            with pytest.raises(batchrun.InputError) as caught:
                await read(runner)
            return str(caught.value)

    job = job_at("http://127.0.0.1:1/v1")
    with pytest.raises(batchrun.JobError, match="environment variable"):
        asyncio.run(ask(job, texts(3), {}))
    assert "none of the input records (1) make a valid request" in asyncio.run(ask(job, [{"txt": "a"}], KEYS))


def test_waiting_hands_out_nothing_and_returns_the_summary(tmp_path: Path, simulator: RunningSimulator) -> None:
    seen: list[batchrun.Summary] = []

    async def ask() -> batchrun.Summary:
        job = job_at(simulator.url)
        rows = texts(MAX_ROWS + 100)
        runner = batchrun.Runner(job, rows, output=tmp_path / "out", environ=KEYS, progress=seen.append)
        with pytest.raises(RuntimeError, match="has not started"):
            runner.summary  # noqa: B018  (it raises)
        async with runner:
            return await runner.wait()

    assert asyncio.run(ask()).by_status == {"ok": MAX_ROWS + 100}
    assert seen[0].state == "checking"


def test_a_slow_reader_slows_the_run_within_bounds(tmp_path: Path, simulator: RunningSimulator) -> None:
    rows, served = 3 * MAX_ROWS, len(simulator.ledger())

    async def ask() -> None:
        async with batchrun.Runner(job_at(simulator.url), texts(rows), output=tmp_path / "out", environ=KEYS) as runner:
            first = await read(runner, 1)
            async with asyncio.timeout(30):
                while runner.summary.limited_by != "the reader of completions":
                    await asyncio.sleep(0.05)
            before = len(simulator.ledger())
            await asyncio.sleep(0.3)
            assert len(simulator.ledger()) - before <= 64
            assert len(simulator.ledger()) - served <= 2 * (MAX_ROWS + 64)
            assert rows_of(first + await read(runner)) == list(range(rows))

    asyncio.run(ask())


def test_one_loop_runs_two_directories_at_once(tmp_path: Path, simulator: RunningSimulator) -> None:
    """Never two runs in one directory."""

    async def ask() -> None:
        job = job_at(simulator.url)
        one, other = await asyncio.gather(
            the_whole(job, tmp_path / "one", texts(30)), the_whole(job, tmp_path / "other", texts(30, 100))
        )
        assert {completion.input["id"] for completion in one} == set(range(30))
        assert {completion.input["id"] for completion in other} == set(range(100, 130))
        async with batchrun.Runner(job_at(simulator.url), texts(400), output=tmp_path / "shared", environ=KEYS):
            with pytest.raises(batchrun.RunLockedError, match="another run works here"):
                await the_whole(job, tmp_path / "shared", texts(400))

    asyncio.run(ask())


def test_a_thread_can_run_without_signals(tmp_path: Path, simulator: RunningSimulator) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    found: list[batchrun.Completion] = []

    def ask() -> None:
        found.extend(asyncio.run(the_whole(job_at(simulator.url), tmp_path / "out", texts(5))))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert rows_of(found) == list(range(5))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


if TYPE_CHECKING:

    async def test_a_type_checker_sees_what_is_handed_out() -> None:
        async with batchrun.Runner("job.toml", limit=3, replay=False) as runner:
            async for completion in runner:
                assert_type(completion, batchrun.Completion)
                assert_type(completion.cost_usd, Decimal | None)
                assert_type(completion.parse(Label), Label)
        batchrun.Runner("job.toml", limt=3)  # type: ignore[call-arg]
