"""A model whose answer does not fit gets the error and a second request: bounded, billed, and never a worse answer."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
import pytest

from batchrun.simulator import Fault, SimulatorConfig
from tests.cli_process import batchrun, kill_when, read_summary, start, write_job, write_rows
from tests.simulator_process import RunningSimulator, running_simulator

JOB = """functions = [{{ name = "label", parameters = {{ type = "object", required = ["a"] }} }}]
function_call = {{ name = "label" }}
[retry]
backoff_base_s = 0.02
invalid = {invalid}
{more}
"""
UNFIT: Literal["unfit_json"] = "unfit_json"


def ran(
    tmp_path: Path, simulator: RunningSimulator, invalid: int, more: str = "", rows: int = 6, code: int = 3
) -> list[dict[str, Any]]:
    source = write_rows(tmp_path / "in.jsonl", rows)
    job = write_job(tmp_path / "job.toml", simulator.url, source, JOB.format(invalid=invalid, more=more))
    ended = batchrun("run", job, "-o", tmp_path / "out")
    assert ended.exit_code == code, ended.stderr
    return pq.read_table(tmp_path / "out" / "completions.parquet").to_pylist()


def times_sent(simulator: RunningSimulator, row: int) -> int:
    """How often the row was sent, by the ledger."""
    return sum((line.client_request_id or "").split("-")[-2] == str(row) for line in simulator.ledger())


@pytest.mark.heavy
def test_an_invalid_answer_is_corrected_and_billed(tmp_path: Path) -> None:
    faults = (
        Fault(kind=UNFIT, match="item 1 ", times=1),
        Fault(kind="invalid_json", match="item 2 ", times=1),
        Fault(kind=UNFIT, match="item 2 ", times=1),
        Fault(kind=UNFIT, match="item 3 "),
        Fault(kind=UNFIT, match="item 4 ", times=1),
        Fault(kind="status", status=400, match="item 4 ", message="no more"),
    )
    with running_simulator(SimulatorConfig(faults=faults)) as simulator:
        rows = ran(tmp_path, simulator, 2)
        assert [row["status"] for row in rows] == ["ok", "ok", "ok", "invalid", "invalid", "ok"]
        # 3 is never mended; 4 is refused when it is sent again, and keeps its first answer
        assert [row["attempts"] for row in rows] == [1, 2, 3, 3, 2, 1]
        assert [times_sent(simulator, row) for row in range(6)] == [1, 2, 3, 3, 2, 1]
        billed = sum(line.billed for line in simulator.ledger())
        prompt = sum(line.prompt_tokens for line in simulator.ledger())
    assert [(row["error"] or {}).get("kind") for row in rows] == [None, None, None, "schema", "schema", None]
    set_aside = [[(each["attempt"], each["kind"]) for each in row["set_aside"] or ()] for row in rows]
    # of 3 the last of three stands; 4 keeps the one there was
    assert set_aside == [
        [],
        [(1, "schema")],
        [(1, "invalid_json"), (2, "schema")],
        [(1, "schema"), (2, "schema")],
        [],
        [],
    ]
    first = rows[1]["set_aside"][0]
    assert json.loads(first["content"])["name"] == "label"
    assert "does not match its schema" in first["message"]
    assert rows[4]["error"]["http_status"] == 200
    assert rows[4]["function_call"] is not None
    assert rows[4]["raw"]
    summary = read_summary(tmp_path / "out")
    assert sum(line["prompt_tokens"] for line in summary["totals"]) == prompt
    assert sum(line["attempts"] for line in summary["totals"]) == billed + 1
    assert Decimal(summary["cost_usd"]) == sum(row["cost_usd"] for row in rows)
    assert Decimal(summary["wasted_usd"]) > 0
    assert len({row["request_key"] for row in rows}) == 6
    assert batchrun("verify", tmp_path / "out").exit_code == 0


@pytest.mark.heavy
def test_a_repeated_wrong_answer_ends_the_correction(tmp_path: Path) -> None:
    body = (
        b'{"choices":[{"message":{"function_call":{"name":"other","arguments":"{}"}},"finish_reason":"function_call"}]}'
    )
    stubborn = Fault(kind="body", match="item 1 ", body_base64=body, billed=True)
    with running_simulator(SimulatorConfig(faults=(stubborn,))) as simulator:
        rows = ran(tmp_path, simulator, 5, rows=2)
        assert times_sent(simulator, 1) == 2
    assert (rows[1]["status"], rows[1]["attempts"]) == ("invalid", 2)
    assert rows[1]["error"]["kind"] == "unknown_function"


def test_a_resume_remembers_the_corrections_sent(tmp_path: Path) -> None:
    slow = SimulatorConfig(faults=(Fault(kind=UNFIT),), latency_s=0.3, latency_sigma=0.0)
    with running_simulator(slow) as simulator:
        source = write_rows(tmp_path / "in.jsonl", 4)
        job = write_job(tmp_path / "job.toml", simulator.url, source, JOB.format(invalid=3, more=""))
        process = start("run", job, "-o", tmp_path / "out")
        kill_when(process, lambda: len(simulator.ledger()) >= 9)
        process.communicate()
        before = len(simulator.ledger())
        rows = ran(tmp_path, simulator, 3, rows=4)
        served = [times_sent(simulator, row) for row in range(4)]
    lost = read_summary(tmp_path / "out")["possibly_billed_count"]
    assert before >= 9
    assert {row["status"] for row in rows} == {"invalid"}
    # corrected three times at most; an attempt whose answer was lost with the process does not count
    assert sum(served) <= 4 * 4 + lost
    # what was said before the kill is kept: each answer is there, or is the row's, or was lost
    kept = sum(len(row["set_aside"] or ()) for row in rows)
    assert sum(served) - lost <= kept + len(rows) <= sum(served)
    # one that was killed before it was sent has its number all the same
    assert all(times <= row["attempts"] <= times + lost for row, times in zip(rows, served, strict=True))


def test_the_longer_request_respects_the_budget(tmp_path: Path) -> None:
    # one request of 100 bytes and 40 tokens of output costs at most $0.0019 at the most expensive service tier; its
    # correction costs more than is left then
    with running_simulator(SimulatorConfig(faults=(Fault(kind=UNFIT),))) as simulator:
        more = "[budget]\nmax_cost_usd = 0.0042\n[limits]\nmax_in_flight = 1\n"
        source = write_rows(tmp_path / "in.jsonl", 2)
        job = write_job(tmp_path / "job.toml", simulator.url, source, JOB.format(invalid=50, more=more))
        ended = batchrun("run", job, "-o", tmp_path / "out")
        assert ended.exit_code == 4, ended.stderr
        assert len(simulator.ledger()) < 50
    summary = read_summary(tmp_path / "out")
    assert Decimal(summary["cost_usd"]) <= Decimal("0.0042")
    assert summary["pending"] > 0


TOOLS = """[request.extra]
tool_choice = "required"
[[request.extra.tools]]
type = "function"
[request.extra.tools.function]
name = "label"
parameters = {{ type = "object", required = ["a"], properties = {{ a = {{ type = "integer" }} }} }}
[retry]
backoff_base_s = 0.02
invalid = {invalid}
"""


def calling(name: str, arguments: str) -> bytes:
    """An answer that calls one tool."""
    calls = [{"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}]
    choice = {"message": {"content": None, "tool_calls": calls}, "finish_reason": "tool_calls"}
    return json.dumps({"choices": [choice]}).encode()


@pytest.mark.heavy
def test_tool_calls_are_validated_and_corrected(tmp_path: Path) -> None:
    wrong = {1: ("label", '{"a": "x"}'), 2: ("label", '{"a": 1'), 3: ("other", "{}"), 4: ("label", '{"a": "x"}')}
    faults = tuple(
        Fault(kind="body", match=f"item {row} ", body_base64=calling(*call), billed=True, times=None if row == 4 else 1)
        for row, call in wrong.items()
    )
    with running_simulator(SimulatorConfig(faults=faults)) as simulator:
        source = write_rows(tmp_path / "in.jsonl", 6)
        job = write_job(tmp_path / "job.toml", simulator.url, source, TOOLS.format(invalid=0))
        assert batchrun("run", job, "-o", tmp_path / "once").exit_code == 3
        rows = pq.read_table(tmp_path / "once" / "completions.parquet").to_pylist()
        assert [row["status"] for row in rows] == ["ok", "invalid", "invalid", "invalid", "invalid", "ok"]
        kinds = [None, "schema", "invalid_json", "unknown_function", "schema", None]
        assert [(row["error"] or {}).get("kind") for row in rows] == kinds
        assert 'arguments of label does not match its schema: at $.a: "x"' in rows[1]["error"]["message"]
    with running_simulator(SimulatorConfig(faults=faults)) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, TOOLS.format(invalid=2))
        assert batchrun("run", job, "-o", tmp_path / "again").exit_code == 3
        rows = pq.read_table(tmp_path / "again" / "completions.parquet").to_pylist()
        assert [row["status"] for row in rows] == ["ok", "ok", "ok", "ok", "invalid", "ok"]
        assert [row["attempts"] for row in rows] == [1, 2, 2, 2, 2, 1]
        assert all(isinstance(json.loads(row["tool_calls"])[0], dict) for row in rows)
        calls = [json.loads(row["set_aside"][0]["content"])[0]["function"] for row in rows[1:4]]
        assert [(call["name"], call["arguments"]) for call in calls] == [wrong[row] for row in (1, 2, 3)]


def test_an_invalid_tool_schema_is_refused_early(tmp_path: Path) -> None:
    with running_simulator() as simulator:
        source = write_rows(tmp_path / "in.jsonl", 2)
        job = write_job(tmp_path / "job.toml", simulator.url, source, TOOLS.format(invalid=0))
        job.write_text(job.read_text().replace('"integer"', '"whole"'))
        for command in ("check", "run"):
            ended = batchrun(command, job, *(("-o", tmp_path / "out") if command == "run" else ()))
            assert ended.exit_code == 2
            assert "tools[0].function.parameters: invalid JSON schema: at $.properties.a.type" in ended.stderr
        assert not simulator.ledger()


FINISH = """response_format = {{ type = "text" }}
[finish]
length = "{length}"
[retry]
max_attempts = 3
"""


@pytest.mark.heavy
def test_rejected_finish_reasons_fail_or_retry(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", 3)
    short = b'{"choices":[{"message":{"content":"Fi"},"finish_reason":"length"}]}'
    once = Fault(kind="body", match="item 1 ", body_base64=short, billed=True, times=1)
    always = Fault(kind="body", match="item 2 ", body_base64=short, billed=True)
    for length, code, attempts in (("accept", 0, [1, 1, 1]), ("fail", 3, [1, 1, 1]), ("retry", 3, [1, 2, 3])):
        with running_simulator(SimulatorConfig(faults=(once, always))) as simulator:
            job = write_job(tmp_path / "job.toml", simulator.url, source, FINISH.format(length=length))
            job.write_text(job.read_text().replace("max_tokens = 40", "max_tokens = 400"))
            out = tmp_path / length
            ended = batchrun("run", job, "-o", out)
            assert ended.exit_code == code, ended.stderr
            rows = pq.read_table(out / "completions.parquet").to_pylist()
            assert [row["attempts"] for row in rows] == attempts
            assert [times_sent(simulator, row) for row in range(3)] == attempts
        assert [row["status"] for row in rows] == ["ok", "ok" if length == "retry" else "truncated", "truncated"]
        assert rows[2]["content"] == "Fi"
        contents = [[each["content"] for each in row["set_aside"] or ()] for row in rows]
        assert contents == ([[], ["Fi"], ["Fi", "Fi"]] if length == "retry" else [[], [], []])
        assert (rows[2]["error"] is None) == (length == "accept")
        assert length != "fail" or batchrun("verify", out).exit_code == 0
