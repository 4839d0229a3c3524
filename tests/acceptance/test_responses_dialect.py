"""The Responses API: the official client reads the simulator's, and a job gets from it what it gets from the other."""

import json
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import openai
import pyarrow.parquet as pq
import pytest

from batchrun.simulator import SimulatorConfig, parse_faults
from tests.cli_process import batchrun, finish, kill_when, start, write_job, write_rows
from tests.simulator_process import RunningSimulator, running_simulator

SCHEMA = {
    "type": "object",
    "properties": {"label": {"type": "string", "enum": ["good", "bad"]}},
    "required": ["label"],
    "additionalProperties": False,
}
MODEL = "vtrix-x"
SAME = ["id", "row", "request_key", "status", "content", "parsed", "tool_calls", "finish_reason", "cost_usd"]
RESPONSES = 'dialect = "responses"\n'


@pytest.fixture(scope="module")
def simulator() -> Iterator[RunningSimulator]:
    with running_simulator(SimulatorConfig(api_key="sk-right", models=(MODEL,))) as running:
        yield running


@pytest.fixture
def client(simulator: RunningSimulator) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=simulator.url, api_key="sk-right", max_retries=0) as connected:
        yield connected


def test_the_official_client_reads_a_response(client: openai.OpenAI) -> None:
    """It says what the chat completion of the same question says."""
    response = client.responses.create(
        model=MODEL, input="Hello", max_output_tokens=40, reasoning={"effort": "low"}, store=False
    )
    chat = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Hello"}], max_tokens=40, reasoning_effort="low"
    )
    assert response.output_text == chat.choices[0].message.content
    assert response.usage is not None
    assert chat.usage is not None
    assert response.usage.total_tokens == chat.usage.total_tokens
    assert response.status == ("completed" if chat.choices[0].finish_reason == "stop" else "incomplete")


def test_the_official_client_reads_a_stream(client: openai.OpenAI) -> None:
    whole = client.responses.create(model=MODEL, input="Hi")
    events = list(client.responses.create(model=MODEL, input="Hi", stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    last = events[-1]
    assert last.type == "response.completed"
    assert (last.response.output_text, last.response.usage) == (whole.output_text, whole.usage)


def test_the_official_client_gets_calls_and_schemas(client: openai.OpenAI) -> None:
    called = client.responses.create(
        model=MODEL,
        input=[{"role": "user", "content": "Rate"}],
        tools=[{"type": "function", "name": "rate", "parameters": SCHEMA, "strict": True}],
        tool_choice={"type": "function", "name": "rate"},
    )
    call = called.output[0]
    assert call.type == "function_call"
    jsonschema.validate(json.loads(call.arguments), SCHEMA)
    answered = client.responses.create(
        model=MODEL,
        input=[
            {"role": "user", "content": "Rate"},
            {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments},
            {"type": "function_call_output", "call_id": call.call_id, "output": "7"},
        ],
        text={"format": {"type": "json_schema", "name": "label", "schema": SCHEMA, "strict": True}},
    )
    jsonschema.validate(json.loads(answered.output_text), SCHEMA)


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"input": "Hi", "n": 2}, "n"), ({}, "input"), ({"input": [{"type": "odd"}]}, "input[0]")],
)
def test_an_unknown_field_is_refused(client: openai.OpenAI, fields: dict[str, object], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.post("/responses", body={"model": MODEL, **fields}, cast_to=object)
    assert raised.value.param == param


MORE = {
    "plain": "",
    "stream": "[request]\nstream = true\n",
    "schema": '[request.response_format]\ntype = "json_schema"\nschema = ' + "{ type = 'object', required = ['label'], "
    "properties = { label = { type = 'string' } }, additionalProperties = false }\n",
    "tools": "[request.extra]\ntool_choice = 'required'\ntools = [{ type = 'function', function = { name = 'rate', "
    "parameters = { type = 'object', properties = { score = { type = 'integer' } }, required = ['score'] } } }]\n",
}


def in_responses(job: Path) -> None:
    job.write_text(job.read_text().replace('name = "test"\n', f'name = "test"\n{RESPONSES}'))


def job_of(path: Path, url: str, source: Path, dialect: str, more: str) -> Path:
    """A job in one dialect."""
    job = write_job(path, url, source, more.removeprefix("[request]\n") if more.startswith("[request]\n") else more)
    if dialect == "responses":
        in_responses(job)
    return job


@pytest.mark.heavy
@pytest.mark.parametrize("kind", MORE)
def test_both_dialects_give_the_same_result(tmp_path: Path, kind: str) -> None:
    """Answers, keys and cost are equal; the ledger has the same questions."""
    source, results, ledgers = write_rows(tmp_path / "in.jsonl", 60), [], []
    for dialect in ("chat", "responses"):
        with running_simulator(SimulatorConfig(latency_s=0, faults=parse_faults("500=0.05"), seed=3)) as simulator:
            job = job_of(tmp_path / f"{dialect}.toml", simulator.url, source, dialect, MORE[kind])
            ended = batchrun("run", job, "-o", tmp_path / dialect)
            assert ended.exit_code == 0, ended.stderr
            results.append(pq.read_table(tmp_path / dialect / "completions.parquet", columns=SAME))
            ledgers.append({line.question for line in simulator.ledger()})
    assert results[0] == results[1]
    assert ledgers[0] == ledgers[1]
    assert results[1].num_rows == 60


def test_a_run_resumes_in_the_other_dialect(tmp_path: Path) -> None:
    """The dialect is how a question is sent, so nothing has changed and no answer is paid for twice."""
    source, out = write_rows(tmp_path / "in.jsonl", 200), tmp_path / "out"
    with running_simulator(SimulatorConfig(latency_s=0.05)) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, source, "[limits]\nmax_in_flight = 8\n")
        process = start("run", job, "-o", out)
        kill_when(process, lambda: len(simulator.ledger()) >= 40)
        finish(process)
        in_responses(job)
        assert batchrun("run", job, "-o", out).exit_code == 0
        repeated = len(simulator.ledger()) - len({line.question for line in simulator.ledger()})
    assert repeated <= 8
    assert pq.read_metadata(out / "completions.parquet").num_rows == 200


def test_a_url_of_the_other_dialect_is_noticed(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in.jsonl", 1)
    ended = batchrun("check", write_job(tmp_path / "job.toml", "http://127.0.0.1:9/v1/responses", source))
    assert ended.exit_code == 2
    assert 'endpoint.dialect: "chat" is not served at /responses; set it to "responses"' in ended.stderr
