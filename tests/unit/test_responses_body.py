"""Bodies of chat completions as bodies of the Responses API."""

from typing import Any

import msgspec
import pytest

from batchrun.errors import InputError
from batchrun.job.fields import CHAT_ONLY
from batchrun.job.job import Job
from batchrun.job.settings import Endpoint, RequestTemplate
from batchrun.records import Correction, Row
from batchrun.request.builder import RequestBuilder, corrected
from batchrun.request.responses_body import responses_body

HI = [{"role": "user", "content": "Hi"}]
URL = "https://img.example/a.png"


def translated(**fields: Any) -> dict[str, Any]:
    body = responses_body({"model": "m", "messages": HI, **fields})
    assert (body.pop("model"), body.pop("store")) == ("m", False)
    return body


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_tokens": 5}, {"max_output_tokens": 5}),
        ({"max_completion_tokens": 5}, {"max_output_tokens": 5}),
        (
            {"temperature": 0.5, "top_p": 1, "metadata": {"a": "b"}},
            {"temperature": 0.5, "top_p": 1, "metadata": {"a": "b"}},
        ),
        ({"reasoning_effort": "low"}, {"reasoning": {"effort": "low"}}),
        ({"response_format": {"type": "json_object"}}, {"text": {"format": {"type": "json_object"}}}),
        (
            {
                "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strict": True}},
                "verbosity": "low",
            },
            {
                "text": {
                    "format": {"type": "json_schema", "name": "x", "schema": {}, "strict": True},
                    "verbosity": "low",
                }
            },
        ),
        (
            {"functions": [{"name": "f", "parameters": {}}], "function_call": {"name": "f"}},
            {
                "tools": [{"type": "function", "name": "f", "parameters": {}}],
                "tool_choice": {"type": "function", "name": "f"},
            },
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f"}}],
                "tool_choice": {"type": "function", "function": {"name": "f"}},
            },
            {"tools": [{"type": "function", "name": "f"}], "tool_choice": {"type": "function", "name": "f"}},
        ),
        (
            {"tools": [{"type": "web_search"}], "tool_choice": "auto"},
            {"tools": [{"type": "web_search"}], "tool_choice": "auto"},
        ),
    ],
)
def test_each_field_has_its_place(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert translated(**fields) == {"input": HI, **expected}


@pytest.mark.parametrize(
    ("message", "items"),
    [
        ({"role": "developer", "content": "Be brief"}, [{"role": "developer", "content": "Be brief"}]),
        (
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "See"},
                    {"type": "image_url", "image_url": {"url": URL, "detail": "low"}},
                ],
            },
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "See"},
                        {"type": "input_image", "image_url": URL, "detail": "low"},
                    ],
                }
            ],
        ),
        (
            {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]},
            [{"role": "assistant", "content": [{"type": "output_text", "text": "Yes"}]}],
        ),
        (
            {"role": "assistant", "content": None, "refusal": "No"},
            [{"role": "assistant", "content": [{"type": "refusal", "refusal": "No"}]}],
        ),
        (
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
            [{"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}],
        ),
        (
            {"role": "tool", "tool_call_id": "c1", "content": "7"},
            [{"type": "function_call_output", "call_id": "c1", "output": "7"}],
        ),
        (
            {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
            [{"type": "function_call", "call_id": "call_f", "name": "f", "arguments": "{}"}],
        ),
        (
            {"role": "function", "name": "f", "content": "7"},
            [{"type": "function_call_output", "call_id": "call_f", "output": "7"}],
        ),
    ],
)
def test_each_message_becomes_its_items(message: dict[str, Any], items: list[dict[str, Any]]) -> None:
    assert translated(messages=[message]) == {"input": items}


@pytest.mark.parametrize("name", sorted(CHAT_ONLY))
def test_a_field_it_lacks_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"^{name}: the Responses API has no such field"):
        translated(**{name: 1})


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(InputError, match=r"messages\[0\]\.content: the Responses API has no part of the type 'video'"):
        translated(messages=[{"role": "user", "content": [{"type": "video"}]}])


def builder(dialect: str, *, stream: bool = False) -> RequestBuilder:
    endpoint = Endpoint(url="https://api.example/v1", dialect=dialect)  # type: ignore[arg-type]
    request = RequestTemplate(model="m", system="Be brief", prompt="{{ text }}", max_tokens=5, stream=stream)
    return RequestBuilder(Job(endpoint=endpoint, request=request), "columns")


def test_the_key_is_the_same_in_both_dialects() -> None:
    """One question has one key, whichever way it is sent."""
    row = Row(0, {"text": "Hi"})
    chat, responses = (builder(dialect).build(row) for dialect in ("chat", "responses"))
    assert chat.key == responses.key
    assert chat.body != responses.body
    assert (chat.max_output_tokens, responses.max_output_tokens) == (5, 5)


def test_a_streamed_body_asks_for_no_stream_options() -> None:
    body = msgspec.json.decode(builder("responses", stream=True).build(Row(0, {"text": "Hi"})).body)
    assert (body["stream"], "stream_options" in body, body["max_output_tokens"]) == (True, False, 5)


def test_a_correction_is_added_to_the_input() -> None:
    request = corrected(builder("responses").build(Row(0, {"text": "Hi"})), [Correction("no", "not JSON")])
    roles = [item["role"] for item in msgspec.json.decode(request.body)["input"]]
    assert roles == ["system", "user", "assistant", "user"]
