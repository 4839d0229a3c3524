"""Answers typed by their schema, by real processes: killed, retried, changed, salvaged, they say what they said."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.simulator import Fault, SimulatorConfig
from batchrun.tables.arrow_types import column_of
from tests.cli_process import batchrun, kill_when, read_summary, start, write_job, write_rows
from tests.endings import answer_body
from tests.simulator_process import running_simulator

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "label": {"enum": ["late", "early", "never"]},
        "score": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 3},
    },
    "required": ["label"],
}
OTHER = {"type": "object", "properties": {"label": {"type": "string"}}, "required": ["label"]}
MORE = """response_format = {{ type = "json_schema", file = "{schema}" }}
[output]
chunk_rows = 40
[retry]
backoff_base_s = 0.02
"""


def prepared(tmp_path: Path, url: str, schema: dict[str, Any], rows: int = 150) -> Path:
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(schema))
    return write_job(tmp_path / "job.toml", url, write_rows(tmp_path / "in.jsonl", rows), MORE.format(schema=file))


def result(out: Path) -> pa.Table:
    return pq.read_table(out / "completions.parquet", page_checksum_verification=True)


def saying(text: str, content: str) -> Fault:
    """Rows with this text get this answer."""
    return Fault(kind="body", match=text, body_base64=answer_body(content), billed=True)


def as_struct(content: str, schema: dict[str, Any] = SCHEMA) -> dict[str, Any]:
    value = json.loads(content)
    return {name: value.get(name) for name in schema["properties"]}


NO_JSON, NO_FIT, TOO_LARGE = "late, I think", '{"label": "soon"}', f'{{"label": "late", "score": {2**70}, "why": "?"}}'
ODD = (saying("item 7 ", NO_JSON), saying("item 90 ", NO_FIT), saying("item 33 ", TOO_LARGE))


@pytest.mark.heavy
def test_answers_are_typed_by_their_schema(tmp_path: Path) -> None:
    """A retry leaves them as they are."""
    out = tmp_path / "out"
    with running_simulator(SimulatorConfig(faults=ODD, latency_s=0.02)) as simulator:
        job = prepared(tmp_path, simulator.url, SCHEMA)
        process = start("run", job, "-o", out)
        kill_when(process, lambda: len(simulator.ledger()) >= 60)
        process.communicate()
        ended = batchrun("run", job, "-o", out)
        assert ended.exit_code == 3, ended.stderr
    before = result(out)
    rows = before.to_pylist()
    assert before.schema.field("parsed").type == column_of(SCHEMA).type()
    assert {row["row"]: (row["status"], row["error"]["kind"]) for row in rows if row["error"]} == {
        7: ("invalid", "invalid_json"),
        33: ("ok", "not_in_parsed"),
        90: ("invalid", "schema"),
    }
    assert (rows[7]["content"], rows[90]["content"]) == (NO_JSON, NO_FIT)
    assert "at $.label" in rows[90]["error"]["message"]
    assert rows[33]["parsed"] == {"label": "late", "score": None, "tags": None}
    assert rows[33]["content"] == TOO_LARGE
    assert [rows[row]["parsed"] for row in (7, 90)] == [None, None]
    assert all(rows[row]["raw"] for row in (7, 90))
    typed = [row for row in rows if row["status"] == "ok" and row["row"] != 33]
    assert [row["parsed"] for row in typed] == [as_struct(row["content"]) for row in typed]
    assert {row["status"] for row in rows} <= {"ok", "invalid", "truncated"}
    assert len({row["parsed"]["label"] for row in typed}) == 3

    with running_simulator() as simulator:
        write_job(job, simulator.url, tmp_path / "in.jsonl", MORE.format(schema=tmp_path / "schema.json"))
        ended = batchrun("run", job, "-o", out, "--retry-failed")
        assert ended.exit_code == 0, ended.stderr
    after = result(out)
    assert after.schema == before.schema
    changed = [new["row"] for old, new in zip(rows, after.to_pylist(), strict=True) if old != new]
    assert changed == [7, 90]
    for row in changed:
        assert after.to_pylist()[row]["parsed"] == as_struct(after.column("content")[row].as_py())


@pytest.mark.heavy
def test_another_schema_changes_the_column_types(tmp_path: Path) -> None:
    """A retry with another schema fits the old types."""
    out = tmp_path / "out"
    with running_simulator(SimulatorConfig(faults=(saying("item 7 ", NO_JSON),))) as simulator:
        job = prepared(tmp_path, simulator.url, SCHEMA, rows=50)
        assert batchrun("run", job, "-o", out).exit_code == 3
        more = MORE.format(schema=tmp_path / "schema.json")
        scored = {"type": "object", "properties": {"score": {"type": "string"}}, "required": ["score"]}
        (tmp_path / "scored.json").write_text(json.dumps(scored))
        retried = f"request.response_format.file={tmp_path / 'scored.json'}"
    with running_simulator() as simulator:
        write_job(job, simulator.url, tmp_path / "in.jsonl", more)
        ended = batchrun("run", job, "-o", out, "--retry-failed", "--set", retried)
        assert ended.exit_code == 0, ended.stderr
        row = result(out).to_pylist()[7]
        assert (row["status"], row["variant"], row["error"]["kind"]) == ("ok", 1, "not_in_parsed")
        assert "$.score can't hold" in row["error"]["message"]
        assert row["parsed"] == {"label": None, "score": None, "tags": None}
        assert json.loads(row["content"]).keys() == {"score"}

        (tmp_path / "schema.json").write_text(json.dumps(OTHER))
        ended = batchrun("run", job, "-o", out, "--accept-changes")
        assert ended.exit_code == 0, ended.stderr
    table = result(out)
    assert str(table.schema.field("parsed").type) == "struct<label: large_string>"
    contents = [json.loads(text or "") for text in table.column("content").to_pylist()]
    assert table.column("parsed").to_pylist() == contents


@pytest.mark.heavy
def test_salvaged_answers_keep_their_types(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running_simulator(SimulatorConfig(latency_s=0.02)) as simulator:
        job = prepared(tmp_path, simulator.url, SCHEMA)
        process = start("run", job, "-o", out)
        kill_when(process, lambda: len(list((out / "parts").glob("*.parquet"))) >= 2)
        process.communicate()
        part = min((out / "parts").glob("*.parquet"))
        content = bytearray(part.read_bytes())
        content[len(content) // 2] ^= 1
        part.write_bytes(content)
        assert batchrun("verify", out, "--salvage").exit_code == 7
        salvaged = out.with_name("out.salvaged")
        kept = pq.read_table(salvaged / "salvaged.parquet")
        assert kept.schema.field("parsed").type == column_of(SCHEMA).type()
        assert kept.num_rows > 0
        for row in kept.to_pylist():
            assert row["status"] != "ok" or row["parsed"] == as_struct(row["content"])
        ended = batchrun("run", job, "-o", salvaged)
        assert ended.exit_code == 0, ended.stderr
    table = result(salvaged)
    assert table.schema.field("parsed").type == column_of(SCHEMA).type()
    rows = [row for row in table.to_pylist() if row["status"] == "ok"]
    assert [row["parsed"] for row in rows] == [as_struct(row["content"]) for row in rows]
    assert table.num_rows == 150


def batch_line(number: int, schema: dict[str, Any] | None) -> dict[str, Any]:
    body: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": f"item {number}"}], "max_tokens": 60}
    if schema is not None:
        named = {"name": "label", "schema": schema}
        body["response_format"] = {"type": "json_schema", "json_schema": named}
    return {"custom_id": f"c{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}


@pytest.mark.heavy
def test_batch_lines_have_their_own_schemas(tmp_path: Path) -> None:
    closed = {**OTHER, "additionalProperties": False}
    one = [batch_line(number, OTHER if number % 3 else None) for number in range(9)]
    two = [batch_line(number, OTHER if number % 2 else closed) for number in range(9)]
    bad = [batch_line(0, {"type": "strin"}), batch_line(1, {"$ref": "https://example.com/schema"})]
    said = saying("item 4", '{"label": "a", "more": 1}')
    with running_simulator(SimulatorConfig(faults=(said,))) as simulator:
        tables = {}
        for name, lines in {"one": one, "two": two, "bad": bad}.items():
            source = tmp_path / f"{name}.jsonl"
            source.write_text("".join(json.dumps(line) + "\n" for line in lines))
            job = tmp_path / f"{name}.toml"
            job.write_text(
                f'[endpoint]\nurl = "{simulator.url}"\napi_key_env = "BATCHRUN_TEST_KEY"\n[input]\npath = "{source}"\n'
            )
            ended = batchrun("run", job, "-o", tmp_path / name)
            if name != "bad":
                tables[name] = result(tmp_path / name)
        assert ended.exit_code == 2
        assert ended.stderr.count("response_format.json_schema.schema: invalid JSON schema") == 2
    assert str(tables["one"].schema.field("parsed").type) == "struct<label: large_string>"
    for row in tables["one"].to_pylist():
        assert (row["parsed"] is None) == (row["row"] % 3 == 0)
    assert str(tables["two"].schema.field("parsed").type) == "large_string"
    rows = tables["two"].to_pylist()
    assert rows[4]["status"] == "invalid"  # closed; row 4 of the other file was fine with it
    assert tables["one"].to_pylist()[4]["error"]["kind"] == "not_in_parsed"
    assert all(json.loads(row["parsed"]) == json.loads(row["content"]) for row in rows if row["row"] != 4)
    assert read_summary(tmp_path / "two")["by_status"] == {"ok": 8, "invalid": 1}
