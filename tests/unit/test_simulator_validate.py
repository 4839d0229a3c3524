"""Every row of the request table in docs/api.md: what is accepted, and what is refused under which name."""

import base64
from typing import Any

import msgspec
import pytest

from batchrun.simulator.refusal import Refused
from batchrun.simulator.validate import parse_body, parse_question

FUNCTION = {"name": "label", "description": "Labels.", "parameters": {"type": "object", "properties": {}}}
SCHEMA = {"name": "label", "schema": {"type": "object"}, "strict": True}
TINY_IMAGES = {
    "png": b"\x89PNG\r\n\x1a\n....",
    "jpeg": b"\xff\xd8\xff....",
    "gif": b"GIF89a....",
    "webp": b"RIFF\x04\x00\x00\x00WEBP....",
}


def _body(**fields: Any) -> dict[str, Any]:
    return {"model": "vtrix-gpt-5.3-codex", "messages": [{"role": "user", "content": "Hello"}], **fields}


def _image(url: str, **fields: Any) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url, **fields}}
    return _body(messages=[{"role": "user", "content": [{"type": "text", "text": "What is it?"}, part]}])


def _data_url(kind: str, image: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _messages(*messages: Any) -> dict[str, Any]:
    return _body(messages=list(messages))


CALL = {"name": "label", "arguments": "{}"}
CALLS = {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": CALL}]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": '{"sun":true}'}

TEXT = {"type": "text", "text": "7"}
FUNCTION_RESULT = {"role": "function", "name": "label"}

ACCEPTED: list[dict[str, Any]] = [
    *(_messages({"role": role, "content": "x"}) for role in ("user", "assistant", "system", "developer")),
    _messages({"role": "user", "content": ""}),
    _messages({"role": "user", "content": "x"}, CALLS, RESULT),  # as the npm client `openai` sends it in `runTools`
    _messages({**CALLS, "content": "", "refusal": None, "annotations": [], "function_call": None}, RESULT),
    _messages({"role": "assistant", "tool_calls": CALLS["tool_calls"]}, {**RESULT, "content": [TEXT]}),
    _messages({"role": "assistant", "content": None, "function_call": CALL}, {**FUNCTION_RESULT, "content": "7"}),
    _messages({"role": "assistant", "content": None, "function_call": CALL}, {**FUNCTION_RESULT, "content": None}),
    _messages({"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]}),
    _messages({"role": "assistant", "content": None, "refusal": "No."}, {"role": "user", "content": "Why?"}),
    _messages({"role": "user", "content": [{"type": "text", "text": "x"}], "name": "ann"}),
    _image("https://example.com/cat.png", detail="low"),
    _image("http://example.com/cat.png"),
    *(_image(_data_url(kind, image)) for kind, image in TINY_IMAGES.items()),
    *(_body(reasoning_effort=effort) for effort in ("low", "medium", "high", "xhigh")),
    *(_body(max_tokens=count) for count in (1, 128_000)),
    *(_body(temperature=value) for value in (0, 0.0, 1, 2.0)),
    *(_body(top_p=value) for value in (0, 0.5, 1)),
    *(_body(stream=on) for on in (True, False)),
    _body(functions=[FUNCTION]),
    _body(functions=[{"name": "bare"}]),
    *(_body(functions=[FUNCTION], function_call=choice) for choice in ("none", "auto", {"name": "label"})),
    *(_body(response_format={"type": kind}) for kind in ("text", "json_object")),
    _body(response_format={"type": "json_schema", "json_schema": SCHEMA}),
    _body(max_completion_tokens=5, n=2, seed=-1, stop=["a"], logprobs=True, user="u", metadata={"a": "b"}),
    _body(stream=True, stream_options={"include_usage": True}),
    _body(tools=[{"type": "function", "function": FUNCTION}], tool_choice="auto", parallel_tool_calls=False),
]


@pytest.mark.parametrize("body", ACCEPTED, ids=lambda body: msgspec.json.encode(body).decode()[:120])
def test_what_the_reference_allows_is_accepted(body: dict[str, Any]) -> None:
    assert parse_question(parse_body(msgspec.json.encode(body))).request.model == body["model"]


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": [{"role": "user", "content": "x"}]}, "model", "missing_required_parameter"),
    ({"model": "vtrix-x"}, "messages", "missing_required_parameter"),
    (_body(model=""), "model", "invalid_value"),
    (_body(model=5), "model", "invalid_value"),
    (_body(model=None), "model", "invalid_value"),
    (_body(messages=[]), "messages", "invalid_value"),
    (_body(messages="Hello"), "messages", "invalid_value"),
    (_messages("Hello"), "messages[0]", "invalid_value"),
    (_messages({"content": "x"}), "messages[0].role", "missing_required_parameter"),
    (_messages({"role": "tool", "content": "x"}), "messages[0].tool_call_id", "missing_required_parameter"),
    (_messages(CALLS, {**RESULT, "tool_call_id": "c2"}), "messages[1].tool_call_id", "invalid_value"),
    (_messages(CALLS), "messages", "invalid_value"),
    (_messages(CALLS, {"role": "user", "content": "x"}), "messages[1]", "invalid_value"),
    (_messages({**CALLS, "role": "user"}), "messages[0]", "invalid_value"),
    (
        _messages({**CALLS, "tool_calls": [{"id": "c1"}]}),
        "messages[0].tool_calls[0].type",
        "missing_required_parameter",
    ),
    (_messages({"role": "assistant", "content": None}), "messages[0].content", "invalid_value"),
    (_messages({"role": "function", "content": "x"}), "messages[0].name", "missing_required_parameter"),
    (_messages({"role": "user"}), "messages[0].content", "missing_required_parameter"),
    (_messages({"role": "user", "content": None}), "messages[0].content", "invalid_value"),
    (_messages({"role": "user", "content": []}), "messages[0].content", "invalid_value"),
    (_messages({"role": "user", "content": "x", "mood": 1}), "messages[0].mood", "unknown_parameter"),
    (_messages({"role": "user", "content": ["x"]}), "messages[0].content[0]", "invalid_value"),
    (_messages({"role": "user", "content": [{"type": "audio"}]}), "messages[0].content[0].type", "invalid_value"),
    (
        _messages({"role": "user", "content": [{"type": "text"}]}),
        "messages[0].content[0].text",
        "missing_required_parameter",
    ),
    (_image("https://example.com/cat.png", detail="huge"), "messages[0].content[1].image_url.detail", "invalid_value"),
    (_body(reasoning_effort="extreme"), "reasoning_effort", "invalid_value"),
    (_body(reasoning_effort=1), "reasoning_effort", "invalid_value"),
    *((_body(max_tokens=value), "max_tokens", "invalid_value") for value in (0, 128_001, -1, 1.5, "5", True, None)),
    *((_body(temperature=value), "temperature", "invalid_value") for value in (-0.1, 2.1, "1", True, None)),
    *((_body(top_p=value), "top_p", "invalid_value") for value in (-0.1, 1.1, "1", False)),
    *((_body(stream=value), "stream", "invalid_value") for value in (1, "true", None)),
    (_body(functions={}), "functions", "invalid_value"),
    (_body(functions=[]), "functions", "invalid_value"),
    (_body(functions=[{}]), "functions[0].name", "missing_required_parameter"),
    (_body(functions=[{"name": "two words"}]), "functions[0].name", "invalid_value"),
    (_body(functions=[{"name": "f", "parameters": "x"}]), "functions[0].parameters", "invalid_value"),
    (
        _body(functions=[{"name": "f", "parameters": {"type": "thing"}}]),
        "functions[0].parameters.type",
        "invalid_schema",
    ),
    (_body(functions=[FUNCTION, FUNCTION]), "functions", "invalid_value"),
    (_body(functions=[FUNCTION], function_call="always"), "function_call", "invalid_value"),
    (_body(functions=[FUNCTION], function_call={}), "function_call.name", "missing_required_parameter"),
    (_body(functions=[FUNCTION], function_call={"name": "other"}), "function_call.name", "invalid_value"),
    (_body(function_call={"name": "label"}), "function_call.name", "invalid_value"),
    (_body(response_format="text"), "response_format", "invalid_value"),
    (_body(response_format={}), "response_format.type", "missing_required_parameter"),
    (_body(response_format={"type": "xml"}), "response_format.type", "invalid_value"),
    (
        _body(response_format={"type": "json_schema"}),
        "response_format.json_schema",
        "missing_required_parameter",
    ),
    (
        _body(response_format={"type": "json_schema", "json_schema": {"schema": {}}}),
        "response_format.json_schema.name",
        "missing_required_parameter",
    ),
    (
        _body(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}),
        "response_format.json_schema.schema.type",
        "invalid_schema",
    ),
    (_body(n=0), "n", "invalid_value"),
    (_body(stream_options={"usage": True}), "stream_options.usage", "unknown_parameter"),
    (_body(temprature=1), "temprature", "unknown_parameter"),
]


@pytest.mark.parametrize(
    ("body", "param", "code"), REFUSED, ids=lambda case: str(case)[-90:] if isinstance(case, dict) else case
)
def test_what_it_does_not_is_refused_by_name(body: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(Refused) as caught:
        parse_question(parse_body(msgspec.json.encode(body)))
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, code)
    assert param.split(".")[-1].partition("[")[0] in caught.value.message


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("ftp://example.com/cat.png", "neither"),
        ("cat.png", "neither"),
        ("https://", "neither"),
        ("data:image/tiff;base64,AAAA", "neither"),
        ("data:image/png,plain", "neither"),
        ("data:image/png;base64,%%%%", "not base64"),
        ("data:image/png;base64,é", "not base64"),
        ("data:image/png;base64,", "not a png"),
        (_data_url("jpeg", TINY_IMAGES["png"]), "not a jpeg"),
    ],
)
def test_an_invalid_image_is_refused(url: str, complaint: str) -> None:
    with pytest.raises(Refused, match=complaint) as caught:
        parse_question(_image(url))
    assert (caught.value.code, caught.value.param) == ("invalid_image", "messages[0].content[1].image_url.url")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"text"', b'{"model": NaN}', b'{"model": "\\ud800"}', b'{"model": "\xff"}', b'{"a":' * 100_000],
    ids=["empty", "cut", "array", "text", "NaN", "lone surrogate", "not UTF-8", "too deep"],
)
def test_a_body_without_object_is_refused(body: bytes) -> None:
    with pytest.raises(Refused) as caught:
        parse_body(body)
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


def test_delivery_does_not_change_the_question() -> None:
    plain = parse_question(_body(temperature=0)).digest
    assert parse_question(_body(temperature=0, stream=True, stream_options={"include_usage": True})).digest == plain
    assert parse_question(dict(reversed(_body(temperature=0).items()))).digest == plain
    assert parse_question(_body(temperature=1)).digest != plain


def test_the_smaller_output_limit_holds() -> None:
    assert parse_question(_body()).request.output_limit() == 128_000
    assert parse_question(_body(max_tokens=9, max_completion_tokens=5)).request.output_limit() == 5
