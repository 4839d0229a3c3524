"""The simulator's structured answers satisfy their schemas, by the judgement of the jsonschema library."""

import json
from random import Random
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.simulator.instances import instance
from batchrun.simulator.refusal import Refused
from batchrun.simulator.schemas import compiled

TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 1},
                "parent": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["name", "parent", "children"],
            "additionalProperties": False,
        }
    },
}

SCHEMAS: dict[str, dict[str, Any]] = {
    "anything": {},
    "label": {
        "type": "object",
        "properties": {"label": {"enum": ["good", "bad"]}, "why": {"type": "string", "maxLength": 20}},
        "required": ["label", "why"],
        "additionalProperties": False,
    },
    "const": {"const": {"a": [1, None, True]}},
    "enum narrowed by its type": {"type": "string", "enum": [1, "one", None]},
    "nullable": {"type": ["string", "null"], "minLength": 3},
    "integer bounds": {"type": "integer", "minimum": 3, "maximum": 4},
    "integer between fractions": {"type": "integer", "exclusiveMinimum": 0.5, "exclusiveMaximum": 1.5},
    "number below": {"type": "number", "maximum": -7.5},
    "narrow number": {"type": "number", "minimum": 0.0011, "maximum": 0.0012},
    "open interval": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 10},
    # Libraries differ on whether 0.07 is a multiple of 0.01.
    "decimal multiple": {"type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 1},
    "64-bit bounds": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
    "string lengths": {"type": "string", "minLength": 200, "maxLength": 201},
    "empty string": {"type": "string", "maxLength": 0},
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2},
    "set": {"type": "array", "items": {"enum": [1, 2, 3]}, "minItems": 3, "uniqueItems": True},
    "tuple": {"type": "array", "prefixItems": [{"type": "null"}, {"type": "integer"}], "items": False, "minItems": 2},
    "anyOf beside properties": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
    },
    "oneOf that overlap": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "oneOf by tag": {
        "oneOf": [
            {"type": "object", "properties": {"kind": {"const": "a"}}, "required": ["kind"]},
            {"type": "object", "properties": {"kind": {"const": "b"}}, "required": ["kind"]},
        ]
    },
    "allOf": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]},
            {"properties": {"a": {"minimum": 5, "type": "integer"}, "b": {"type": "string"}}, "required": ["b"]},
        ]
    },
    "reference with neighbours": {"$ref": "#/$defs/n", "maximum": 3, "$defs": {"n": {"type": "integer", "minimum": 3}}},
    "escaped pointer": {"$ref": "#/definitions/a~1b%20c", "definitions": {"a/b c": {"type": "null"}}},
    "map": {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 2},
    "required but not described": {"type": "object", "required": ["x"], "additionalProperties": {"type": "null"}},
    "few properties": {
        "type": "object",
        "properties": {name: {"type": "integer"} for name in "abcd"},
        "required": ["c"],
        "maxProperties": 2,
    },
    "impossible optional": {"type": "object", "properties": {"a": False, "b": {"type": "null"}}},
    "tree": TREE,
}

FORMATS = ("date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uri", "uuid")


@pytest.mark.sampled(10)
@pytest.mark.parametrize("name", SCHEMAS)
def test_an_instance_satisfies_its_schema(name: str) -> None:
    schema = SCHEMAS[name]
    compiled(schema, "schema")
    for seed in range(40):
        value = instance(schema, Random(seed), "schema")
        jsonschema.validate(json.loads(json.dumps(value)), schema, cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize("name", FORMATS)
def test_the_format_of_strings_is_respected(name: str) -> None:
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    schema = {"type": "string", "format": name}
    for seed in range(20):
        jsonschema.validate(instance(schema, Random(seed), "schema"), schema, format_checker=checker)


def _objects(children: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from(["a", "b", "c"])
    return st.fixed_dictionaries(
        {"type": st.just("object"), "properties": st.dictionaries(names, children, max_size=3)},
        optional={
            "required": st.lists(names, unique=True),
            "additionalProperties": st.one_of(st.booleans(), children),
            "minProperties": st.integers(0, 4),
            "maxProperties": st.integers(0, 4),
        },
    )


def _arrays(children: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {"type": st.just("array"), "items": children},
        optional={
            "prefixItems": st.lists(children, min_size=1, max_size=2),
            "minItems": st.integers(0, 3),
            "maxItems": st.integers(0, 3),
            "uniqueItems": st.booleans(),
        },
    )


def _groups(children: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    several = st.lists(children, min_size=1, max_size=3)
    return st.one_of(*(st.fixed_dictionaries({word: several}) for word in ("anyOf", "oneOf", "allOf")))


_BOUND = st.one_of(st.integers(-50, 50), st.floats(-50, 50).map(lambda bound: round(bound, 3)))
_LEAVES = st.one_of(
    st.sampled_from([{"type": "null"}, {"type": "boolean"}, {"type": ["integer", "null"]}, {}]),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["integer", "number"])},
        optional={
            "minimum": _BOUND,
            "maximum": _BOUND,
            "exclusiveMinimum": _BOUND,
            "exclusiveMaximum": _BOUND,
            "multipleOf": st.sampled_from([1, 2, 0.5, 0.25, 3]),
        },
    ),
    st.fixed_dictionaries(
        {"type": st.just("string")},
        optional={"minLength": st.integers(0, 30), "maxLength": st.integers(0, 30)},
    ),
    st.lists(st.sampled_from([1, 1.5, True, None, "x", [], {"a": 0}]), min_size=1).map(lambda of: {"enum": of}),
)
_SCHEMAS = st.recursive(
    _LEAVES, lambda children: st.one_of(_objects(children), _arrays(children), _groups(children)), max_leaves=8
)


@pytest.mark.heavy
@settings(max_examples=300, deadline=None)
@given(schema=_SCHEMAS, seed=st.integers(0, 2**32))
def test_any_schema_is_satisfied_or_refused_by_name(schema: dict[str, Any], seed: int) -> None:
    compiled(schema, "schema")
    made = _instance_or_refusal(schema, seed)
    if isinstance(made, Refused):
        assert (made.status, made.code, made.param) == (400, "unsupported_schema", "schema")
    else:
        jsonschema.validate(made, schema, cls=jsonschema.Draft202012Validator)


def _instance_or_refusal(schema: dict[str, Any], seed: int) -> Any:
    try:
        return instance(schema, Random(seed), "schema")
    except Refused as refused:
        return refused


@pytest.mark.parametrize(
    ("schema", "param"),
    [
        ({"type": "text"}, "schema.type"),
        ({"type": []}, "schema.type"),
        ({"properties": []}, "schema.properties"),
        ({"properties": {"a": 1}}, "schema.properties.a"),
        ({"items": "string"}, "schema.items"),
        ({"anyOf": []}, "schema.anyOf"),
        ({"anyOf": [{}, {"enum": 1}]}, "schema.anyOf[1].enum"),
        ({"required": "a"}, "schema.required"),
        ({"minLength": -1}, "schema.minLength"),
        ({"maxItems": True}, "schema.maxItems"),
        ({"minimum": "0"}, "schema.minimum"),
        ({"multipleOf": 0}, "schema.multipleOf"),
        ({"$ref": "#/$defs/gone"}, "schema"),
        ({"$ref": "https://example.com/schema"}, "schema"),
        ({"$defs": {"a": {"type": 1}}}, "schema.$defs.a.type"),
    ],
)
def test_an_invalid_schema_names_its_place(schema: dict[str, Any], param: str) -> None:
    with pytest.raises(Refused) as caught:
        compiled(schema, "schema")
    assert (caught.value.status, caught.value.code, caught.value.param) == (400, "invalid_schema", param)


@pytest.mark.parametrize("keyword", ["pattern", "contains", "if", "dependentRequired"])
def test_an_unsupported_keyword_is_refused(keyword: str) -> None:
    operand = {"pattern": "", "contains": {}, "if": {}, "dependentRequired": {}}[keyword]
    schema = {"type": "object", "properties": {"a": {keyword: operand}}, "required": ["a"]}
    for seed in range(20):
        with pytest.raises(Refused, match=keyword) as caught:
            instance(schema, Random(seed), "schema")
        assert (caught.value.status, caught.value.code) == (400, "unsupported_schema")


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": 2, "maximum": 1},
        {"type": "array", "items": {"enum": [1]}, "minItems": 2, "uniqueItems": True},
        {"$ref": "#"},
        {"type": "object", "properties": {"self": {"$ref": "#"}}, "required": ["self"]},
        {"type": "array", "items": {"$ref": "#"}, "minItems": 3},
        {"type": "string", "minLength": 10**9},
        {"allOf": [{"type": "string"}, {"type": "null"}]},
        {"enum": []},
    ],
)
def test_what_no_value_satisfies_is_refused_in_time(schema: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="found no value"):
        instance(schema, Random(0), "schema")


def test_the_same_generator_makes_the_same_value() -> None:
    assert instance(TREE, Random(5), "schema") == instance(TREE, Random(5), "schema")
