"""An answer is validated against the request: JSON, a schema, the functions offered. Nothing is fetched or mended."""

import dataclasses
import enum
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.errors import JobError
from batchrun.job.answer_schema import ANYTHING, MAX_MESSAGE_CHARS, Expected, check_of, of, problem, schema_of
from batchrun.tables.arrow_types import column_of
from tests import level

LABEL = {
    "type": "object",
    "properties": {"label": {"enum": ["bug", "feature"]}, "scores": {"type": "array", "items": {"type": "integer"}}},
    "required": ["label"],
    "additionalProperties": False,
}


def kind_of(expected: Expected, content: str) -> str | None:
    flaw = expected.content_flaw(content)
    return None if flaw is None else flaw.kind


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ('{"label": "bug"}', None),
        (' \n{"label": "bug", "scores": [1, 2.0]}\t', None),
        ('{"label": "bug", "scores": [123456789012345678901234567890]}', None),
        ('{"label": "Bug"}', "schema"),
        ('{"label": "bug", "more": 1}', "schema"),
        ("[]", "schema"),
        ("null", "schema"),
        ('```json\n{"label": "bug"}\n```', "invalid_json"),
        ('{"label": "bug"} as you requested', "invalid_json"),
        ('{"label": "bug"', "invalid_json"),
        ('{"label": "bug", "scores": [NaN]}', "invalid_json"),
        ('{"label": "\\ud800"}', "invalid_json"),
        ("[" * 100_000, "invalid_json"),
        ("", "invalid_json"),
        ("\ud800", "invalid_json"),
    ],
)
def test_content_is_validated_against_the_schema(content: str, kind: str | None) -> None:
    expected = of({"type": "json_schema", "json_schema": {"name": "label", "schema": LABEL}}, None)
    assert kind_of(expected, content) == kind
    assert kind_of(ANYTHING, content) is None


def test_json_object_accepts_any_json_object_shape() -> None:
    expected = of({"type": "json_object"}, None)
    assert [kind_of(expected, text) for text in ("{}", "[1]", "no")] == [None, None, "invalid_json"]
    assert kind_of(of({"type": "text"}, None), "no") is None


def test_a_flaw_names_its_place_and_is_bounded() -> None:
    expected = Expected(in_json=True, schema=LABEL)
    flaw = expected.content_flaw(json.dumps({"label": "bug", "scores": [1, "x" * 10_000]}))
    assert flaw is not None
    assert "at $.scores[1]: " in flaw.message
    assert len(flaw.message) <= MAX_MESSAGE_CHARS
    deep = {"additionalProperties": {"type": "integer"}}
    flaw = Expected(in_json=True, schema=deep).content_flaw(json.dumps({"k" * 10_000: "no integer"}))
    assert flaw is not None
    assert "no integer" in flaw.message


@pytest.mark.parametrize(
    ("name", "arguments", "kind"),
    [
        ("find", '{"id": 7}', None),
        ("find", '{"id": "7"}', "schema"),
        ("find", '{"id": 7', "invalid_json"),
        ("find", "", "invalid_json"),
        ("find", None, "invalid_json"),
        ("stop", "", None),
        ("stop", None, None),
        ("stop", "{}", None),
        ("stop", "{", "invalid_json"),
        ("other", "{}", "unknown_function"),
        (None, "{}", "unknown_function"),
    ],
)
def test_a_function_call_must_be_offered(name: str | None, arguments: str | None, kind: str | None) -> None:
    """Its arguments must fit."""
    find = {"name": "find", "parameters": {"type": "object", "properties": {"id": {"type": "integer"}}}}
    flaw = of(None, [find, {"name": "stop"}]).call_flaw(name, arguments)
    assert (None if flaw is None else flaw.kind) == kind


@pytest.mark.parametrize(
    ("arguments", "kind"), [('{"id": 7}', None), ("", None), (None, None), ('{"id": 7', "invalid_json")]
)
def test_calls_nobody_offered_need_json_arguments(arguments: str | None, kind: str | None) -> None:
    """A server may have tools of its own, so any name is valid; arguments that were cut are of no use to anyone."""
    for flaw in (ANYTHING.call_flaw("find", arguments), ANYTHING.tool_flaw(json.dumps([call("find", arguments)]))):
        assert (None if flaw is None else flaw.kind) == kind


def function(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def call(name: object, arguments: object = "{}", **more: Any) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}, **more}


FIND = function("find", parameters={"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]})
NOW = function("now", parameters={"type": "object", "properties": {}})
NOTE = {"type": "custom", "custom": {"name": "note"}}
SEARCH = {"type": "web_search", "max_uses": 2}


@pytest.mark.parametrize(
    ("calls", "kind"),
    [
        ([call("find", '{"id": 7}')], None),
        ([call("find", {"id": 7})], None),
        ([call("find", '{"id": 7}'), call("now", "")], None),
        ([call("find", '{"id": 7}'), call("now", None)], None),
        ([call("find", '{"id": "7"}')], "schema"),
        ([call("find", {"id": "7"})], "schema"),
        ([call("find", "{}")], "schema"),
        ([call("find", "")], "invalid_json"),
        ([call("find", '{"id": 7}{"id": 7}')], "invalid_json"),
        ([call("find", '{"id": 7}'), call("find", '{"id": 7')], "invalid_json"),
        ([call("now", "[]")], "schema"),
        ([call("other")], "unknown_function"),
        ([call(None)], "unknown_function"),
        ([call(["find"])], "unknown_function"),
        ([{}], "unknown_function"),
        ([7], "unknown_function"),
        ([{"id": "c", "type": "custom", "custom": {"name": "note", "input": "any {text"}}], None),
        ([{"id": "c", "type": "custom", "custom": {"name": "other", "input": ""}}], "unknown_function"),
        ([{"id": "c", "type": "custom", "custom": {"name": ["note"]}}], "unknown_function"),
    ],
)
def test_a_tool_call_must_be_offered(calls: list[Any], kind: str | None) -> None:
    """Its arguments must fit."""
    flaw = of(None, None, [FIND, NOW, NOTE]).tool_flaw(json.dumps(calls))
    assert (None if flaw is None else flaw.kind) == kind


@pytest.mark.parametrize("other", [SEARCH, {"function": 7}, {"type": "function", "function": {}}, 7, None])
def test_server_side_tools_may_have_any_name(other: object) -> None:
    """Other calls are still validated."""
    expected = of(None, None, [FIND, other])
    assert expected.tool_flaw(json.dumps([call("web_search"), {"type": "custom", "custom": {"name": "x"}}])) is None
    assert expected.tool_flaw(json.dumps([call("find")])) is not None


def test_functions_and_tools_are_matched_by_name() -> None:
    assert of(None, None, [FIND]).call_flaw("find", "{}") is not None
    assert of(None, None, [FIND]).call_flaw("find", '{"id": 1}') is None
    assert of(None, [FIND["function"]], None).tool_flaw(json.dumps([call("find")])) is not None


@pytest.mark.parametrize("parameters", [{"type": "strin"}, "no schema", [1], 7])
def test_an_invalid_parameter_schema_is_refused_early(parameters: object) -> None:
    with pytest.raises(JobError, match=r"^tools\[1\]\.function\.parameters: "):
        of(None, None, [NOW, function("bad", parameters=parameters)])


# ── schemas ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("schema", "reported"),
    [
        ({"type": "strin"}, "at $.type"),
        ({"properties": {"a": {"minimum": "low"}}}, "at $.properties.a.minimum"),
        ({"$ref": "#/$defs/none"}, "/$defs/none"),
        ({"pattern": "("}, "at $.pattern"),
        ({"$schema": "https://example.com/own"}, "https://example.com/own"),
        ({"required": "a"}, "at $.required"),
    ],
)
def test_an_invalid_schema_is_reported_with_place(schema: dict[str, Any], reported: str) -> None:
    said = problem(schema)
    assert said is not None
    assert said.startswith("invalid JSON schema: ")
    assert reported in said
    assert "\n" not in said
    with pytest.raises(JobError, match=r"^functions\[0\]\.parameters: invalid JSON schema"):
        of(None, [{"name": "f", "parameters": schema}])
    with pytest.raises(JobError, match=r"^response_format\.json_schema\.schema: invalid JSON schema"):
        of({"type": "json_schema", "json_schema": {"schema": schema}}, None)


class Counting(http.server.BaseHTTPRequestHandler):
    requested = 0

    def do_GET(self) -> None:
        type(self).requested += 1
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"type": "string"}')

    def log_message(self, format: str, *args: object) -> None: ...


@contextmanager
def counting_server() -> Iterator[str]:
    Counting.requested = 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Counting) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/schema.json"
        server.shutdown()


@pytest.mark.parametrize("form", ["ref", "base", "meta", "dynamic"])
def test_nothing_is_ever_fetched_for_a_schema(form: str) -> None:
    with counting_server() as url:
        schemas: dict[str, dict[str, Any]] = {
            "ref": {"properties": {"a": {"$ref": url}}},
            "base": {"$id": url, "properties": {"a": {"$ref": "other.json"}}},
            "meta": {"$schema": url},
            "dynamic": {"$dynamicRef": url},
        }
        assert problem(schemas[form]) is not None
        assert Counting.requested == 0


def test_no_file_is_ever_opened_for_a_schema(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"type": "string"}')
    assert problem({"$ref": (tmp_path / "other.json").as_uri()}) is not None


def test_a_format_is_not_judged() -> None:
    assert check_of({"type": "string", "format": "email"})("nobody") is None
    draft7 = {"$schema": "http://json-schema.org/draft-07/schema#", "type": "string", "format": "date"}
    assert check_of(draft7)("nobody") is None


def test_a_deeply_nested_value_is_checked() -> None:
    node = {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"c": {"$ref": "#/$defs/n"}}}}}
    expected = Expected(in_json=True, schema=node)
    for depth in (10, 500, 900):
        assert kind_of(expected, '{"c":' * depth + "{}" + "}" * depth) is None
        assert kind_of(expected, '{"c":' * depth + "1" + "}" * depth) == "schema"


SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.5, 2.0, "a", "b", ""])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
)
TYPES = st.sampled_from(["string", "integer", "number", "boolean", "null", "object", "array"])


def deeper(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    keywords = {
        "type": TYPES | st.lists(TYPES, min_size=1, max_size=3, unique=True),
        "enum": st.lists(VALUES, min_size=1, max_size=3, unique_by=repr),
        "const": SCALARS,
        "properties": st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        "required": st.lists(st.sampled_from("abc"), unique=True),
        "additionalProperties": inner,
        "items": inner,
        "minItems": st.integers(0, 2),
        "minimum": st.integers(-2, 2),
        "maxLength": st.integers(0, 2),
        "anyOf": st.lists(inner, min_size=1, max_size=3),
        "oneOf": st.lists(inner, min_size=1, max_size=3),
        "allOf": st.lists(inner, min_size=1, max_size=2),
        "not": inner,
    }
    return st.fixed_dictionaries({}, optional=keywords)


SCHEMAS = st.recursive(st.fixed_dictionaries({}, optional={"type": TYPES}) | st.booleans(), deeper, max_leaves=8)


@settings(max_examples=level.amount(20, 120), deadline=None)
@given(SCHEMAS.filter(lambda schema: isinstance(schema, dict)), st.lists(VALUES, min_size=1, max_size=5))
def test_it_judges_as_the_reference_validator_does(schema: dict[str, Any], values: list[Any]) -> None:
    reference = jsonschema.Draft202012Validator(schema)
    check = check_of(schema)
    for value in values:
        assert (check(value) is None) == reference.is_valid(value), (schema, value)


# ── schemas of types ──────────────────────────────────────────────────────────────────────────────────────────────────


class Kind(enum.Enum):
    BUG = "bug"
    FEATURE = "feature"


class Part(pydantic.BaseModel):
    name: str


class Model(pydantic.BaseModel):
    kind: Kind
    score: int | None = None
    parts: list[Part] = []


class Struct(msgspec.Struct):
    kind: Kind
    score: int | None = None


@dataclasses.dataclass
class Data:
    kind: Kind
    score: int | None = None


ENUM = "dictionary<values=string, indices=int32, ordered=0>"


@pytest.mark.parametrize(
    ("wanted", "type_"),
    [
        (Model, f"struct<kind: {ENUM}, score: int64, parts: list<element: struct<name: large_string>>>"),
        (Struct, f"struct<kind: {ENUM}, score: int64>"),
        (Data, f"struct<kind: {ENUM}, score: int64>"),
        (LABEL, f"struct<label: {ENUM}, scores: list<element: int64>>"),
        (list[int], "large_string"),
    ],
)
def test_a_type_is_as_good_as_its_schema(wanted: Any, type_: str) -> None:
    schema = schema_of(wanted)
    assert str(column_of(schema).type()) == type_
    assert "$ref" not in schema
    if wanted is not LABEL and type_.startswith("struct"):
        assert kind_of(Expected(in_json=True, schema=schema), '{"kind": "bug"}') is None
        assert kind_of(Expected(in_json=True, schema=schema), '{"kind": "other"}') == "schema"


@pytest.mark.parametrize("wanted", [{"type": "strin"}, object, 7, "label.schema.json"])
def test_what_has_no_schema_is_refused(wanted: Any) -> None:
    with pytest.raises(JobError, match=r"^response_format: "):
        schema_of(wanted)
