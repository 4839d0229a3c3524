import datetime as dt
import os
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchrun.errors import InputError
from batchrun.source import START, JsonlSource, Position, TableSource, Window, rows_of
from tests import level

SHARED = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=level.amount(8, 50)
)
DAY = dt.datetime(2026, 11, 22, 6, 0, 0, 250, tzinfo=dt.UTC)


def written(path: Path, table: pa.Table, row_group_size: int = 2) -> Path:
    pq.write_table(table, path, row_group_size=row_group_size, write_page_checksum=True)
    return path


def stored(window: Window) -> pa.Table:
    """The window as a chunk's input file gives it back, in batches of two rows."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, window.table.schema) as writer:
        writer.write_table(window.table, max_chunksize=2)
    with pa.ipc.open_file(sink.getvalue()) as reader:
        return reader.read_all()


def rows_in(windows: Sequence[Window]) -> list[dict[str, object]]:
    return [row for window in windows for batch in stored(window).to_batches() for row in rows_of(batch)]


def refused(*files: Path) -> str:
    with pytest.raises(InputError) as error:
        list(TableSource(files).records())
    assert "\n" not in str(error.value)
    return str(error.value)


COLUMNS: dict[str, "pa.Array[Any]"] = {
    "dictionary": pa.array(["a", "b", "a", None, "c"]).dictionary_encode(),
    "nested dictionary": pa.array(
        [["a"], ["b", "a"], None, [], ["c"]], pa.list_(pa.dictionary(pa.int8(), pa.string()))
    ),
    "large_string": pa.array(["a", "b" * 50, None, "", "c"], pa.large_string()),
    "string_view": pa.array(["a", "b" * 50, None, "", "c"], pa.string_view()),
    "binary": pa.array([b"a", b"\xff", None, b"", b"c"]),
    "struct": pa.array([{"x": 1, "y": "a"}, {"x": None, "y": "b"}, None, {"x": 3, "y": None}, {"x": 4, "y": ""}]),
    "list": pa.array([[1], [], None, [None], [2, 3]]),
    "list_view": pa.array([[1], [], None, [None], [2, 3]], pa.list_view(pa.int32())),
    "fixed list": pa.array([[1, 2]] * 5, pa.list_(pa.int32(), 2)),
    "map": pa.array([[("k", 1)], [], None, [("k", 2), ("l", None)], []], pa.map_(pa.string(), pa.int32())),
    "decimal": pa.array([Decimal("1.10"), None, Decimal("-2.00"), Decimal(0), Decimal(1)], pa.decimal128(38, 2)),
    "decimal256": pa.array([Decimal("1.10")] * 5, pa.decimal256(70, 2)),
    "timestamp with zone": pa.array([DAY] * 5, pa.timestamp("us", "Europe/Berlin")),
    "nanoseconds": pa.array([1001, 1000, None, 0, 1], pa.timestamp("ns")),
    "time": pa.array([1001] * 5, pa.time64("ns")),
    "half": pa.array([1.5] * 5, pa.float16()),
    "uint64": pa.array([2**64 - 1] * 5, pa.uint64()),
    "null": pa.nulls(5),
    "uuid": pa.array([os.urandom(16) for _ in range(5)], pa.uuid()),
    "json": pa.array(["{}"] * 5, pa.json_(pa.string())),
    "opaque": pa.ExtensionArray.from_storage(pa.opaque(pa.string(), "a", "b"), pa.array(["x"] * 5)),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_every_column_type_passes_windows(tmp_path: Path, name: str) -> None:
    table = pa.table({"c": COLUMNS[name]})
    source = TableSource((written(tmp_path / "a.parquet", table),))
    (window,) = source.windows(START, 10, 1 << 20)
    assert stored(window).schema == table.schema
    assert stored(window)["c"].combine_chunks().equals(table["c"].combine_chunks())
    assert rows_in([window]) == [record.columns for record in source.records()]


@SHARED
@given(
    counts=st.lists(st.integers(0, 7), min_size=1, max_size=3),
    group=st.integers(1, 4),
    skip=st.sets(st.integers(0, 12)),
    max_rows=st.integers(1, 5),
    max_bytes=st.integers(1, 200),
)
def test_windows_of_parquet_resume_exactly(
    tmp_path: Path, counts: list[int], group: int, skip: set[int], max_rows: int, max_bytes: int
) -> None:
    """They are whole and within their limits."""
    files = tuple(
        written(
            tmp_path / f"{k}.parquet",
            pa.table({"n": [f"{k}.{i}" * i for i in range(count)]}, pa.schema({"n": pa.string()})),
            group,
        )
        for k, count in enumerate(counts)
    )
    source = TableSource(files)
    everything = list(source.records())
    windows = list(source.windows(START, max_rows, max_bytes, skip))
    assert [record.ordinal for record in everything] == list(range(sum(counts)))
    assert rows_in(windows) == [record.columns for record in everything if record.ordinal not in skip]
    assert all(1 <= window.rows <= max_rows for window in windows)
    assert all(window.rows == 1 or window.table.nbytes <= max_bytes + 8 * window.rows for window in windows)
    for k, window in enumerate(windows):
        assert list(source.windows(window.end, max_rows, max_bytes, skip)) == windows[k + 1 :]
        assert list(source.records(window.end)) == everything[window.end.ordinal :]


@SHARED
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "text": st.none() | st.text(),
                "n": st.none() | st.integers(-(2**63), 2**63 - 1),
                "x": st.none() | st.floats(allow_nan=False, allow_infinity=False),
                "yes": st.none() | st.booleans(),
                "messages": st.lists(st.fixed_dictionaries({"role": st.text(), "content": st.none() | st.text()})),
            }
        ),
        min_size=1,
    )
)
def test_parquet_and_jsonl_give_equal_rows(tmp_path: Path, rows: list[dict[str, object]]) -> None:
    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    names = ("text", "n", "x", "yes", "messages")
    types = (pa.string(), pa.int64(), pa.float64(), pa.bool_(), pa.list_(message))
    schema = pa.schema(list(map(pa.field, names, types)))
    parquet = TableSource((written(tmp_path / "a.parquet", pa.Table.from_pylist(rows, schema)),))
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(map(msgspec.json.encode, rows)))
    jsonl = JsonlSource((tmp_path / "a.jsonl",))
    assert rows_in(list(parquet.windows(START, 9, 9_999))) == rows_in(list(jsonl.windows(START, 9, 9_999))) == rows


def test_places_are_rows_of_the_file_from_0(tmp_path: Path) -> None:
    table = pa.table({"a": [1, 2, 3]})
    files = tuple(written(tmp_path / name, table) for name in ("a.parquet", "b.parquet"))
    records = list(TableSource(files).records())
    assert (records[2].place, records[4].place) == (f"{files[0]} row 2", f"{files[1]} row 1")
    assert (records[4].ordinal, records[4].columns) == (4, {"a": 2})


def test_a_header_only_file_has_no_records(tmp_path: Path) -> None:
    source = TableSource((written(tmp_path / "a.parquet", pa.table({"a": pa.array([], pa.string())})),))
    assert list(source.records()) == []
    assert list(source.windows(START, 10, 10)) == []


def test_nanoseconds_are_text_at_any_depth(tmp_path: Path) -> None:
    times = pa.array([1001, 1000], pa.timestamp("ns"))
    maps = pa.array([[("k", 1001)], [("k", 1000)]], pa.map_(pa.string(), times.type))
    table = pa.table(
        {
            "flat": times,
            "struct": pa.StructArray.from_arrays([times], ["t"]),
            "list": pa.ListArray.from_arrays([0, 1, 2], times),
            "map": maps,
        }
    )
    source = TableSource((written(tmp_path / "a.parquet", table, row_group_size=10),))
    fine, plain = "1970-01-01 00:00:00.000001001", dt.datetime(1970, 1, 1, microsecond=1)
    assert [record.columns for record in source.records()] == [
        {"flat": t, "struct": {"t": t}, "list": [t], "map": {"k": t}} for t in (fine, plain)
    ]
    assert [record.columns for record in source.records(Position(0, 1, 0, 1))] == [
        {"flat": plain, "struct": {"t": plain}, "list": [plain], "map": {"k": plain}}
    ]


def test_an_impossible_date_blames_its_row(tmp_path: Path) -> None:
    table = pa.table({"d": pa.array([0, 10**8], pa.date32())})
    fine, bad = TableSource((written(tmp_path / "a.parquet", table),)).records()
    assert fine.columns == {"d": dt.date(1970, 1, 1)}
    assert bad.problem is not None
    assert "column 'd' of type date32[day]: a value is out of the range of Python's type" in bad.problem


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "is empty (0 bytes)"), (b'{"a": 1}\n', "not a Parquet file"), (b"PAR1" + b"x" * 50, "damaged or truncated")],
)
def test_empty_footerless_misnamed_files_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    assert said in refused(tmp_path / "a.parquet")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    whole = written(tmp_path / "a.parquet", pa.table({"a": range(1_000)}))
    whole.write_bytes(whole.read_bytes()[:-100])
    assert f"{whole} can't be read" in refused(whole)


def test_a_non_utf8_column_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", pa.table({"headline": ["a", "b"]}))
    path.write_bytes(path.read_bytes().replace(b"headline", b"head\xf4ine"))
    assert "can't decode byte 0xf4" in refused(path)


def test_a_flipped_bit_names_file_and_rows(tmp_path: Path) -> None:
    table = pa.table({"a": range(100_000)})
    path = tmp_path / "a.parquet"
    pq.write_table(
        table, path, row_group_size=50_000, use_dictionary=False, compression="none", write_page_checksum=True
    )
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)
    said = refused(path)
    assert said.startswith(f"{path} rows ")
    first, last = (int(word) for word in said.split() if word.isdigit())
    assert 50_000 <= first < last == 99_999


def test_encrypted_parquet_files_are_refused(tmp_path: Path) -> None:
    class PlainKeys(pe.KmsClient):
        def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> str:
            return key_bytes.hex()

    factory, connection = pe.CryptoFactory(lambda _: PlainKeys()), pe.KmsConnectionConfig()
    for plaintext_footer in (False, True):
        config = pe.EncryptionConfiguration("f", column_keys={"c": ["a"]}, plaintext_footer=plaintext_footer)
        path = tmp_path / "a.parquet"
        properties = factory.file_encryption_properties(connection, config)
        with pq.ParquetWriter(path, pa.schema({"a": pa.int64()}), encryption_properties=properties) as writer:
            writer.write_table(pa.table({"a": [1]}))
        assert "encrypted" in refused(path)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    assert "two columns named 'a'" in refused(written(tmp_path / "a.parquet", table))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"a": ["x"], "b": [1]}, "has column 'a' as string, "),
    ],
)
def test_schema_differences_name_file_and_types(tmp_path: Path, other: dict[str, list[object]], said: str) -> None:
    first = written(tmp_path / "a.parquet", pa.table({"a": [1], "b": [1]}))
    second = written(tmp_path / "b.parquet", pa.table(other))
    assert refused(first, second).startswith(f"{second} {said}")


def test_metadata_differences_do_not_matter(tmp_path: Path) -> None:
    table = pa.table({"a": [1]})
    files = (
        written(tmp_path / "a.parquet", table),
        written(tmp_path / "b.parquet", table.replace_schema_metadata({"by": "another writer"})),
    )
    (window,) = TableSource(files).windows(START, 10, 1_000)
    assert window.table.equals(pa.table({"a": [1, 1]}), check_metadata=True)


def test_a_column_named_line_is_no_json_line(tmp_path: Path) -> None:
    table = pa.table({"line": pa.array([b"{"], pa.large_binary())})
    assert rows_in(list(TableSource((written(tmp_path / "a.parquet", table),)).windows(START, 1, 1))) == [
        {"line": b"{"}
    ]
