"""What a value of any type is in a prompt: as JSON writes it, the same from Parquet and from JSON lines."""

import datetime as dt
import json
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.errors import InputError
from batchrun.job.load import from_tables
from batchrun.records import Request, Row
from batchrun.request.builder import RequestBuilder
from batchrun.simulator import SimulatorConfig
from batchrun.source import open_source
from tests.cli_process import batchrun, write_job
from tests.simulator_process import running_simulator

MOMENT = dt.datetime(2026, 1, 2, 3, 4, 5)
UUID = uuid.UUID(int=5)

Case = tuple["pa.Array[Any]", str, str]

CASES: dict[str, Case] = {
    "uint64": (pa.array([2**64 - 1], pa.uint64()), "18446744073709551615", "18446744073709551615"),
    "int8": (pa.array([-3], pa.int8()), "-3", "-3"),
    "half": (pa.array([1.5], pa.float16()), "1.5", "1.5"),
    "float": (pa.array([0.1], pa.float32()), "0.1", "0.1"),
    "double": (pa.array([0.25]), "0.25", "0.25"),
    "whole double": (pa.array([7.0]), "7", "7"),
    "large double": (pa.array([1e22]), "1e+22", "1e22"),
    "bool": (pa.array([True]), "true", "true"),
    "string": (pa.array(["<ä>"]), "<ä>", '"<ä>"'),
    "large_string": (pa.array(["x"], pa.large_string()), "x", '"x"'),
    "string_view": (pa.array(["x"], pa.string_view()), "x", '"x"'),
    "dictionary of strings": (pa.array(["a"]).dictionary_encode(), "a", '"a"'),
    "dictionary of integers": (pa.array([5]).dictionary_encode(), "5", "5"),
    "date32": (pa.array([MOMENT.date()]), "2026-01-02", '"2026-01-02"'),
    "date64": (pa.array([MOMENT.date()], pa.date64()), "2026-01-02", '"2026-01-02"'),
    "time32": (pa.array([MOMENT.time()], pa.time32("s")), "03:04:05", '"03:04:05"'),
    "time64": (pa.array([MOMENT.time()], pa.time64("us")), "03:04:05", '"03:04:05"'),
    "seconds": (pa.array([MOMENT], pa.timestamp("s")), "2026-01-02 03:04:05", '"2026-01-02T03:04:05"'),
    "nanoseconds": (
        pa.array([1], pa.timestamp("ns")),
        "1970-01-01 00:00:00.000000001",
        '"1970-01-01 00:00:00.000000001"',
    ),
    "zoned": (
        pa.array([MOMENT], pa.timestamp("us", "Europe/Berlin")),
        "2026-01-02 04:04:05+01:00",
        '"2026-01-02T04:04:05+01:00"',
    ),
    "duration": (pa.array([dt.timedelta(seconds=5)]), "0:00:05", '"PT5S"'),
    "decimal128": (pa.array([Decimal("1.50")]), "1.50", "1.50"),
    "decimal256": (pa.array([Decimal("1.50")], pa.decimal256(40, 2)), "1.50", "1.50"),
    "list": (pa.array([["a", None]]), '["a", null]', '["a", null]'),
    "large_list": (pa.array([[1, 2]], pa.large_list(pa.int8())), "[1, 2]", "[1, 2]"),
    "fixed list": (pa.array([[1, 2]], pa.list_(pa.int8(), 2)), "[1, 2]", "[1, 2]"),
    "struct": (pa.array([{"a": 1, "b": None}]), '{"a": 1, "b": null}', '{"a": 1, "b": null}'),
    "map": (pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int8())), '{"k": 1}', '{"k": 1}'),
    "nested": (
        pa.array([[{"a": [Decimal("1.5")], "b": MOMENT.date()}]]),
        '[{"a": [1.5], "b": "2026-01-02"}]',
        '[{"a": [1.5], "b": "2026-01-02"}]',
    ),
    "uuid": (pa.array([UUID.bytes], pa.uuid()), str(UUID), f'"{UUID}"'),
    "json": (pa.array(['{"a":1}'], pa.json_(pa.string())), '{"a":1}', '"{\\"a\\":1}"'),
}

REFUSED: dict[str, tuple["pa.Array[Any]", str]] = {
    "null": (pa.nulls(1), "column 'x' is null"),
    "NaN": (pa.array([float("nan")]), "a value is nan, which is not a number, in column 'x'"),
    "infinity": (pa.array([float("inf")], pa.float32()), "a value is inf, which is not a number, in column 'x'"),
    "NaN in a list": (pa.array([[1.0, float("nan")]]), "a value is nan, which is not a number, in column 'x'"),
    "binary": (pa.array([b"\xff"]), "a value is bytes (b'\\xff'), which are not text, in column 'x'"),
    "binary in a struct": (pa.array([{"a": b"x"}]), "a value is bytes (b'x'), which are not text, in column 'x'"),
}


def request_of(file: Path, prompt: str) -> Request:
    """The request that the file's one row becomes."""
    record = next(iter(open_source((file,)).records()))
    assert record.problem is None
    tables = {"endpoint": {"url": "simulator"}, "request": {"model": "m", "prompt": prompt}}
    return RequestBuilder(from_tables(tables), "columns").build(Row(0, record.columns))


def prompt_of(request: Request) -> str:
    text: str = msgspec.json.decode(request.body)["messages"][0]["content"]
    return text


def parquet(tmp_path: Path, column: "pa.Array[Any]") -> Path:
    pq.write_table(pa.table({"x": column}), tmp_path / "in.parquet")
    return tmp_path / "in.parquet"


@pytest.mark.parametrize("name", CASES)
def test_every_type_is_written_as_json(tmp_path: Path, name: str) -> None:
    column, text, in_json = CASES[name]
    file = parquet(tmp_path, column)
    assert prompt_of(request_of(file, "{{ x }}")) == text
    assert prompt_of(request_of(file, "{{ x | tojson }}")) == in_json


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_text_never_reaches_a_prompt(tmp_path: Path, name: str) -> None:
    column, problem = REFUSED[name]
    with pytest.raises(InputError) as refused:
        request_of(parquet(tmp_path, column), "{{ x }}")
    assert problem in str(refused.value)


@pytest.mark.parametrize(
    "value",
    [
        7,
        7.0,
        0.25,
        2**53,
        True,
        "ä",
        "",
        [1, 2.5, 3],
        ["a", None],
        {"a": {"b": [False]}},
        [[]],
        [{"n": 1.0}, {"n": 2.5}],
    ],
    ids=repr,
)
def test_json_lines_and_parquet_ask_alike(tmp_path: Path, value: object) -> None:
    lines = tmp_path / "in.jsonl"
    lines.write_text(json.dumps({"x": value}) + "\n")
    file = parquet(tmp_path, pa.array([value]))
    for prompt in ("{{ x }}", "{{ x | tojson }}", "{{ x | tojson(2) }}"):
        one, other = request_of(lines, prompt), request_of(file, prompt)
        assert (one.body, one.key) == (other.body, other.key)


def test_multiline_json_and_large_integers_work() -> None:
    tables = {"endpoint": {"url": "simulator"}, "request": {"model": "m", "prompt": "{{ x | tojson(2) }} {{ x.a }}"}}
    made = RequestBuilder(from_tables(tables), "columns").build(Row(0, {"x": {"a": 2**70}}))
    assert prompt_of(made) == f'{{\n  "a": {2**70}\n}} {2**70}'


def test_every_column_type_round_trips_a_run(tmp_path: Path) -> None:
    columns = {name: column for name, (column, *_) in (CASES | REFUSED).items()}
    table = pa.table({**columns, "text": ["hello"]})
    pq.write_table(table, tmp_path / "in.parquet")
    with running_simulator(SimulatorConfig()) as simulator:
        job = write_job(tmp_path / "job.toml", simulator.url, tmp_path / "in.parquet")
        ended = batchrun("run", job, "-o", tmp_path / "out", "--set", "request.prompt=Say: {{ text }}")
    assert ended.exit_code == 0, ended.stderr
    written = pq.read_table(tmp_path / "out" / "completions.parquet").select(table.column_names)
    given = pq.read_table(tmp_path / "in.parquet")
    assert written.schema.equals(given.schema)
    for name in table.column_names:
        after, before = written.column(name).combine_chunks(), given.column(name).combine_chunks()
        assert after.to_string() == before.to_string(), name
