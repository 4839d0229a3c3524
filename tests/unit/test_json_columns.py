import json
from itertools import permutations
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.errors import InputError
from batchrun.tables.json_columns import MAX_COLUMNS, MAX_DEPTH, MAX_KEYS, ColumnTypes, Seen, lines_to_table

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**53, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), -(2**64)])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=10,
)
ROWS = st.lists(st.dictionaries(st.sampled_from("abcd"), VALUES, max_size=4), max_size=8)


def types_of(*lines: bytes | str) -> ColumnTypes:
    types = ColumnTypes()
    for line in lines:
        types.observe(msgspec.json.decode(line))
    return types


def json_text(types: ColumnTypes) -> tuple[str, ...]:
    """The columns that hold JSON text."""
    columns = msgspec.json.decode(types.to_json(), type=dict[str, Seen])
    return tuple(name for name, seen in columns.items() if seen.arrow_type() is None)


def table_of(*lines: bytes | str) -> pa.Table:
    encoded = [line.encode() if isinstance(line, str) else line for line in lines]
    return lines_to_table(encoded, types_of(*lines))


def shape(type_: pa.DataType) -> object:
    """The type without the order of struct fields."""
    if isinstance(type_, pa.StructType):
        return frozenset((field.name, shape(field.type)) for field in type_)
    return ("list", shape(type_.value_type)) if isinstance(type_, pa.ListType) else type_


def shapes(types: ColumnTypes) -> object:
    return {field.name: shape(field.type) for field in types.schema()}


def same(source: object, stored: object, type_: pa.DataType) -> bool:
    """Whether a column's value says all that the source did; in structs and on top absent is null."""
    if isinstance(type_, pa.StructType) and isinstance(source, dict) and isinstance(stored, dict):
        return source.keys() <= stored.keys() and all(
            same(source.get(field.name), stored[field.name], field.type) for field in type_
        )
    if isinstance(type_, pa.ListType) and isinstance(source, list) and isinstance(stored, list):
        return len(source) == len(stored) and all(map(same, source, stored, [type_.value_type] * len(source)))
    if pa.types.is_string(type_) and isinstance(stored, str) and stored != source:
        return bool(json.loads(stored) == source)
    return stored == source and (source is None) == (stored is None)


@given(ROWS)
def test_no_value_of_any_row_is_lost(rows: list[dict[str, Any]]) -> None:
    table = table_of(*map(json.dumps, rows))
    assert table.num_rows == len(rows)
    for row, stored in zip(rows, table.to_pylist(), strict=False):
        assert row.keys() <= stored.keys()
        assert all(same(row.get(name), stored[name], table.schema.field(name).type) for name in stored)


@given(ROWS, st.randoms(use_true_random=False))
def test_types_do_not_depend_on_row_order(rows: list[dict[str, Any]], random: Any) -> None:
    lines = [json.dumps(row) for row in rows]
    before = shapes(types_of(*lines))
    random.shuffle(lines)
    assert shapes(types_of(*lines)) == before


@given(ROWS, ROWS)
def test_stored_column_types_continue_learning(first: list[dict[str, Any]], later: list[dict[str, Any]]) -> None:
    kept = types_of(*map(json.dumps, first))
    read = ColumnTypes.from_json(kept.to_json())
    for row in later:
        kept.observe(row)
        read.observe(row)
    assert read.to_json() == kept.to_json()
    assert read.schema().equals(kept.schema())


@given(ROWS)
def test_the_table_is_valid_parquet(rows: list[dict[str, Any]]) -> None:
    table = table_of(*map(json.dumps, rows)).append_column("row", pa.array(range(len(rows)), pa.int64()))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    assert pq.read_table(pa.BufferReader(sink.getvalue())).equals(table)


@pytest.mark.parametrize(
    ("values", "type_"),
    [
        (["null"], pa.string()),
        (["null", "1"], pa.int64()),
        (["true", "null"], pa.bool_()),
        (["1", "2.5"], pa.float64()),
        (["9007199254740992", "0.5"], pa.float64()),
        (["9223372036854775807", "-9223372036854775808", "1"], pa.int64()),
        (['"2026-11-22T06:00:00Z"'], pa.string()),
        (["[]"], pa.list_(pa.string())),
        (["[]", "[1]", "[null]", "null"], pa.list_(pa.int64())),
        (["[[1]]", "[[0.5], []]"], pa.list_(pa.list_(pa.float64()))),
        (['{"x": 1}', '{"y": "a"}', "{}"], pa.struct([("x", pa.int64()), ("y", pa.string())])),
        (['{"x": {"y": null}}'], pa.struct([("x", pa.struct([("y", pa.string())]))])),
    ],
)
def test_observed_types_merge_in_any_order(values: list[str], type_: pa.DataType) -> None:
    for order in permutations(values):
        types = types_of(*(f'{{"a": {value}}}' for value in order))
        assert shape(types.schema().field("a").type) == shape(type_)
        assert json_text(types) == ()


@pytest.mark.parametrize(
    "values",
    [
        ["true", "1"],
        ["1", '"1"'],
        ["9007199254740993", "0.5"],
        ["9223372036854775808", "1"],
        ["[1]", "1"],
        ['{"x": 1}', '"x"', "null"],
        ["{}", "null"],
        ['{"x": 1}', "[]"],
        ["[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "[]"],
        [json.dumps({f"k{n}": n for n in range(60)}), json.dumps({f"l{n}": n for n in range(MAX_KEYS - 59)}), "{}"],
    ],
)
def test_unmergeable_types_become_json_text(values: list[str]) -> None:
    for order in permutations(values):
        lines = [f'{{"a": {value}}}' for value in order]
        assert json_text(types_of(*lines)) == ("a",)
        assert table_of(*lines)["a"].to_pylist() == [None if value == "null" else value for value in order]


def test_keys_and_levels_within_limits_stay_typed() -> None:
    wide = {f"k{n}": n for n in range(MAX_KEYS)}
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert json_text(types_of(json.dumps({"wide": wide}), f'{{"deep": {deep}}}')) == ()


def test_json_text_is_the_exact_source() -> None:
    table = table_of(
        b'{"a": {"mix": 1.50, "n": 1}, "b": [ {"m": {"x" :  1e2}} ], "c": "\\u00e9"}',
        b'{"a": {"mix": "\\u00e9"}, "b": [{"m": 12345678901234567890123}, null], "c": 1}',
        b'{"a": null, "b": null}',
    )
    assert table.to_pylist() == [
        {"a": {"mix": "1.50", "n": 1}, "b": [{"m": '{"x" :  1e2}'}], "c": '"\\u00e9"'},
        {"a": {"mix": '"\\u00e9"', "n": None}, "b": [{"m": "12345678901234567890123"}, None], "c": "1"},
        {"a": None, "b": None, "c": None},
    ]


def test_the_last_of_repeated_keys_counts() -> None:
    assert table_of(b'{"a": {"x": 1}, "a": 5}', b'{"a": {"y": "z"}, "a": 6}').to_pydict() == {"a": [5, 6]}
    text = table_of(b'{"m": 1, "a": [], "a": 5}', b'{"m": "x", "a": 6}')
    assert text.to_pydict() == {"m": ["1", '"x"'], "a": [5, 6]}


def test_columns_keep_their_order_of_first_appearance() -> None:
    assert table_of('{"z": 1, "b": 1}', '{"a": 1, "b": 1}').column_names == ["z", "b", "a"]


def test_data_used_as_keys_is_refused() -> None:
    types = ColumnTypes()
    with pytest.raises(InputError, match="more than 5,000 different keys"):
        types.observe({f"k{n}": 1 for n in range(MAX_COLUMNS + 1)})


@pytest.mark.parametrize("line", [b'{"b": 1}', b'{"a": "x"}', b'{"a": 9223372036854775808}', b"[]"])
@pytest.mark.parametrize("text", [b"", b', "t": 1'])
def test_an_unobserved_key_is_refused(line: bytes, text: bytes) -> None:
    types = types_of(b'{"a": 1, "m": {"x": 1}' + text + b"}", b'{"a": 2' + text.replace(b"1", b'"1"') + b"}")
    with pytest.raises(InputError, match="was the input changed"):
        lines_to_table([line], types)
