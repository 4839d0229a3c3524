"""The same product against a server and a model from elsewhere."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pyarrow.parquet as pq
import pytest

from tests.cli_process import KEY, Ended, batchrun, read_summary
from tests.jobs import write_lines
from tests.pictures import SAMPLES
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
{endpoint}

[input]
path = "{source}"
image_root = "{samples}"

[request]
model = "{model}"
temperature = 0.0
{request}

[limits]
max_in_flight = {in_flight}
"""

QUESTIONS = ["Say hello.", "Name a colour.", "Count to three."]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running_model() as served:
        yield served


def run(
    tmp_path: Path, url: str, source: Path, request: str, endpoint: str = "", key: str = KEY, in_flight: int = 4
) -> tuple[Ended, Path]:
    """The end of a run over the source, and its directory."""
    place = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
    place.mkdir()
    job = place / "job.toml"
    values = {"url": url, "source": source, "samples": SAMPLES, "model": MODEL}
    job.write_text(JOB.format(**values, request=request, endpoint=endpoint, in_flight=in_flight))
    return batchrun("run", job, "-o", place / "out", key=key), place / "out"


def rows_of(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out / "completions.parquet").to_pylist()


def prompts(tmp_path: Path) -> Path:
    """An input of a few questions."""
    return write_lines(tmp_path / "in.jsonl", [{"text": question} for question in QUESTIONS])


@pytest.mark.heavy
def test_answers_of_a_real_model_fit_their_schema(tmp_path: Path, url: str) -> None:
    """Whole and streamed."""
    changes = Path(__file__).parents[2] / "sample_inputs" / "changes.jsonl"
    lines = sorted(changes.read_text("utf-8").splitlines(), key=len)
    source = tmp_path / "changes.jsonl"
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    request = f"""
max_tokens = 60
system = "You label change-log entries. Answer in JSON."
prompt = "{{{{ text }}}}"
response_format = {{ type = "json_schema", file = "{tmp_path}/schema.json" }}
"""
    for stream, count in (("stream = false", 4), ("stream = true", 2)):
        source.write_text("\n".join(lines[:count]), "utf-8")
        ended, out = run(tmp_path, url, source, request + stream)
        assert ended.exit_code == 0, ended.stderr
        assert read_summary(out)["without_usage"] == 0
        rows = rows_of(out)
        assert len(rows) == count
        for row in rows:
            assert row["status"] == "ok"
            jsonschema.validate(row["parsed"], SCHEMA)
            assert row["parsed"] == json.loads(row["content"])
            assert row["prompt_tokens"] > 0
            assert row["completion_tokens"] > 0
            assert row["cost_usd"] is None
    assert all(row["time_to_first_token_s"] > 0 for row in rows)


@pytest.mark.heavy
def test_a_real_server_accepts_our_requests(tmp_path: Path, url: str) -> None:
    """With its own parameters, with tools, and with a stream that states no usage."""
    request = """
prompt = "{{ text }}"
max_tokens = 3
stream = true
extra = { stream_options = {}, tools = [
  { type = "function", function = { name = "f", parameters = { type = "object", properties = {} } } }] }
"""
    words = 'max_tokens_field = "max_completion_tokens"\ndeveloper_role = "system"'
    ended, out = run(tmp_path, url, prompts(tmp_path), request, words)
    assert ended.exit_code == 0, ended.stderr
    assert read_summary(out)["without_usage"] == len(QUESTIONS)
    for row in rows_of(out):
        assert (row["status"], row["finish_reason"], row["completion_tokens"]) == ("truncated", "length", None)
        assert 0 < len(row["content"].split()) <= 3
        assert row["time_to_first_token_s"] > 0


def test_a_wrong_key_pauses_without_failed_rows(tmp_path: Path, url: str) -> None:
    ended, out = run(tmp_path, url, prompts(tmp_path), 'prompt = "{{ text }}"', key="some-other-key")
    assert ended.exit_code == 5, ended.stderr
    summary = read_summary(out)
    assert (summary["pending"], summary["by_status"]) == (len(QUESTIONS), {})


def test_a_text_model_refuses_images_within_ten_rows(tmp_path: Path, url: str) -> None:
    """The stop repeats the server's own words."""
    source = write_lines(tmp_path / "in.jsonl", [{"image": path.name} for path in sorted(SAMPLES.iterdir())])
    ended, out = run(tmp_path, url, source, 'prompt = "Caption it."\nimages = ["image"]\nmax_tokens = 5')
    assert ended.exit_code == 2, ended.stderr
    assert "image input is not supported" in ended.stdout + ended.stderr
    summary = read_summary(out)
    assert summary["by_status"]["error"] <= 13  # ten alike, and who was in flight
    assert sum(line["attempts"] for line in summary["totals"]) == summary["by_status"]["error"]


@pytest.mark.sampled(0)
def test_the_official_client_reads_the_same_answers(tmp_path: Path, url: str) -> None:
    own = {"seed": 7, "cache_prompt": False}  # with a cache, the same prompt is computed in other batches
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        expected = []
        for question in QUESTIONS:
            answer = client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": question}],
                temperature=0,
                max_tokens=6,
                extra_body=own,
            )
            usage = answer.usage
            assert usage is not None
            choice = answer.choices[0]
            expected.append(
                (choice.message.content, choice.finish_reason, usage.prompt_tokens, usage.completion_tokens)
            )
    request = 'prompt = "{{ text }}"\nmax_tokens = 6\nextra = { seed = 7, cache_prompt = false }\n'
    for stream in ("stream = false", "stream = true"):
        ended, out = run(tmp_path, url, prompts(tmp_path), request + stream, in_flight=1)
        assert ended.exit_code == 0, ended.stderr
        columns = ("content", "finish_reason", "prompt_tokens", "completion_tokens")
        assert [tuple(row[name] for name in columns) for row in rows_of(out)] == expected
