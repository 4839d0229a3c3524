"""`batchrun show`: rows on the terminal, chosen by filters; a model's text can't control the terminal."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.errors import JobError
from batchrun.report import row_view, run_rows
from batchrun.report.row_filter import RowFilter
from batchrun.simulator import SimulatorConfig, parse_faults
from batchrun.store.rundir import RunDirectory
from tests.cli_process import batchrun, write_job, write_rows
from tests.result_files import row, write_result
from tests.simulator_process import running_simulator


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("show")
    config = SimulatorConfig(latency_s=0.01, faults=parse_faults("content_policy=0.1,429=0.1"))
    with running_simulator(config) as simulator:
        job = write_job(folder / "job.toml", simulator.url, write_rows(folder / "in.jsonl", 60))
        more = ("--set", 'output.prefix="our_"')
        assert batchrun("run", job, "-o", folder / "out").exit_code in (0, 3)
        assert batchrun("run", job, "-o", folder / "prefixed", *more).exit_code in (0, 3)
    return folder / "out"


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("where", "holds"),
    [
        ("cost_usd > 0.0004", lambda row: float(row["cost_usd"]) > 0.0004),
        ("cost_usd == 0", lambda row: row["cost_usd"] == 0),
        (
            "status == 'ok' and completion_tokens >= 20",
            lambda row: row["status"] == "ok" and row["completion_tokens"] >= 20,
        ),
        ("status in ['ok', 'filtered']", lambda row: row["status"] in ("ok", "filtered")),
        ("not status == 'ok'", lambda row: row["status"] != "ok"),
        ("error.kind is not None", lambda row: row["error"] is not None),
        ("error is None or attempts != 1", lambda row: row["error"] is None or row["attempts"] != 1),
        ("score < 3.5", lambda row: row["score"] < 3.5),
        ("text == 'item 17 '", lambda row: row["text"] == "item 17 "),
    ],
)
def test_where_is_the_filter_that_it_reads_like(run: Path, where: str, holds: object) -> None:
    assert callable(holds)
    rows = pq.read_table(run / "completions.parquet").to_pylist()
    expected = [row["row"] for row in rows if holds(row)]
    assert 0 < len(expected) < 60
    for place in (run, run.parent / "prefixed"):
        result = row_view.result_at(RunDirectory(place))
        found = [row["row"] for row in row_view.rows(result, row_view.Selection(where=where, most=0))]
        if place == run:
            assert found == expected
        assert "raw" not in next(row_view.rows(result, row_view.Selection()))


@pytest.mark.parametrize(
    "where",
    [
        *("", "cost_usd >", "__import__('os')", "nothing > 1", "cost_usd > cost_usd", "1 < 2", "error.nothing == 1"),
        *("cost_usd < (1).real", "status.upper() == 'OK'", "row > 1 < 2", "row = 1", "lambda: 1", "row in 5"),
        "(" * 500 + "row > 1" + ")" * 500,
    ],
)
def test_an_invalid_filter_is_one_error_line(run: Path, where: str) -> None:
    result = row_view.result_at(RunDirectory(run))
    with pytest.raises(JobError, match=r"^--where") as refused:
        RowFilter(where, result.schema)
    assert "\n" not in str(refused.value)


def test_comparing_text_with_numbers_is_refused(run: Path) -> None:
    ended = batchrun("show", run, "--where", "status > 3")
    assert (ended.exit_code, ended.stderr.count("\n")) == (2, 1)
    assert ended.stderr.startswith("Error: --where status > 3: ")


def test_rows_are_shown_with_question_answer_and_reason(run: Path) -> None:
    rows = pq.read_table(run / "completions.parquet").to_pylist()
    shown = batchrun("show", run, "--row", "3,10-11").stdout
    blocks = shown.strip().split("\n\n")
    assert [block.split(" · ")[0] for block in blocks] == ["row 3", "row 10", "row 11"]
    for block, number in zip(blocks, (3, 10, 11), strict=True):
        assert rows[number]["text"].strip() in block
        assert (rows[number]["content"] or rows[number]["error"]["kind"]).split("\n")[0] in block
    failed = next(row for row in rows if row["status"] == "filtered")
    assert failed["error"]["message"].split("\n")[0] in batchrun("show", run, "--status", "filtered", "-n", "1").stdout
    assert batchrun("show", run, "--status", "nothing").stdout == "no row matches\n"


def test_json_output_has_every_column_and_row(run: Path) -> None:
    rows = pq.read_table(run / "completions.parquet").to_pylist()
    reported = [json.loads(line) for line in batchrun("show", run, "-n", "0", "--json").stdout.splitlines()]
    assert len(reported) == 60
    for shown, stored in zip(reported, rows, strict=True):
        assert shown["cost_usd"] == f"{stored['cost_usd']:f}"
        assert shown["request_key"] == stored["request_key"].hex()
        assert (shown["content"], shown["text"], shown["error"]) == (stored["content"], stored["text"], stored["error"])
    few = batchrun("show", run, "--columns", "text,cost_usd", "--json", "-n", "2").stdout.splitlines()
    assert [list(json.loads(line)) for line in few] == [["text", "cost_usd"]] * 2
    assert batchrun("show", run, "--columns", "text", "-n", "1").stdout.startswith("row 0 · ")


def test_model_text_cannot_steer_the_terminal(run: Path, tmp_path: Path) -> None:
    """Nor can it look like a line of ours."""
    table = pq.read_table(run / "completions.parquet")
    rows = table.to_pylist()
    rows[0]["content"] = "\x1b[2J\x07fine\nrow 99 · ok · $0.000000\r\u202eevil"
    pq.write_table(table.from_pylist(rows, table.schema), tmp_path / "moved.parquet")
    shown = batchrun("show", tmp_path / "moved.parquet", "--row", "0").stdout
    assert not [char for char in shown if not char.isprintable() and char != "\n"]
    assert not [line for line in shown.splitlines()[1:] if line.startswith("row")]


def test_where_reads_the_fields_of_typed_answers(tmp_path: Path) -> None:
    labels = ("good", "bad", "mixed")
    rows = [row(n, parsed={"label": labels[n % 3], "score": n / 2, "note": None}) for n in range(90)]
    result = row_view.result_at(RunDirectory(write_result(tmp_path / "run", rows, typed=True)))
    for where, count in (
        ("parsed.label == 'bad'", 30),
        ("parsed.label in ['good', 'mixed'] and parsed.score < 15", 20),
        ("parsed.label not in ['good', 'mixed']", 30),
        ("parsed.note not in ['x']", 90),
        ("parsed.label in []", 0),
        ("parsed.note is None", 90),
        ("cost_usd in [0.001]", 90),
        ("cost_usd > 0.0010000000000000000001", 0),
    ):
        assert len(list(row_view.rows(result, row_view.Selection(where=where, most=0)))) == count, where


@pytest.mark.heavy
def test_files_rewritten_by_other_tools_read_alike(run: Path, tmp_path: Path) -> None:
    """Texts as large ones, columns without a value as null: as polars and pandas write them."""
    table = pq.read_table(run / "completions.parquet")
    for place, field in enumerate(table.schema):
        column = table.column(place)
        if pa.types.is_string(field.type):
            table = table.set_column(place, field.name, column.cast(pa.large_string()))
        elif column.null_count == len(column):
            table = table.set_column(place, field.name, pa.nulls(len(column)))
    (other := tmp_path / "other").mkdir()
    pq.write_table(table, other / "completions.parquet")
    (other / "summary.json").write_bytes((run / "summary.json").read_bytes())
    for arguments in (
        ("show", "--status", "ok", "--where", "status in ['ok']"),
        ("report", "--findings", "--by", "status"),
    ):
        name, *more = arguments
        assert batchrun(name, other, *more).stdout == batchrun(name, run, *more).stdout != ""
    assert "content: 0 changed (0.0%)" in batchrun("compare", run, other).stdout


def test_missing_rows_name_the_next_step(run: Path, tmp_path: Path) -> None:
    assert batchrun("show", tmp_path).stderr.startswith(f"Error: {tmp_path}: no rows here; ")
    (tmp_path / "checkpoint.db").touch()
    assert f"batchrun export {tmp_path} writes the rows so far" in batchrun("show", tmp_path).stderr
    assert batchrun("show", run, "--columns", "nothing").exit_code == 2
    assert batchrun("show", run, "--row", "x").exit_code == 2
    assert run_rows.result_of(tmp_path) is None
