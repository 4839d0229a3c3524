"""Whole runs over streams: the same answers as whole ones, and partial text where a stream was cut."""

import asyncio
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import toktok

from batchrun.response.token_count import ENCODING
from batchrun.simulator import Fault, SimulatorConfig
from tests.cli_process import KEY, Ended, batchrun, finish, kill_when, read_summary, start, write_job, write_rows
from tests.fault_server import Exchange, Script, serving
from tests.run.test_exchange import closes
from tests.run.test_stream import DONE, FI, NE, ROLE, STOP, USAGE, ends, event, streams
from tests.simulator_process import running_simulator

SAME = ["id", "row", "request_key", "status", "content", "finish_reason", "model", "prompt_tokens", "completion_tokens"]
STREAM = ("--set", "request.stream=true", "--set", "output.raw=always")


@pytest.mark.heavy
def test_a_killed_streamed_run_is_equivalent(
    tmp_path: Path,
) -> None:
    """It brings the answers of a run that wasn't streamed."""
    source = write_rows(tmp_path / "in.jsonl", 150)
    config = SimulatorConfig(latency_s=0.02, faults=(Fault(kind="cut", share=0.05, times=1, per_question=True),))
    with running_simulator(config) as simulator:
        job = write_job(
            tmp_path / "job.toml", simulator.url, source, "[output]\nchunk_rows = 50\n[retry]\nbackoff_base_s = 0.05\n"
        )
        streamed = tmp_path / "streamed"
        process = start("run", job, "-o", streamed, *STREAM)
        kill_when(process, lambda: len(simulator.ledger()) >= 80)
        process.communicate()
        assert batchrun("run", job, "-o", streamed, *STREAM).exit_code == 0
    with running_simulator() as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source)
        assert batchrun("run", job, "-o", tmp_path / "whole").exit_code == 0
    rows, whole = (pq.read_table(out / "completions.parquet") for out in (streamed, tmp_path / "whole"))
    assert rows.select(SAME).equals(whole.select(SAME))
    raws = [raw or b"" for raw in rows.column("raw").to_pylist()]
    assert all(raw.startswith(b"data: {") and raw.endswith(DONE) for raw in raws)
    assert None not in rows.column("time_to_first_token_s").to_pylist()
    assert set(whole.column("time_to_first_token_s").to_pylist()) == {None}
    assert read_summary(streamed)["without_usage"] == 0


def requested(tmp_path: Path, script: Script, rows: int, *flags: str) -> tuple[Ended, Path]:
    """A streamed run over `rows` rows against a scripted server."""

    async def main() -> Ended:
        async with serving(script) as server:
            job = write_job(tmp_path / "job.toml", server.url, write_rows(tmp_path / "in.jsonl", rows))
            process = start("run", job, "-o", tmp_path / "out", "--set", "request.stream=true", *flags)
            return await asyncio.to_thread(finish, process)

    return asyncio.run(main()), tmp_path / "out"


def test_an_always_cut_stream_fails_with_text(tmp_path: Path) -> None:
    named = event({"content": f"is {KEY}."})

    async def script(exchange: Exchange) -> None:
        cut = b"item 3 " in exchange.body
        await streams(ROLE, FI, *((named[:-30], named[-30:], 0.02, closes) if cut else (NE, STOP, USAGE, DONE)))(
            exchange
        )

    ended, out = requested(tmp_path, script, 5)
    assert ended.exit_code == 3
    rows = pq.read_table(out / "completions.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["ok", "ok", "ok", "error", "ok"]
    assert [row["content"] for row in rows] == ["Fine.", "Fine.", "Fine.", "Fiis [redacted].", "Fine."]
    failed = rows[3]
    assert (failed["error"]["kind"], failed["attempts"], failed["completion_tokens"]) == ("cut", 2, None)
    assert failed["raw"] == ROLE + FI + named.replace(KEY.encode(), b"[redacted]")
    assert [row["completion_tokens"] for row in rows if row["status"] == "ok"] == [2] * 4
    assert [entry["cause"] for entry in read_summary(out)["possibly_billed"]] == ["cut", "cut"]


@pytest.mark.heavy
def test_answers_without_usage_are_counted_offline(
    tmp_path: Path,
) -> None:
    """Their cost is unknown and the report has a line for them."""
    ended, out = requested(tmp_path, streams(ROLE, FI, NE, STOP, DONE, ends), 3)
    assert ended.exit_code == 0, ended.stderr
    rows = pq.read_table(out / "completions.parquet").to_pylist()
    assert [row["content"] for row in rows] == ["Fine."] * 3
    unknown = ("prompt_tokens", "completion_tokens", "total_tokens", "cost_usd")
    assert {row[name] for row in rows for name in unknown} == {None}
    (line,) = read_summary(out)["totals"]
    assert (line["without_usage"], line["total_tokens"], line["cost_usd"]) == (3, 0, "0")
    prompts = [f"Say: item {row} " + "word " * row for row in range(3)]
    counted = (sum(toktok.batch_count(prompts, ENCODING)), sum(toktok.batch_count(["Fine."] * 3, ENCODING)))
    assert (line["offline_prompt_tokens"], line["offline_completion_tokens"]) == counted
    reported = (
        "without usage: 3 answers of job, not included in cost_usd; about {} tokens in, {} out by an offline count"
    )
    assert batchrun("report", out).stdout.splitlines()[-1] == reported.format(*counted)
    bill = json.loads(batchrun("report", out, "--format", "json").stdout)
    names = ("job", "answers", "offline_prompt_tokens", "offline_completion_tokens")
    assert bill["without_usage"] == [dict(zip(names, ("job", 3, *counted), strict=True))]
    assert not any("offline" in name for name in (*bill["total"], *rows[0]))


def test_each_row_has_its_reasoning_effort(tmp_path: Path) -> None:
    """Its reasoning tokens are in their column."""
    efforts = ["low", "xhigh", None, "high"]
    source = tmp_path / "in.jsonl"
    rows = [{"id": row, "text": f"item {row}", "effort": efforts[row % 4]} for row in range(20)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    effort = ("--set", "request.reasoning_effort=medium", "--set", "request.from_columns.reasoning_effort=effort")
    with running_simulator() as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source)
        room = ("--set", "request.max_tokens=20000")
        ended = batchrun("run", job, "-o", tmp_path / "out", *STREAM, *effort, *room)
        assert ended.exit_code == 0, ended.stderr
        served = {int((line.client_request_id or "").split("-")[1]): line for line in simulator.ledger()}
    reported = pq.read_table(tmp_path / "out" / "completions.parquet").to_pylist()
    assert [row["reasoning_tokens"] for row in reported] == [served[row].reasoning_tokens for row in range(20)]
    assert [row["completion_tokens"] for row in reported] == [served[row].completion_tokens for row in range(20)]
    thought = [sum(row["reasoning_tokens"] for row in reported[place::4]) for place in (0, 2, 3, 1)]
    assert thought == sorted(thought)
    assert thought[0] < thought[-1] / 4


def test_a_stream_missing_a_choice_is_retried(tmp_path: Path) -> None:
    sent: list[bytes] = []

    async def script(exchange: Exchange) -> None:
        assert json.loads(exchange.body)["n"] == 2
        sent.append(exchange.body)
        one, two = (f"{word} of item {place}" for place, word in enumerate(("first", "second")))
        first = event(choices=[{"index": 0, "delta": {"content": one}, "finish_reason": "stop"}])
        second = event(choices=[{"index": 1, "delta": {"content": two}, "finish_reason": "stop"}])
        await streams(first, *(() if len(sent) == 1 else (second,)), ends)(exchange)

    flags = ("--set", "request.extra.n=2", "--set", "retry.backoff_base_s=0.02", "--set", "limits.max_in_flight=1")
    ended, out = requested(tmp_path, script, 2, *flags)
    assert ended.exit_code == 0, ended.stderr
    rows = pq.read_table(out / "completions.parquet").to_pylist()
    assert sorted(row["attempts"] for row in rows) == [1, 2]
    assert [[choice["index"] for choice in row["choices"]] for row in rows] == [[0, 1], [0, 1]]
    assert read_summary(out)["possibly_billed_count"] == 1
