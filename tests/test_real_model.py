"""The same product against a server and a model that nobody here wrote."""

import json
from pathlib import Path

import jsonschema
import pyarrow.parquet as pq

from tests.cli_process import batchrun, read_summary
from tests.real_model import MODEL, running_model

SCHEMA = {
    "type": "object",
    "properties": {
        "category": {"type": "string", "enum": ["bug_fix", "feature", "documentation"]},
        "user_visible": {"type": "boolean"},
    },
    "required": ["category", "user_visible"],
    "additionalProperties": False,
}

JOB = """
[endpoint]
url = "{url}"
name = "llama.cpp"
api_key_env = "BATCHRUN_TEST_KEY"

[input]
path = "{source}"
id = "change_id"

[request]
model = "{model}"
temperature = 0.0
max_tokens = 60
stream = {stream}
system = "You label change-log entries. Answer in JSON."
prompt = "{{{{ text }}}}"
response_format = {{ type = "json_schema", file = "{schema}" }}

[limits]
max_in_flight = 4
"""


def run_job(tmp_path: Path, url: str, source: Path, *, stream: bool) -> Path:
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    job, out = tmp_path / "job.toml", tmp_path / f"out-{stream}"
    text = JOB.format(url=url, source=source, model=MODEL, schema=tmp_path / "schema.json", stream=str(stream).lower())
    job.write_text(text)
    ended = batchrun("run", job, "-o", out)
    assert ended.exit_code == 0, ended.stderr
    assert read_summary(out)["without_usage"] == 0
    return out


def test_every_answer_of_a_real_model_to_a_json_schema_job_validates_whole_or_streamed(tmp_path: Path) -> None:
    changes = Path(__file__).parent.parent / "sample_inputs" / "changes.jsonl"
    lines = sorted(changes.read_text("utf-8").splitlines(), key=len)[:20]
    source = tmp_path / "changes.jsonl"
    source.write_text("\n".join(lines), "utf-8")
    with running_model() as url:
        outs = [run_job(tmp_path, url, source, stream=stream) for stream in (False, True)]
    for out in outs:
        table = pq.read_table(out / "completions.parquet")
        enum = "dictionary<values=string, indices=int32, ordered=0>"
        assert str(table.schema.field("parsed").type) == f"struct<category: {enum}, user_visible: bool>"
        rows = table.to_pylist()
        assert len(rows) == 20
        for row in rows:
            assert row["status"] == "ok"
            jsonschema.validate(row["parsed"], SCHEMA)
            assert row["parsed"] == json.loads(row["content"])
            assert row["prompt_tokens"] > 0
            assert row["completion_tokens"] > 0
            assert row["cost_usd"] is None
    assert all(row["time_to_first_token_s"] > 0 for row in rows)
