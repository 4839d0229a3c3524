from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.errors import InputError, JobError
from batchrun.job.job import Job
from batchrun.records import Row
from batchrun.request.builder import RequestBuilder
from batchrun.source import open_source
from batchrun.startup.input_check import SHOWN, Problem, Survey, survey
from batchrun.startup.preconditions import raise_problems
from tests.cli_process import batchrun, write_job
from tests.endings import MODEL
from tests.jobs import job_over, texts, write_lines


def surveyed(path: Path, job: Job | None = None, keep: Callable[[Problem], None] = lambda problem: None) -> Survey:
    return survey(open_source((path,)), job or job_over(path), path.parent, keep=keep)


def with_id(path: Path) -> Job:
    return job_over(path, input={"id": "id"})


def test_every_row_is_counted_with_its_size(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", texts(7))
    found = surveyed(path)
    requests = [RequestBuilder(job_over(path), "columns").build(Row(n, row)) for n, row in enumerate(texts(7))]
    assert (found.rows, list(found.rejected), found.first_problems) == (7, [], ())
    assert (found.dialect, found.models) == ("columns", {MODEL: 7})
    assert found.body_bytes == sum(len(request.body) for request in requests)
    assert found.max_request == {MODEL: (max(request.max_prompt_tokens for request in requests), 16)}
    assert found.types is not None
    assert found.types.schema() == pa.schema({"id": pa.string(), "text": pa.string()})


def test_parquet_brings_its_own_types(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(texts(3)), tmp_path / "in.parquet")
    found = surveyed(tmp_path / "in.parquet")
    assert (found.rows, found.types) == (3, None)


@pytest.mark.parametrize("content", [b"", b"\n\n  \n", b"\xef\xbb\xbf\n"])
def test_an_empty_input_is_no_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)
    found = surveyed(tmp_path / "in.jsonl")
    assert (found.rows, len(found.rejected), found.models, found.max_request) == (0, 0, {}, {})
    assert found.types is not None
    assert found.types.schema() == pa.schema([])


def test_every_invalid_record_has_place_and_reason(tmp_path: Path) -> None:
    lines = [b'{"text": "a"}', b"", b'{"text": ', b"[1]", b'{"other": 1}', b'{"text": null}', b'{"text": "b"}']
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    kept: list[Problem] = []
    found = surveyed(tmp_path / "in.jsonl", keep=kept.append)
    assert found.rows == 2
    assert list(found.rejected) == [1, 2, 3, 4]
    assert kept == list(found.first_problems)
    shown = [str(problem) for problem in kept]
    for place, line, words in zip(shown, (3, 4, 5, 6), ("ends too early", "an array", "text", "null"), strict=True):
        assert place.startswith(f"{tmp_path}/in.jsonl:{line}: ")
        assert words in place
    assert [problem.record for problem in kept] == [None, None, {"other": 1}, {"text": None}]


def test_twenty_messages_are_shown_all_are_counted(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", [{"text": "good"}, *[{"bad": number} for number in range(50)]])
    kept: list[Problem] = []
    found = surveyed(path, keep=kept.append)
    assert len(found.first_problems) == SHOWN == 20
    assert list(found.rejected) == list(range(1, 51)) == [problem.ordinal for problem in kept]


def test_one_mistake_is_one_message_with_its_count(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": "good"}, *[{"bad": number} for number in range(50)], {"text": None}]
    found = surveyed(write_lines(tmp_path / "in.jsonl", rows))
    shown: list[str] = []
    with pytest.raises(InputError, match=r"51 of 52 input records make no valid request\. "):
        raise_problems(found, shown.append)
    missing, null = shown
    assert missing.startswith(f"{tmp_path}/in.jsonl:2: request.prompt: 'text' is undefined")
    assert missing.endswith("(columns: bad) (and 49 more such records)")
    assert null.startswith(f"{tmp_path}/in.jsonl:52: request.prompt: column 'text' is null")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"request": {"prompt": "{{ text }}"}}, "'text' is undefined; did you mean txt? (columns: txt, a)"),
        ({"request": {"prompt": '{{ row["text"] }}'}}, "no attribute 'text'; did you mean txt? (columns: txt, a)"),
        ({"request": {"prompt": "{{ txt.text }}"}}, "'str object' has no attribute 'text' (columns: txt, a)"),
        ({"input": {"id": "text"}}, "which input.id names, is missing; did you mean txt? (columns: txt, a)"),
        ({"request": {"images": ["text"]}}, "request.images names, is missing; did you mean txt? (columns: txt, a)"),
        (
            {"request": {"prompt": None, "messages": "text"}},
            "which holds the messages, is missing; did you mean txt? (columns: txt, a)",
        ),
        (
            {"request": {"from_columns": {"model": "text"}}},
            "request.from_columns.model names, is missing; did you mean txt? (columns: txt, a)",
        ),
    ],
)
def test_a_missing_column_is_one_message(tmp_path: Path, settings: dict[str, dict[str, Any]], said: str) -> None:
    """It lists the columns there are, however the records differ."""
    path = write_lines(tmp_path / "in.jsonl", [{"txt": "x", chr(97 + n): n} for n in range(26)])
    changes = {"request": {"prompt": "{{ txt }}"} | settings.get("request", {}), "input": settings.get("input", {})}
    found = surveyed(path, job_over(path, **changes))
    shown: list[str] = []
    with pytest.raises(InputError):
        raise_problems(found, shown.append)
    assert len(shown) == 1
    assert shown[0].endswith(f"{said} (and 25 more such records)")


def test_a_repeated_id_names_its_first_record(tmp_path: Path) -> None:
    """A record whose id appeared earlier is not a row."""
    rows: list[Any] = [
        *texts(3),
        {"id": "r1", "text": "again"},
        {"bad": 1},
        *texts(2, 3),
        {"id": "r1", "text": "third"},
    ]
    path = write_lines(tmp_path / "in.jsonl", rows)
    kept: list[Problem] = []
    found = surveyed(path, with_id(path), kept.append)
    assert (found.rows, found.models) == (5, {MODEL: 5})
    assert list(found.rejected) == [3, 4, 7]
    assert found.body_bytes == surveyed(write_lines(tmp_path / "good.jsonl", texts(5))).body_bytes
    repeated = [str(problem) for problem in kept if "its id" in problem.problem]
    assert repeated == [
        f"{path}:4: {path}:2 has its id already",
        f"{path}:8: {path}:2 has its id already",
    ]
    assert kept[1].record == {"id": "r1", "text": "again"}


def test_models_of_repeated_rows_are_not_used(tmp_path: Path) -> None:
    rows = [{"id": 1, "text": "a", "m": "one"}, {"id": 1, "text": "a", "m": "two"}]
    path = write_lines(tmp_path / "in.jsonl", rows)
    job = job_over(path, input={"id": "id"}, request={"from_columns": {"model": "m"}})
    assert surveyed(path, job).models == {"one": 1}


def test_invalid_ids_are_reported_with_reasons(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", [{"text": "a"}, {"text": "b", "id": None}, {"text": "c", "id": 1.5}])
    found = surveyed(path, with_id(path))
    assert found.rows == 0
    problems = [problem.problem for problem in found.first_problems]
    assert problems == [
        "column 'id', which input.id names, is missing (columns: text)",
        "id: the id is null",
        "id: the id is a float, not a string or an integer",
    ]


def test_batch_lines_must_have_unique_custom_ids(tmp_path: Path) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    path = write_lines(tmp_path / "in.jsonl", [line, line])
    found = surveyed(path, job_over(path, request={"prompt": None, "model": None}))
    assert (found.dialect, found.rows, list(found.rejected)) == ("openai-batch", 1, [1])


def test_a_non_unique_id_column_shows_twenty(tmp_path: Path) -> None:
    """An id column that repeats everywhere is reported by its first twenty repetitions."""
    path = write_lines(tmp_path / "in.jsonl", ({"id": "same", "text": "t"} for _ in range(4000)))
    kept: list[Problem] = []
    found = surveyed(path, with_id(path), kept.append)
    assert (found.rows, list(found.rejected)) == (1, list(range(1, 4000)))
    assert {problem.problem for problem in found.first_problems} == {f"{path}:1 has its id already"}
    assert kept[SHOWN].problem == "an earlier record has its id"


def test_an_ambiguous_dialect_must_be_chosen(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", texts(1))
    with pytest.raises(InputError, match="neither job nor rows say what to send"):
        surveyed(path, job_over(path, request={"prompt": None}))


def test_an_invalid_template_is_a_job_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", texts(1))
    with pytest.raises(JobError, match="prompt"):
        surveyed(path, job_over(path, request={"prompt": "{{ text"}))


def test_the_check_reports_its_progress(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", texts(10_001))
    shown: list[int] = []
    survey(open_source((path,)), job_over(path), tmp_path, progress=shown.append)
    assert shown == [1, 5001, 10_001]


@pytest.mark.heavy
@pytest.mark.sampled(2)
@pytest.mark.parametrize("command", ["check", "estimate"])
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_reserved_column_names_are_refused_as_by_run(tmp_path: Path, command: str, form: str) -> None:
    source = tmp_path / f"in.{form}"
    rows = [{**row, "status": "new"} for row in texts(3)]
    if form == "jsonl":
        write_lines(source, rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), source)
    job = write_job(tmp_path / "job.toml", "simulator", source)
    ended, ran = batchrun(command, job), batchrun("run", job, "-o", tmp_path / "out")
    assert "input column 'status' has the name of an output column; set output.prefix" in ended.stderr
    assert (ended.exit_code, ended.stdout, ended.stderr) == (2, "", ran.stderr)
    assert batchrun(command, job, "--set", "output.prefix=batchrun_").exit_code == 0


def test_parquet_with_unusable_columns_is_refused_early(tmp_path: Path) -> None:
    """Columns that the output can't have are refused before a row is read."""
    source = tmp_path / "in.parquet"
    pq.write_table(pa.table({"text": ["a"] * 1_000, "status": [None] * 1_000}), source)
    content = bytearray(source.read_bytes())
    content[4:64] = bytes(60)  # its first page: whoever reads a row fails
    source.write_bytes(content)
    job = write_job(tmp_path / "job.toml", "simulator", source)
    for command in (("run", job, "-o", tmp_path / "out"), ("check", job), ("estimate", job)):
        ended = batchrun(*command)
        assert (ended.exit_code, "has the name of an output column" in ended.stderr) == (2, True), ended.stderr


def test_check_names_the_columns_with_their_types(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("id,text\n007,a\n")
    write_lines(tmp_path / "in.jsonl", [{"id": 7, "text": "a"}])
    job = write_job(tmp_path / "job.toml", "http://127.0.0.1:9/v1", tmp_path / "in.csv")
    assert "columns: id string, text string\n" in batchrun("check", job).stdout
    assert "columns: id int64, text string\n" in batchrun("check", job, "-i", tmp_path / "in.jsonl").stdout


def test_any_file_name_is_shown_on_one_line(tmp_path: Path) -> None:
    path = write_lines(tmp_path / 'a\n"b\\\x7f.jsonl', [{"txt": "x"}])
    ended = batchrun("check", write_job(tmp_path / "job.toml", "simulator", "unused"), "-i", path)
    first, second, *more = ended.stderr.splitlines()
    assert first.endswith(
        "a\\n\"b\\\\x7f.jsonl:1: request.prompt: 'text' is undefined; did you mean txt? (columns: txt)"
    )
    assert second.startswith("Error: none of the input records (1) make a valid request")
    assert not more
