"""From a row to its body and key: only what the row says is sent, and the same question has one key."""

import json
import uuid
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.errors import InputError, JobError
from batchrun.job.fields import check_parameter
from batchrun.job.job import Job
from batchrun.job.load import from_tables
from batchrun.records import Correction, Request, Row
from batchrun.request.builder import RequestBuilder, corrected, detect_dialect
from batchrun.request.templates import text_template
from batchrun.source import find_files, open_source

MODEL = "vtrix-gpt-5.3-codex"
HELLO = [{"role": "user", "content": "Hello"}]
Columns = dict[str, Any]


def a_job(endpoint: str | None = None, **request: object) -> Job:
    tables: Columns = {"endpoint": {"url": "simulator"}, "request": {"model": MODEL, **request}}
    if endpoint is not None:
        tables["endpoint"]["name"] = endpoint
    return from_tables(tables)


def build(job: Job, columns: Columns, dialect: str | None = None) -> Request:
    return RequestBuilder(job, dialect or detect_dialect(job, columns)).build(Row(0, columns))


def body_of(job: Job, columns: Columns, dialect: str | None = None) -> Any:
    return json.loads(build(job, columns, dialect).body)


def key_of(job: Job, columns: Columns) -> bytes:
    return build(job, columns).key


def problem_of(job: Job, columns: Columns) -> str:
    with pytest.raises(InputError) as caught:
        build(job, columns)
    return str(caught.value)


# -- the three dialects


@pytest.mark.parametrize(
    ("request_table", "columns", "dialect"),
    [
        ({"prompt": "{{ a }}"}, {"a": "", "messages": HELLO}, "columns"),
        ({"messages": [{"role": "user", "content": "x"}]}, {"messages": HELLO}, "columns"),
        ({"messages": "chat"}, {"chat": HELLO}, "messages"),
        ({}, {"custom_id": "1", "body": {}, "messages": HELLO}, "openai-batch"),
        ({}, {"messages": HELLO}, "messages"),
    ],
)
def test_the_dialect_follows_job_then_columns(request_table: Columns, columns: Columns, dialect: str) -> None:
    assert detect_dialect(a_job(**request_table), columns) == dialect


def test_columns_that_say_nothing_are_named() -> None:
    with pytest.raises(InputError, match=r"set request.prompt, a template over the columns \(id, text\)"):
        detect_dialect(a_job(), {"id": 1, "text": "x"})


def test_the_columns_dialect_orders_api_fields() -> None:
    job = a_job(
        system="You label.",
        prompt="Label: {{ text }}",
        max_tokens=64,
        temperature=0.0,
        reasoning_effort="low",
        response_format={"type": "json_schema", "name": "label", "schema": {"type": "object"}},
        extra={"seed": 7},
    )
    body = build(job, {"text": "Fine.", "other": object()}).body
    assert body == (
        b'{"model":"vtrix-gpt-5.3-codex","messages":[{"role":"system","content":"You label."},'
        b'{"role":"user","content":"Label: Fine."}],"reasoning_effort":"low","max_tokens":64,"temperature":0,'
        b'"response_format":{"type":"json_schema","json_schema":{"name":"label","schema":{"type":"object"},'
        b'"strict":true}},"seed":7}'
    )


def test_a_message_template_may_have_parts() -> None:
    parts = [{"type": "text", "text": "{{ ask }}"}, {"type": "image_url", "image_url": {"url": "{{ url }}"}}]
    job = a_job(messages=[{"role": "user", "content": parts}])
    (message,) = body_of(job, {"ask": "What?", "url": "https://h/a.png"})["messages"]
    assert message["content"] == [
        {"type": "text", "text": "What?"},
        {"type": "image_url", "image_url": {"url": "https://h/a.png"}},
    ]


def test_a_message_column_gets_the_system_prompt() -> None:
    job = a_job(system="Be {{ tone }}.")
    assert body_of(job, {"messages": HELLO, "tone": "brief"})["messages"] == [
        {"role": "system", "content": "Be brief."},
        *HELLO,
    ]
    own = [{"role": "developer", "content": "Own."}, *HELLO]
    assert body_of(job, {"messages": own, "tone": "brief"})["messages"] == own


def test_messages_may_be_json_text() -> None:
    assert body_of(a_job(), {"messages": json.dumps(HELLO)})["messages"] == HELLO


def test_the_job_fills_gaps_of_batch_lines() -> None:
    job = a_job(max_tokens=10, temperature=0.5, extra={"seed": 1})
    given = {"messages": HELLO, "temperature": 1.5, "stop": ["x"], "logit_bias": {"5": -1}, "stream": True}
    body = body_of(job, {"custom_id": "a", "url": "/v1/chat/completions", "body": given})
    assert body == {
        "model": MODEL,
        "messages": HELLO,
        "max_tokens": 10,
        "temperature": 1.5,
        "logit_bias": {"5": -1},
        "seed": 1,
        "stop": ["x"],
    }
    assert body_of(job, {"custom_id": "a", "body": {**given, "model": "m2"}})["model"] == "m2"


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"body": [1]}, "`body` is not a JSON object"),
        ({"body": "{"}, "a column that should hold JSON text holds something else"),
        ({"body": {"messages": HELLO}, "url": "/v1/embeddings"}, "`url` is '/v1/embeddings'"),
        ({"body": {"messages": []}}, "messages: expected at least one message"),
        ({"body": {"messages": HELLO, "model": 5}}, "model: expected a model id (is 5)"),
        ({"body": {"messages": HELLO, "model": ""}}, "model: expected a model id (is '')"),
        ({"body": {"messages": HELLO, "max_tokens": 0}}, "max_tokens: expected an integer from 1 to 128,000 (is 0)"),
    ],
)
def test_an_unusable_batch_line_is_named(columns: Columns, problem: str) -> None:
    assert problem_of(a_job(), {"custom_id": "a", **columns}).startswith(problem)


def test_a_request_without_a_model_is_refused() -> None:
    nameless = from_tables({"endpoint": {"url": "simulator"}})
    with pytest.raises(JobError, match=r"request\.model: name the model"):
        build(nameless, {"messages": HELLO})
    assert "names no model" in problem_of(nameless, {"custom_id": "a", "body": {"messages": HELLO}})


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (None, "messages: expected at least one message"),
        ([], "messages: expected at least one message"),
        ({}, "messages: expected at least one message"),
        (
            ["Hello"],
            "messages[0].role: expected one of user, assistant, system, developer, tool, function (is 'Hello')",
        ),
        ([*HELLO, {"role": "robot", "content": ""}], "messages[1].role: expected one of"),
        ([{"content": "x"}], "messages[0].role: expected one of"),
        ([*HELLO, {"role": "tool", "content": "x"}], "messages[1].tool_call_id: expected the id of the call"),
        ([{"role": "tool", "tool_call_id": "c"}], "messages[0].content: expected text or a list of parts"),
        ([*HELLO, {"role": "function", "content": "x"}], "messages[1].name: expected the name of the function"),
        ([{"role": "user"}], "messages[0].content: expected text or a list of parts"),
        ([{"role": "user", "content": 5}], "messages[0].content: expected text or a list of parts"),
    ],
)
def test_invalid_messages_of_rows_are_named(messages: object, problem: str) -> None:
    assert problem_of(a_job(), {"messages": messages}).startswith(problem)


@pytest.mark.parametrize("content", ["7", [{"type": "text", "text": "7"}], None])
def test_the_result_of_a_function_is_a_message(content: object) -> None:
    called = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    result = {"role": "function", "name": "f", "content": content}
    sent = body_of(a_job(), {"messages": [*HELLO, called, result]})["messages"]
    assert sent[2].get("content") == content
    assert sent[2]["name"] == "f"
    assert body_of(a_job(), batch(messages=[*HELLO, called, result]))["messages"] == sent


def test_a_function_call_needs_no_content() -> None:
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    assert body_of(a_job(), {"messages": [*HELLO, call]})["messages"][1]["function_call"]["name"] == "f"


@pytest.mark.parametrize("declined", [{"content": None, "refusal": "I can't."}, {"refusal": "I can't."}])
def test_what_the_assistant_declined_needs_no_content(declined: dict[str, object]) -> None:
    conversation = [*HELLO, {"role": "assistant", **declined}, *HELLO]
    sent = body_of(a_job(), {"messages": conversation})["messages"][1]
    assert sent == {"role": "assistant", "content": None, "refusal": "I can't."}
    assert body_of(a_job(), batch(messages=conversation))["messages"][1] == sent


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": None, "refusal": "no"},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": None, "refusal": None},
    ],
)
def test_any_other_message_without_content_is_refused(message: dict[str, object]) -> None:
    assert "content: expected text or a list of parts" in problem_of(a_job(), {"messages": [message]})


def test_tool_conversations_are_sent_unchanged(tmp_path: Path) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    result = {"role": "tool", "tool_call_id": "c1", "content": "7"}
    talk = [*HELLO, {"role": "assistant", "tool_calls": [call]}, result]
    assert body_of(a_job(), {"messages": talk})["messages"] == talk
    assert body_of(a_job(), batch(messages=talk))["messages"] == talk
    jsonl, parquet = both_formats(tmp_path, [{"messages": talk, "t": 1.0}])
    assert json.loads(jsonl[0].body)["messages"] == talk
    assert parquet[0].key == jsonl[0].key


def test_larger_max_tokens_are_allowed_and_bounded() -> None:
    request = build(a_job(extra={"max_completion_tokens": 200_000}), {"messages": HELLO})
    assert json.loads(request.body)["max_completion_tokens"] == 200_000
    assert request.max_output_tokens == 200_000


# -- Parquet and JSONL ask the same


def both_formats(tmp_path: Path, rows: list[Columns]) -> list[list[Request]]:
    """The requests of the same rows from a JSONL and from a Parquet file."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    made = []
    for name in ("rows.jsonl", "rows.parquet"):
        records = list(open_source(find_files(str(tmp_path / name))).records())
        builder = RequestBuilder(a_job(from_columns={"temperature": "t"}), detect_dialect(a_job(), records[0].columns))
        made.append([builder.build(Row(i, record.columns)) for i, record in enumerate(records)])
    return made


def test_parquet_and_jsonl_have_equal_keys(tmp_path: Path) -> None:
    image = {"type": "image_url", "image_url": {"url": "https://h/a.png"}}
    rows: list[Columns] = [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, image]}], "t": 1},
        {"messages": [{"role": "user", "name": "ann", "content": [image]}], "t": 0.5},
        {"messages": [{"content": [image], "role": "user"}], "t": None},
    ]
    jsonl, parquet = both_formats(tmp_path, rows)
    assert [json.loads(request.body) for request in jsonl] == [json.loads(request.body) for request in parquet]
    assert [request.key for request in jsonl] == [request.key for request in parquet]
    assert len({request.key for request in jsonl}) == 3


def test_key_order_changes_body_not_key() -> None:
    given = {"model": "m", "messages": HELLO, "response_format": {"type": "json_object", "b": 1, "a": 2}}
    other = dict(reversed(given.items())) | {"response_format": {"a": 2, "b": 1, "type": "json_object"}}
    first, second = (build(a_job(), {"custom_id": "x", "body": each}) for each in (given, other))
    assert b'"b":1,"a":2' in first.body
    assert b'"a":2,"b":1' in second.body
    assert first.key == second.key


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        Decimal("1.5"),
        b"bytes",
        uuid.UUID(int=1),
        datetime(2026, 1, 1, tzinfo=UTC),
        date(2026, 1, 1),
        ("key", "value"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_unserialisable_value_is_named(value: object) -> None:
    in_messages = problem_of(a_job(), {"messages": [{**HELLO[0], "weight": value}]})
    in_body = problem_of(a_job(), {"custom_id": "a", "body": {"messages": HELLO, "metadata": {"x": [value]}}})
    assert in_messages.startswith(f"messages: JSON has no {type(value).__name__} such as {value!r:.80}")
    assert in_body.startswith(f"body: JSON has no {type(value).__name__}")


def test_deep_or_broken_requests_are_row_errors() -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    assert (
        problem_of(a_job(), {"custom_id": "a", "body": {"messages": HELLO, "x": deep}})
        == "the request is nested too deep"
    )
    assert problem_of(a_job(), {"custom_id": "a", "body": "[" * 100_000}).startswith("a column that should hold JSON")
    assert "half of a surrogate pair" in problem_of(a_job(), {"messages": [{"role": "user", "content": "\ud83d"}]})


# -- templates


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ missing }}", "request.prompt: 'missing' is undefined"),
        ("{{ txet }}", "request.prompt: 'txet' is undefined; did you mean text?"),
        (
            "{{ text }}{{ empty }}",
            "request.prompt: column 'empty' is null; write {% if empty is not none %}{{ empty }}",
        ),
        ("{{ empty }}{{ none_too }}", "request.prompt: columns 'empty', 'none_too' are null; write {% if empty is"),
        ("{{ struct.gone }}", "request.prompt: 'dict object' has no attribute 'gone'"),
        ("{{ struct.empty }}", "request.prompt: a value in the template is null, in column 'struct'"),
        ("{{ text / 2 }}", "request.prompt: TypeError"),
        ("{{ 1 // zero }}", "request.prompt: ZeroDivisionError"),
        ("{% include 'x' %}", "request.prompt: TypeError"),
    ],
)
def test_missing_columns_and_nulls_are_never_sent(template: str, problem: str) -> None:
    columns = {"text": "x", "empty": None, "none_too": None, "zero": 0, "struct": {"empty": None}}
    assert problem_of(a_job(prompt=template), columns).startswith(problem)


def test_a_template_problem_names_its_setting() -> None:
    assert problem_of(a_job(prompt="x", system="{{ gone }}"), {}).startswith("request.system: ")
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "{{ gone }}"}]
    assert problem_of(a_job(messages=messages), {}).startswith("request.messages[1].content: ")
    with pytest.raises(JobError, match=r"request\.prompt: template error in line 2: "):
        build(a_job(prompt="a\n{{ text"), {"text": "x"})


def test_a_null_may_be_provided_for() -> None:
    job = a_job(prompt="{{ name or 'nobody' }}{% if name is none %}!{% endif %}")
    assert body_of(job, {"name": None})["messages"][0]["content"] == "nobody!"


@pytest.mark.parametrize("text", ["{{ 7 * 7 }}", "{% for x in y %}", "{# c #}", "{{", "%}", "{{ secret }}"])
def test_row_text_is_never_a_template(text: str) -> None:
    columns = {"text": text, "secret": "canary"}
    assert body_of(a_job(prompt="{{ text }}"), columns)["messages"][0]["content"] == text
    assert body_of(a_job(), {"messages": [{"role": "user", "content": text}]})["messages"][0]["content"] == text


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ text|attr('__class__') }}",
        "{{ ().__class__.__bases__[0].__subclasses__() }}",
        "{{ [text]|map(attribute='__class__')|first }}",
        "{{ '{0.__class__}'.format(text) }}",
        "{{ '{a.__class__}'.format_map({'a': text}) }}",
        "{% set f = '{0.__class__}'.format %}{{ f(text) }}",
        "{{ ('{0.__class__}'|attr('format'))(text) }}",
        "{{ ['{0.__class__}']|map('format', text)|first|attr('__len__') }}",
        "{{ text.upper.__self__ }}",
        "{{ text.upper.__func__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ joiner.__init__ }}",
        "{% macro m() %}{% endmacro %}{{ m.__globals__ }}",
        "{% for x in [1] recursive %}{{ loop.__class__ }}{% endfor %}",
        "{{ tags.append(1) }}",
        "{{ struct.update(a=1) }}",
        "{{ struct.pop('a') }}",
        "{% import 'os' as os %}{{ os }}",
        "{{ config }}",
        "{{ request }}",
    ],
)
def test_a_template_cannot_reach_internals(template: str) -> None:
    columns: Columns = {"text": "x", "tags": ["a"], "struct": {"a": 0}}
    with pytest.raises((InputError, JobError)):
        build(a_job(prompt=template), columns)
    assert columns == {"text": "x", "tags": ["a"], "struct": {"a": 0}}


def test_what_a_template_sets_stays_in_its_row() -> None:
    builder = RequestBuilder(a_job(prompt="{{ kept|default('no') }}{% set kept = 'yes' %}"), "columns")
    columns: Columns = {}
    bodies = [builder.build(Row(row, columns)).body for row in range(2)]
    assert bodies[0] == bodies[1]
    assert columns == {}


# -- parameters


def test_a_column_overrides_a_parameter_by_row() -> None:
    columns_of = {"model": "m", "temperature": "t", "max_tokens": "n", "top_p": "p", "reasoning_effort": "e"}
    job = a_job(prompt="x", temperature=0.25, from_columns=columns_of)
    own = {"m": "m2", "t": 1.5, "n": 64.0, "p": 0.5, "e": "high"}
    body = body_of(job, own)
    assert body["model"] == "m2"
    assert {name: body[name] for name in columns_of if name != "model"} == {
        "temperature": 1.5,
        "max_tokens": 64,
        "top_p": 0.5,
        "reasoning_effort": "high",
    }
    assert body_of(job, dict.fromkeys(own)) == {
        "model": MODEL,
        "messages": [{"role": "user", "content": "x"}],
        "temperature": 0.25,
    }
    assert problem_of(job, {**own, "t": 3.0}) == "temperature: expected a number from 0 to 2 (is 3)"
    del own["e"]
    assert "column 'e', which request.from_columns.reasoning_effort names, is missing" in problem_of(job, own)


NAN = float("nan")


@pytest.mark.parametrize(
    ("name", "allowed", "refused"),
    [
        ("model", ["m"], ["", None, 5]),
        ("reasoning_effort", ["low", "medium", "high", "xhigh"], ["Low", "", None, 1, [], "none"]),
        ("max_tokens", [1, 128_000, 64.0], [0, -1, 128_001, 1.5, True, "64", None, NAN, float("inf"), 10**400]),
        ("temperature", [0, 0.0, 1, 2.0, 2], [-0.1, 2.1, True, "1", None, NAN, float("inf"), Decimal(1), 10**400]),
        ("top_p", [0, 0.0, 0.5, 1.0], [-0.1, 1.1, False, "1", None, NAN, [], 10**400]),
        ("functions", [[], [{"name": "f"}], [{"name": "f", "x": 1}]], [{}, [{}], ["f"], [{"name": 1}], None]),
        ("function_call", ["none", "auto", {"name": "f"}], ["always", {}, {"name": 1}, None, True]),
        (
            "response_format",
            [{"type": "text"}, {"type": "json_object"}, {"type": "json_schema"}],
            [{}, "text", {"type": "x"}, None],
        ),
        ("unknown_to_the_page", [None, 1, "x", [], {"a": None}], []),
    ],
)
def test_parameters_stay_within_documented_ranges(name: str, allowed: list[Any], refused: list[Any]) -> None:
    for value in allowed:
        assert check_parameter(name, value) == value
    for value in refused:
        with pytest.raises(InputError, match=f"^{name}: expected "):
            check_parameter(name, value)


# -- several turns


def test_turns_keep_the_jobs_order() -> None:
    part = {"type": "text", "text": "{{ ask }}"}
    job = a_job(
        messages=[
            {"role": "developer", "content": "Be {{ tone }}."},
            {"role": "user", "content": "{% for e in examples %}{{ e.text }} is {{ e.label }}. {% endfor %}"},
            {"role": "assistant", "content": "Understood."},
            {"column": "history"},
            {"role": "user", "content": [part, part]},
        ]
    )
    columns: Columns = {
        "tone": "brief",
        "examples": [{"text": "Up", "label": "good"}, {"text": "Down", "label": "bad"}],
        "history": [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "{{ ask }}", "name": None}],
        "ask": "Sideways?",
    }
    history = [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "{{ ask }}"}]
    before = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Up is good. Down is bad. "},
        {"role": "assistant", "content": "Understood."},
    ]
    requested = {"role": "user", "content": [{"type": "text", "text": "Sideways?"}] * 2}
    assert body_of(job, columns)["messages"] == [*before, *history, requested]
    assert body_of(job, {**columns, "history": json.dumps(history)})["messages"] == [*before, *history, requested]
    no_turns: list[object] = [None, []]
    for nothing in no_turns:
        assert body_of(job, {**columns, "history": nothing})["messages"] == [*before, requested]


def test_an_invalid_turns_column_is_named() -> None:
    job = a_job(messages=[{"column": "history"}])
    assert problem_of(job, {}) == "column 'history', which request.messages[0].column names, is missing (columns: none)"
    assert problem_of(job, {"history": None}) == "messages: expected at least one message"
    assert problem_of(job, {"history": [{"role": "robot"}]}).startswith("messages[0].role: expected one of")


@pytest.mark.parametrize(
    "message",
    [{}, {"role": "user"}, {"content": "x"}, {"column": "a", "content": "x"}, {"role": "user", "column": "a"}],
)
def test_a_message_is_content_or_column(message: Columns) -> None:
    with pytest.raises(JobError, match=r"request\.messages\[0\]: expected a `role` with its `content`, or a `column`"):
        a_job(messages=[message])


# -- other servers' words


def worded(job: Job, **endpoint: str) -> Job:
    return msgspec.structs.replace(job, endpoint=msgspec.structs.replace(job.endpoint, **endpoint))


def test_renamed_parameters_are_the_same_question() -> None:
    turns = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    job = a_job(messages=turns, max_tokens=5, temperature=0.5)
    other = worded(job, max_tokens_field="max_completion_tokens", developer_role="system")
    assert body_of(other, {}) == {
        "model": MODEL,
        "messages": [{"role": "system", "content": "Be brief."}, turns[1]],
        "max_completion_tokens": 5,
        "temperature": 0.5,
    }
    assert key_of(other, {}) == key_of(job, {})
    assert build(other, {}).max_output_tokens == 5
    assert other.fingerprint() == job.fingerprint()
    assert turns[0]["role"] == "developer"


def limits_of(body: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in body.items() if "max" in name}


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_no_request_has_two_limits_of_output(field: str) -> None:
    both = {"max_tokens": 5, "max_completion_tokens": 7}
    jobs = [worded(job, max_tokens_field=field) for job in (a_job(), a_job(max_tokens=9))]
    for job in jobs:
        assert problem_of(job, batch(**both)).startswith("`body` has both max_tokens and max_completion_tokens")
        assert limits_of(body_of(job, batch(max_completion_tokens=7))) == {"max_completion_tokens": 7}
        assert limits_of(body_of(job, batch(max_tokens=5))) == {field: 5}
    assert limits_of(body_of(jobs[1], batch())) == {field: 9}
    extra = worded(a_job(extra={"max_completion_tokens": 7}), max_tokens_field=field)
    assert limits_of(body_of(extra, batch(max_tokens=5))) == {field: 5}


# -- the key


def batch(**body: object) -> Columns:
    return {"custom_id": "a", "body": {"model": "m", "messages": HELLO, **body}}


def test_the_key_ignores_how_the_answer_travels() -> None:
    plain, streamed = a_job(), a_job(stream=True, extra={"stream_options": {"include_usage": False}})
    assert key_of(plain, batch()) == key_of(streamed, batch()) == key_of(plain, batch(stream=True, stream_options={}))
    body = body_of(streamed, batch())
    assert (body["stream"], body["stream_options"]) == (True, {"include_usage": False})
    assert body_of(a_job(stream=True), batch())["stream_options"] == {"include_usage": True}
    without = body_of(a_job(stream=True, extra={"stream_options": {}}), batch())  # some servers refuse them
    assert (without["stream"], "stream_options" in without) == (True, False)
    assert "stream" not in body_of(plain, batch(stream=True))


@pytest.mark.parametrize(
    "change",
    [
        {"model": "m2"},
        {"messages": [{"role": "user", "content": "Hello "}]},
        {"messages": [{"role": "system", "content": "Hello"}]},
        {"messages": [*HELLO, *HELLO]},
        {"reasoning_effort": "low"},
        {"max_tokens": 1},
        {"temperature": 0},
        {"top_p": 1},
        {"functions": [{"name": "f"}]},
        {"function_call": "none"},
        {"response_format": {"type": "text"}},
        {"seed": 1},
        {"n": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_key_covers_every_body_field(change: Columns) -> None:
    assert key_of(a_job(), batch(**change)) != key_of(a_job(), batch())


def test_the_key_covers_the_endpoints_name() -> None:
    """It doesn't depend on the row number or on other columns."""
    assert key_of(a_job(endpoint="a"), batch()) != key_of(a_job(endpoint="b"), batch())
    builder = RequestBuilder(a_job(prompt="{{ a }}"), "columns")
    first, second = builder.build(Row(0, {"a": "x"})), builder.build(Row(9, {"a": "x", "b": 1}))
    assert first.key == second.key
    assert (first.row, second.row) == (0, 9)


# -- the bounds


def test_upper_bounds_cover_everything_billable() -> None:
    request = build(a_job(), batch(max_tokens=100, n=3))
    assert request.max_output_tokens == 300
    assert request.max_prompt_tokens == len(request.body)
    assert build(a_job(), batch(max_completion_tokens=200)).max_output_tokens == 200
    assert build(a_job(), batch()).max_output_tokens == 128_000
    assert build(a_job(), batch(n=3)).max_output_tokens == 3 * 128_000
    assert build(a_job(extra={"n": 2}), batch()).max_output_tokens == 2 * 128_000
    image = {"type": "image_url", "image_url": {"url": "https://h/a.png"}}
    with_image = build(a_job(), {"messages": [{"role": "user", "content": [image, image]}]})
    assert with_image.max_prompt_tokens == len(with_image.body) + 2 * 6_000


@pytest.mark.parametrize("limit", [0, -5, True, "100", 100.5, [], {}])
def test_an_unknown_limit_is_no_bound(limit: object) -> None:
    request = build(a_job(), batch(max_completion_tokens=limit, n=limit))
    assert request.max_output_tokens == 128_000


# -- any columns

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
JSON = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(TEXT, TEXT)
def test_a_prompt_reaches_the_body_exactly(before: str, text: str) -> None:
    job = a_job(prompt="<{{ before }}|{{ text }}>")
    columns = {"before": before, "text": text}
    assert body_of(job, columns)["messages"] == [{"role": "user", "content": f"<{before}|{text}>"}]
    assert key_of(job, columns) == key_of(job, dict(reversed(columns.items())))


KNOWN_FIELDS = {
    "max_tokens",
    "temperature",
    "top_p",
    "reasoning_effort",
    "functions",
    "function_call",
    "response_format",
}


@pytest.mark.parametrize(
    "request_fields",
    [
        {"prompt": "Label \0 this: {{ text }}, {{ text }}!", "max_tokens": 64},
        {"prompt": "{{ text }}", "system": 'You "label".', "temperature": 0.5, "service_tier": "flex"},
        {"prompt": "Hello", "system": "{{ text }}", "extra": {"seed": 1}, "stream": True},
    ],
)
@given(TEXT)
def test_a_framed_body_equals_one_built_alone(request_fields: dict[str, Any], text: str) -> None:
    """A job whose fields may come from columns has no frame; this row's column is null, so it asks the same."""
    columns = {"text": text, "none": None}
    by_row = a_job(**request_fields, from_columns={"top_p": "none"})
    one, other = (msgspec.structs.asdict(build(job, columns)) for job in (a_job(**request_fields), by_row))
    del one["expected"], other["expected"]  # compiled schemas, equal only to themselves
    assert one == other


@given(
    st.dictionaries(
        TEXT.filter(lambda name: name not in ("model", "messages", "stream", "stream_options")), JSON, max_size=4
    ).filter(lambda extra: not extra.keys() & KNOWN_FIELDS)
)
def test_batch_bodies_are_sent_as_meant(extra: Columns) -> None:
    meant = {"model": "m", "messages": HELLO, **extra}
    assert body_of(a_job(), {"custom_id": "a", "body": meant}) == meant
    again = json.loads(json.dumps(dict(reversed(meant.items()))))
    assert key_of(a_job(), {"custom_id": "b", "body": again}) == key_of(a_job(), {"custom_id": "a", "body": meant})


@pytest.mark.parametrize(
    "setting", [{"system": "be brief"}, {"prompt": "{{ body }}"}, {"from_columns": {"model": "custom_id"}}]
)
def test_what_a_batch_file_would_ignore_is_refused(setting: dict[str, Any]) -> None:
    job = from_tables({"endpoint": {"url": "simulator"}, "request": {"model": "m", **setting}})
    with pytest.raises(JobError, match=rf"request\.{next(iter(setting))}: .*bring their own"):
        RequestBuilder(job, "openai-batch")


# ── retries ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
def test_a_correction_repeats_the_wrong_answer(stream: bool) -> None:
    requested = build(a_job(prompt="Label {{ text }}", stream=stream), {"text": "this"}, "columns")
    again = corrected(corrected(requested, [Correction("so", "no JSON")]), [Correction("{}", "no label")])
    assert again == corrected(requested, [Correction("so", "no JSON"), Correction("{}", "no label")])
    before, after = json.loads(requested.body), json.loads(again.body)
    first, *added = after.pop("messages")
    assert [first] == before.pop("messages")
    assert after == before
    assert [message["role"] for message in added] == ["assistant", "user"] * 2
    assert [added[0]["content"], added[2]["content"]] == ["so", "{}"]
    assert "no JSON" in added[1]["content"]
    assert "no label" in added[3]["content"]
    assert again.key == requested.key
    assert again.max_prompt_tokens - requested.max_prompt_tokens == len(again.body) - len(requested.body) > 0
    assert corrected(requested, []) is requested


PIECES = [
    *("{{ a }}", "{{a}}", "{{ b }}", "{{ loop }}", "{{ row }}", "{{ none }}", "{{ not }}", "{{ for }}", "{{ _ }}"),
    *("{{- a }}", "{{ a -}}", "{{+ a }}", "{{ a.b }}", "{{ a|upper }}", "{{\n a\t}}", "{{\u00a0a }}", "{{ a² }}"),
    *("{", "{{", "}", "}}", "{%", "%}", "{#", "#}", "-", "a", "\r\n", "\r", " x\n", "{# no #}", "{{ é }}", "{{ aé }}"),
]


@given(
    st.lists(st.sampled_from(PIECES), max_size=6),
    st.dictionaries(
        st.sampled_from(["a", "b", "loop", "_", "é", "aé"]),
        st.text(max_size=5) | st.integers() | st.none() | st.floats(),
    ),
)
def test_simple_templates_render_as_jinja(parts: list[str], columns: Columns) -> None:
    def rendered(text: str) -> str:
        try:
            return text_template(text, "request.prompt")(columns)
        except InputError as error:
            return f"refused: {error}"
        except JobError:
            return "no template"  # Jinja's message counts the characters before

    text = "".join(parts)
    if "{" in text:  # else no template: a text is sent as it stands
        assert rendered(text) == rendered("{% if true %}{% endif %}" + text)
