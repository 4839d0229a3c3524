"""A schema's type holds what its answers say, in Parquet too; what does not fit is reported, never dropped."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.tables.arrow_types import JSON, MAX_PLACES, array_of, column_of
from tests import level

STRING, ENUM = "large_string", "dictionary<values=string, indices=int32, ordered=0>"


def closed(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def type_of(schema: Any, **definitions: Any) -> str:
    """The type of one field that has this schema."""
    column = column_of({**closed(x=schema), "$defs": definitions})
    return str(column.type().field(0).type)


def parsed(schema: dict[str, Any], *values: Any) -> tuple[list[Any], dict[int, str]]:
    array, problems = array_of(column_of(schema), [None if v is ... else json.dumps(v) for v in values])
    array.validate(full=True)
    return array.to_pylist(), problems


A, B = closed(a={"type": "string"}), closed(b={"type": "string"})


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string"}, STRING),
        ({"type": "string", "format": "date", "minLength": 3}, STRING),
        ({"type": "integer"}, "int64"),
        ({"type": "number"}, "double"),
        ({"type": "boolean"}, "bool"),
        ({"type": ["integer", "null"]}, "int64"),
        ({"type": ["integer", "number"]}, "double"),
        ({"enum": ["b", "a"]}, ENUM),
        ({"type": "string", "enum": ["b", "a", None]}, ENUM),
        ({"enum": [1, 2]}, "int64"),
        ({"enum": [1, 2.5]}, "double"),
        ({"enum": [True]}, "bool"),
        ({"const": "a"}, ENUM),
        ({"const": 3}, "int64"),
        ({"type": "array", "items": {"type": "integer"}}, "list<element: int64>"),
        ({"type": "array", "items": {"enum": ["a"]}}, f"list<element: {ENUM}>"),
        ({"type": "array"}, f"list<element: {STRING}>"),
        (A, f"struct<a: {STRING}>"),
        ({"type": ["object", "null"], "properties": {"a": {"type": "integer"}}}, "struct<a: int64>"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "int64"),
        ({"oneOf": [{"type": "null"}, A]}, f"struct<a: {STRING}>"),
        ({"anyOf": [{"enum": ["a"]}, {"const": "b"}]}, ENUM),
        ({"anyOf": [{"enum": ["a"]}, {"type": "string"}]}, STRING),
        ({"$ref": "#/$defs/d"}, f"struct<a: {STRING}>"),
        ({"anyOf": [{"$ref": "#/$defs/d"}, {"type": "null"}]}, f"struct<a: {STRING}>"),
        ({"allOf": [{"$ref": "#/$defs/d"}], "description": "as older generators write it"}, f"struct<a: {STRING}>"),
    ],
)
def test_what_has_one_type_gets_it(schema: dict[str, Any], expected: str) -> None:
    assert type_of(schema, d=A) == expected


NODE = closed(value={"type": "string"}, next={"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]})


@pytest.mark.parametrize(
    "schema",
    [
        {},
        True,
        {"type": ["string", "integer"]},
        {"type": "null"},
        {"enum": ["a", 1]},
        {"const": None},
        {"const": {"a": 1}},
        {"anyOf": [A, B]},
        {"oneOf": [{"type": "string"}, {"type": "integer"}]},
        {"type": "object"},
        {"type": "object", "properties": {}},
        {"type": "object", "additionalProperties": {"type": "integer"}},
        {**A, "additionalProperties": True},
        {**A, "patternProperties": {"^x": {}}},
        {"properties": {"a": {"type": "string"}}},
        {"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}]},
        {"allOf": [A, B]},
        {"not": {"type": "string"}},
        {"$dynamicRef": "#d"},
        {"$ref": "#named"},
        {"$ref": "#/$defs/none"},
    ],
)
def test_mixed_types_are_json_text(schema: Any) -> None:
    whole = closed(x=schema, y={"type": "integer"})
    assert str(column_of(whole).type()) == f"struct<x: {STRING}, y: int64>"
    for value in ({"deep": [1, None]}, "text", 7, [1], True):
        (row,), problems = parsed(whole, {"x": value, "y": 1})
        assert (json.loads(row["x"]), problems) == (value, {})
    assert parsed(whole, {"x": None, "y": 1}) == ([{"x": None, "y": 1}], {})


def test_a_schema_within_itself_ends_in_json_text() -> None:
    schema = {"$ref": "#/$defs/node", "$defs": {"node": NODE}}
    assert str(column_of(schema).type()) == f"struct<value: {STRING}, next: {STRING}>"
    value = {"value": "a", "next": {"value": "b", "next": None}}
    (row,), problems = parsed(schema, value)
    assert ({**row, "next": json.loads(row["next"])}, problems) == (value, {})


@pytest.mark.parametrize(
    "schema",
    [
        None,
        {"type": "array", "items": A},
        {"type": "string"},
        {"type": "object"},
        {"anyOf": [A, B]},
        {**A, "properties": {"a": {"$id": "https://example.com/a", "$ref": "#/$defs/d"}}},
        closed(**{f"f{number}": {"type": "string"} for number in range(MAX_PLACES + 1)}),
        {
            **closed(x={"$ref": "#/$defs/d0"}),
            "$defs": {f"d{n}": closed(**{name: {"$ref": f"#/$defs/d{n + 1}"} for name in "abcd"}) for n in range(40)},
        },
    ],
    ids=["none", "list", "string", "open", "union", "another base", "too many", "ever more"],
)
def test_a_schema_without_properties_is_text(schema: dict[str, Any] | None) -> None:
    assert column_of(schema) == JSON


def test_enum_values_keep_the_schemas_order() -> None:
    schema = closed(x={"enum": ["late", "early", "never"]})
    for values in ([{"x": "never"}], [{"x": "early"}, {"x": "late"}], []):
        array, _ = array_of(column_of(schema), [json.dumps(value) for value in values])
        assert isinstance(array, pa.StructArray)
        enum = array.field(0)
        assert isinstance(enum, pa.DictionaryArray)
        assert enum.dictionary.to_pylist() == ["late", "early", "never"]


def test_absent_and_null_are_null_at_every_level() -> None:
    schema = closed(
        a=closed(b={"type": ["string", "null"]}), c={"type": "array", "items": {"type": ["integer", "null"]}}
    )
    rows, problems = parsed(schema, {}, {"a": {}}, {"a": {"b": None}, "c": [1, None]}, ..., {"c": []})
    assert problems == {}
    assert rows == [
        {"a": None, "c": None},
        {"a": {"b": None}, "c": None},
        {"a": {"b": None}, "c": [1, None]},
        None,
        {"a": None, "c": []},
    ]


@pytest.mark.parametrize(
    ("value", "held", "reported"),
    [
        ({"i": 2**63}, {"i": None}, "$.i can't hold 9223372036854775808"),
        ({"i": 1e30}, {"i": None}, "$.i can't hold 1e30"),
        ({"n": 10**400}, {"n": None}, "$.n can't hold 1000"),
        ({"l": [1, 2**70, 3]}, {"l": [1, None, 3]}, "$.l[] can't hold"),
        ({"more": 1, "i": 1}, {"i": 1}, "$.more is not in the schema"),
        # an answer to another schema
        ({"i": "7", "n": True, "s": 1, "b": 1, "e": "z", "l": "no", "o": []}, {}, "can't hold"),
        ([1], None, "$ can't hold [1]"),
    ],
)
def test_what_does_not_fit_is_reported(value: Any, held: Any, reported: str) -> None:
    schema = {
        "type": "object",
        "properties": {
            "i": {"type": "integer"},
            "n": {"type": "number"},
            "s": {"type": "string"},
            "b": {"type": "boolean"},
            "e": {"enum": ["a"]},
            "l": {"type": "array", "items": {"type": "integer"}},
            "o": closed(p={"type": "string"}),
        },
    }
    rows, problems = parsed(schema, {"i": 1}, value)
    assert list(problems) == [1]
    assert reported in problems[1]
    assert len(problems[1]) <= 300
    assert rows[1] == (None if held is None else dict.fromkeys("insbelo") | held)


def test_every_spelling_of_integers_is_read() -> None:
    assert parsed(closed(i={"type": "integer"}), {"i": 7.0}, {"i": -(2**63)}) == ([{"i": 7}, {"i": -(2**63)}], {})
    assert parsed(closed(n={"type": "number"}), {"n": 7}) == ([{"n": 7.0}], {})


# ── any schema, any answer ────────────────────────────────────────────────────────────────────────────────────────────

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
FIELD_NAMES = st.text("abc.~/ é0", min_size=1, max_size=3)
Pair = tuple[dict[str, Any], st.SearchStrategy[Any]]


def plain(schema: dict[str, Any], values: st.SearchStrategy[Any]) -> st.SearchStrategy[Pair]:
    return st.just((schema, values))


LEAVES: st.SearchStrategy[Pair] = st.one_of(
    plain({"type": "string"}, TEXTS),
    plain({"type": "integer"}, st.integers(-(2**63), 2**63 - 1)),
    plain({"type": "number"}, st.floats(allow_nan=False, allow_infinity=False)),
    plain({"type": "boolean"}, st.booleans()),
    st.lists(TEXTS, min_size=1, max_size=4, unique=True).map(lambda e: ({"enum": e}, st.sampled_from(e))),
)


def nullable(pair: Pair) -> Pair:
    return {"anyOf": [pair[0], {"type": "null"}]}, st.none() | pair[1]


def listed(pair: Pair) -> Pair:
    return {"type": "array", "items": pair[0]}, st.lists(pair[1], max_size=3)


def grouped(fields: dict[str, Pair]) -> Pair:
    values = {name: values for name, (_, values) in fields.items()}
    return closed(**{name: schema for name, (schema, _) in fields.items()}), st.fixed_dictionaries({}, optional=values)


OBJECTS = st.recursive(
    LEAVES,
    lambda inner: (
        inner.map(nullable)
        | inner.map(listed)
        | st.dictionaries(FIELD_NAMES, inner, min_size=1, max_size=4).map(grouped)
    ),
    max_leaves=8,
)
WHOLE = st.dictionaries(FIELD_NAMES, OBJECTS, min_size=1, max_size=4).map(grouped)


def as_column(value: Any, schema: dict[str, Any]) -> Any:
    """The value as a column of that schema shows it: every field there, the absent ones null."""
    while "anyOf" in schema:
        schema = schema["anyOf"][0]
    if value is None:
        return None
    if schema.get("type") == "object":
        return {name: as_column(value.get(name), field) for name, field in schema["properties"].items()}
    if schema.get("type") == "array":
        return [as_column(item, schema["items"]) for item in value]
    return value


@settings(max_examples=level.amount(10, 60), deadline=None)
@given(st.data())
def test_any_answer_round_trips_through_parquet(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    schema, strategy = data.draw(WHOLE)
    values = data.draw(st.lists(strategy, max_size=6))
    jsonschema.Draft202012Validator.check_schema(schema)
    column = column_of(schema)
    assert column.kind == "struct"
    array, problems = array_of(column, [json.dumps(value) for value in values])
    array.validate(full=True)
    assert problems == {}
    path: Path = tmp_path_factory.getbasetemp() / "any.parquet"
    pq.write_table(pa.table({"parsed": array}), path)
    read = pq.read_table(path)
    assert read.schema.field("parsed").type == column.type()
    assert read.column("parsed").to_pylist() == [as_column(value, schema) for value in values]
