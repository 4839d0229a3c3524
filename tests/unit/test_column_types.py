"""Every column type of Parquet reads in a prompt as the same values do from JSON lines, byte for byte."""

import datetime as dt
import json
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.errors import InputError
from batchrun.request.templates import text_template
from batchrun.source import as_file, find_files, open_source

MOMENT = dt.datetime(2026, 1, 2, 3, 4, 5)
F32 = pa.float32()


def extension(type_: Any, storage: "pa.Array[Any]") -> "pa.Array[Any]":
    return pa.ExtensionArray.from_storage(type_, storage)


def dictionary_in_a_list(values: "pa.Array[Any]") -> "pa.Array[Any]":
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values.dictionary_encode())


def in_a_struct(column: "pa.Array[Any]") -> "pa.Array[Any]":
    return pa.StructArray.from_arrays([column], ["a"])


TENSOR = extension(pa.fixed_shape_tensor(F32, [2]), pa.array([[0.1, 0.5]], pa.list_(F32, 2)))

AS_JSON: dict[str, tuple["pa.Array[Any]", object]] = {
    **{str(t): (pa.array([7], t), 7) for t in (pa.int8(), pa.int16(), pa.int32(), pa.int64())},
    **{str(t): (pa.array([7], t), 7) for t in (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())},
    "largest integer": (pa.array([2**64 - 1], pa.uint64()), 2**64 - 1),
    "half": (pa.array([0.5], pa.float16()), 0.5),
    "float": (pa.array([0.1], F32), 0.1),
    "small float": (pa.array([1e-45], F32), 1e-45),
    "double": (pa.array([0.1]), 0.1),
    "whole double": (pa.array([3.0]), 3),
    "large whole double": (pa.array([float(2**53)]), 2**53),
    "negative zero": (pa.array([-0.0]), -0.0),
    "decimal32": (pa.array([Decimal("1.5")], pa.decimal32(5, 1)), 1.5),
    "decimal64": (pa.array([Decimal("1.5")], pa.decimal64(12, 1)), 1.5),
    "decimal128": (pa.array([Decimal("-1.5")], pa.decimal128(20, 1)), -1.5),
    "decimal256": (pa.array([Decimal("1.5")], pa.decimal256(60, 1)), 1.5),
    "decimal without places": (pa.array([Decimal(2**70)], pa.decimal128(38, 0)), 2**70),
    "bool": (pa.array([False]), False),
    "bool8": (extension(pa.bool8(), pa.array([1], pa.int8())), True),
    **{str(t): (pa.array(['a\n"ä\\\0\U0001f600'], t), 'a\n"ä\\\0\U0001f600') for t in (pa.string(), pa.large_string())},
    "string_view": (pa.array(["ä"], pa.string_view()), "ä"),
    "json": (extension(pa.json_(pa.string()), pa.array(['{"a":1}'])), '{"a":1}'),
    "uuid": (extension(pa.uuid(), pa.array([uuid.UUID(int=5).bytes], pa.binary(16))), str(uuid.UUID(int=5))),
    "opaque": (extension(pa.opaque(pa.string(), "t", "v"), pa.array(["x"])), "x"),
    "date32": (pa.array([MOMENT.date()]), "2026-01-02"),
    "date64": (pa.array([MOMENT.date()], pa.date64()), "2026-01-02"),
    "time32": (pa.array([MOMENT.time()], pa.time32("ms")), "03:04:05"),
    "time64": (pa.array([dt.time(3, 4, 5, 6)], pa.time64("us")), "03:04:05.000006"),
    "time64 with nanoseconds": (pa.array([1], pa.time64("ns")), "00:00:00.000000001"),
    "dictionary": (pa.array(["x"]).dictionary_encode(), "x"),
    "dictionary of floats": (pa.array([0.1], F32).dictionary_encode(), 0.1),
    "dictionary of dates": (pa.array([MOMENT.date()]).dictionary_encode(), "2026-01-02"),
    "dictionary in a list": (dictionary_in_a_list(pa.array(["x", "y"])), ["x", "y"]),
    "dictionary of floats in a list": (dictionary_in_a_list(pa.array([0.1], F32)), [0.1]),
    "dictionary in a struct": (in_a_struct(pa.array(["x"]).dictionary_encode()), {"a": "x"}),
    **{
        f"{of.__name__} of {item}": (pa.array([[value, None]], of(item)), [value, None])
        for of in (pa.list_, pa.large_list, pa.list_view, pa.large_list_view)
        for item, value in ((F32, 0.1), (pa.float64(), 0.1), (pa.string(), "x"), (pa.date32(), MOMENT.date()))
    },
    "fixed list": (pa.array([[0.1, None]], pa.list_(F32, 2)), [0.1, None]),
    "empty lists": (pa.array([[[], None]], pa.list_(pa.list_(pa.int8()))), [[], None]),
    "list of nulls": (pa.array([[None]], pa.list_(pa.null())), [None]),
    "view in a list": (pa.array([[[0.1], []]], pa.list_(pa.list_view(F32))), [[0.1], []]),
    "view in a struct": (pa.array([{"a": [0.1]}], pa.struct([("a", pa.list_view(F32))])), {"a": [0.1]}),
    "view of structs": (pa.array([[{"a": 0.1}]], pa.list_view(pa.struct([("a", F32)]))), [{"a": 0.1}]),
    "struct": (pa.array([{"a": 1, "b c": None, "d": {"e": 0.1}}]), {"a": 1, "b c": None, "d": {"e": 0.1}}),
    "map": (pa.array([[("k", 0.1), ("l", None)]], pa.map_(pa.string(), F32)), {"k": 0.1, "l": None}),
    "empty map": (pa.array([[]], pa.map_(pa.string(), pa.int8())), {}),
    "map with integer keys": (pa.array([[(7, 1)]], pa.map_(pa.int32(), pa.int8())), {"7": 1}),
    "map with dates as keys": (pa.array([[(MOMENT.date(), 1)]], pa.map_(pa.date32(), pa.int8())), {"2026-01-02": 1}),
    "map in a map": (pa.array([[("k", [])]], pa.map_(pa.string(), pa.map_(pa.string(), F32))), {"k": {}}),
    "map in a list": (pa.array([[[("k", 0.1)]]], pa.list_(pa.map_(pa.string(), F32))), [{"k": 0.1}]),
    "structs in a map": (
        pa.array([[("k", {"a": 0.1})]], pa.map_(pa.string(), pa.struct([("a", F32)]))),
        {"k": {"a": 0.1}},
    ),
    "tensor": (TENSOR, [0.1, 0.5]),
    "tensor in a struct": (in_a_struct(TENSOR), {"a": [0.1, 0.5]}),
}

TEXTS: dict[str, tuple["pa.Array[Any]", str, str]] = {
    "timestamp s": (pa.array([MOMENT], pa.timestamp("s")), "2026-01-02 03:04:05", "2026-01-02T03:04:05"),
    "timestamp ms": (pa.array([MOMENT], pa.timestamp("ms")), "2026-01-02 03:04:05", "2026-01-02T03:04:05"),
    "timestamp ns": (pa.array([MOMENT], pa.timestamp("ns")), "2026-01-02 03:04:05", "2026-01-02T03:04:05"),
    "UTC": (pa.array([MOMENT], pa.timestamp("us", "UTC")), "2026-01-02 03:04:05+00:00", "2026-01-02T03:04:05Z"),
    "offset": (
        pa.array([MOMENT], pa.timestamp("us", "+05:30")),
        "2026-01-02 08:34:05+05:30",
        "2026-01-02T08:34:05+05:30",
    ),
    "nanoseconds in a zone": (
        pa.array([1], pa.timestamp("ns", "Europe/Berlin")),
        "1970-01-01 01:00:00.000000001+01:00",
        "1970-01-01 01:00:00.000000001+01:00",
    ),
    "duration": (pa.array([dt.timedelta(days=1, seconds=5)]), "1 day, 0:00:05", "P1DT5S"),
    "duration ns": (pa.array([1], pa.duration("ns")), "0:00:00.000000001", "0:00:00.000000001"),
    "a half and a nanosecond": (
        pa.array([500_000_001], pa.duration("ns")),
        "0:00:00.500000001",
        "0:00:00.500000001",
    ),
    "small decimal": (pa.array([Decimal("1e-12")], pa.decimal128(20, 12)), "0.000000000001", "0.000000000001"),
    "zero with places": (pa.array([Decimal(0)], pa.decimal128(20, 10)), "0.0000000000", "0.0000000000"),
}

REFUSED: dict[str, tuple["pa.Array[Any]", str]] = {
    "date": (pa.array([10**7], pa.date32()), "column 'x' of type date32[day]: a value is out of the range"),
    "timestamp": (
        pa.array([2**62], pa.timestamp("us")),
        "column 'x' of type timestamp[us]: a value is out of the range",
    ),
    "duration": (pa.array([2**62], pa.duration("s")), "column 'x' of type duration[s]: a value is out of the range"),
    "zone": (
        pa.array([MOMENT], pa.timestamp("us", "Mars/Base")),
        "column 'x' of type timestamp[us, tz=Mars/Base]: its time zone is not known here; install tzdata, or cast",
    ),
    "map": (
        pa.array([[("k", 1), ("k", 2)]], pa.map_(pa.string(), pa.int8())),
        "column 'x' of type map<string, int8 ('x')>: a map has the key twice: 'k'",
    ),
    "text": (
        pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]),
        "column 'x' of type string: a text is not UTF-8",
    ),
}


def prompts_of(file: Path) -> list[str]:
    (record,) = open_source(find_files(str(file))).records()
    assert record.problem is None, record.problem
    return [text_template(text, "request.prompt")(record.columns) for text in ("{{ x }}", "{{ x | tojson }}")]


def parquet(tmp_path: Path, column: "pa.Array[Any]") -> Path:
    pq.write_table(pa.table({"x": column}), tmp_path / "in.parquet")
    return tmp_path / "in.parquet"


@pytest.mark.parametrize("name", AS_JSON)
def test_parquet_and_json_lines_give_equal_prompts(tmp_path: Path, name: str) -> None:
    column, value = AS_JSON[name]
    lines = tmp_path / "in.jsonl"
    lines.write_text(json.dumps({"x": value}, default=str) + "\n")
    assert prompts_of(parquet(tmp_path, column)) == prompts_of(lines)


@pytest.mark.parametrize("name", TEXTS)
def test_times_and_decimals_have_documented_texts(tmp_path: Path, name: str) -> None:
    column, text, in_json = TEXTS[name]
    assert [each.strip('"') for each in prompts_of(parquet(tmp_path, column))] == [text, in_json]


@pytest.mark.parametrize("name", REFUSED)
def test_an_unreadable_value_names_its_column(tmp_path: Path, name: str) -> None:
    column, said = REFUSED[name]
    (record,) = open_source(find_files(str(parquet(tmp_path, column)))).records()
    assert record.problem is not None
    assert record.problem.startswith(said)
    assert "\n" not in record.problem


def test_a_struct_with_a_field_twice_is_refused(tmp_path: Path) -> None:
    twice = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"])
    file = parquet(tmp_path, pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), twice))
    with pytest.raises(InputError, match="column 'x' has two fields named 'a' in one struct; rename one"):
        open_source((file,))


def test_deep_nesting_is_not_called_damage(tmp_path: Path) -> None:
    value: Any = 1
    for _ in range(60):
        value = [value]
    with pytest.raises(InputError, match="nested more than 100 levels deep; write it as JSON text"):
        open_source((parquet(tmp_path, pa.array([value])),))


def test_a_damaged_column_is_named_with_its_type(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    columns = {name: [f"{name}{n}" * 20 for n in range(500)] for name in ("good", "bad")}
    pq.write_table(pa.table(columns), path, compression="none", use_dictionary=False, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[content.index(b"bad250bad250")] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"rows 0 to 499 can't be read: column 'bad' of type string: "):
        list(open_source((path,)).records())


def test_tables_may_hold_types_without_parquet(tmp_path: Path) -> None:
    given = pa.table(
        {
            "x": pa.RunEndEncodedArray.from_arrays(pa.array([2], pa.int32()), pa.array(["a"])),
            "v": pa.array([[[0.1]], None], pa.list_(pa.list_view(F32))),
        }
    )
    with as_file(given, tmp_path) as file:
        (tmp_path / "in.parquet").write_bytes(file.read())
    records = open_source((tmp_path / "in.parquet",)).records()
    assert [record.columns for record in records] == [{"x": "a", "v": [[0.1]]}, {"x": "a", "v": None}]


@pytest.mark.parametrize("column", [pa.nulls(1, pa.month_day_nano_interval()), pa.array([{}], pa.struct([]))])
def test_an_unstorable_table_column_is_named(tmp_path: Path, column: Any) -> None:
    with (
        pytest.raises(InputError, match=f"column 'x' of type {column.type}: .*; cast it"),
        as_file(pa.table({"a": [1], "x": column}), tmp_path),
    ):
        pass
