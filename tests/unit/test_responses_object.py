"""Answers of the Responses API, whole and streamed, read as chat completions are."""

from typing import Any

import msgspec
import pytest

from batchrun.records import Answer, Usage
from batchrun.response import answer as answers
from batchrun.response.answer import has_token, is_done
from tests.money import pico

MESSAGE = {
    "type": "message",
    "role": "assistant",
    "content": [{"type": "output_text", "text": "Good", "annotations": []}],
}
CALL = {"type": "function_call", "call_id": "c1", "name": "rate", "arguments": '{"score":3}'}
USAGE = {
    "input_tokens": 12,
    "input_tokens_details": {"cached_tokens": 4},
    "output_tokens": 5,
    "output_tokens_details": {"reasoning_tokens": 2},
    "total_tokens": 17,
}


def response(*output: dict[str, Any], **fields: Any) -> dict[str, Any]:
    about = {"id": "resp_1", "object": "response", "created_at": 1_700_000_000, "status": "completed", "model": "m"}
    return {**about, "error": None, "output": list(output), "usage": USAGE, **fields}


def read(body: object) -> Answer:
    return answers.parse(msgspec.json.encode(body))


def stream(*events: dict[str, Any]) -> bytes:
    return b"".join(b"event: %b\ndata: %b\n\n" % (e["type"].encode(), msgspec.json.encode(e)) for e in events)


def delta(text: str) -> dict[str, Any]:
    return {"type": "response.output_text.delta", "output_index": 1, "content_index": 0, "delta": text}


CREATED = {"type": "response.created", "response": response(status="in_progress", usage=None)}
COMPLETED = {"type": "response.completed", "response": response({"type": "reasoning", "summary": []}, MESSAGE)}


def test_a_message_with_its_usage_is_read_whole() -> None:
    read_ = read(response({"type": "reasoning", "summary": []}, MESSAGE, service_tier="flex"))
    assert (read_.completion, read_.content, read_.finish_reason) == (True, "Good", "stop")
    assert (read_.completion_id, read_.created, read_.model) == ("resp_1", 1_700_000_000, "m")
    assert read_.usage == Usage(12, 5, 17, 4, 2)
    assert read_.service_tier == "flex"


def test_a_call_is_read_as_a_tools_call() -> None:
    read_ = read(response(CALL))
    assert (read_.content, read_.finish_reason) == (None, "tool_calls")
    assert msgspec.json.decode(read_.tool_calls or "") == [
        {"id": "c1", "type": "function", "function": {"name": "rate", "arguments": '{"score":3}'}}
    ]


@pytest.mark.parametrize(
    ("reason", "finish_reason"),
    [("max_output_tokens", "length"), ("content_filter", "content_filter"), ("other", "other")],
)
def test_an_incomplete_one_says_why(reason: str, finish_reason: str) -> None:
    read_ = read(response(MESSAGE, status="incomplete", incomplete_details={"reason": reason}))
    assert (read_.completion, read_.content, read_.finish_reason) == (True, "Good", finish_reason)


def test_a_refusal_is_kept_apart_from_the_text() -> None:
    part = {"type": "refusal", "refusal": "I can't"}
    assert read(response({"type": "message", "content": [part]})).refusal == "I can't"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (response(status="failed", error={"code": "server_error", "message": "It broke"}), "It broke"),
        (response(status="in_progress"), "the response has the status 'in_progress'"),
        (response(status="cancelled"), "the response has the status 'cancelled'"),
    ],
)
def test_one_that_did_not_end_is_no_completion(body: dict[str, Any], words: str) -> None:
    read_ = read(body)
    assert (read_.completion, read_.error_message) == (False, words)


def test_an_envelope_around_it_is_opened() -> None:
    assert read({"code": 0, "data": response(MESSAGE)}).content == "Good"


def test_a_stream_says_what_the_whole_answer_says() -> None:
    streamed = answers.parse(stream(CREATED, delta("Go"), delta("od"), COMPLETED))
    assert streamed == read(COMPLETED["response"])


def test_streamed_calls_equal_those_sent_whole() -> None:
    added = {"type": "response.output_item.added", "output_index": 0, "item": {**CALL, "arguments": ""}}
    pieces = [
        {"type": "response.function_call_arguments.delta", "output_index": 0, "delta": d} for d in ('{"score"', ":3}")
    ]
    whole = response(CALL)
    assert answers.parse(stream(CREATED, added, *pieces, {"type": "response.completed", "response": whole})) == read(
        whole
    )
    cut = answers.parse(stream(CREATED, added, *pieces))
    assert (cut.completion, cut.tool_calls) == (False, read(whole).tool_calls)


def test_a_stream_cut_anywhere_is_not_whole() -> None:
    """What came is kept; only the last event makes a completion of it."""
    whole = stream(CREATED, delta("Go"), delta("od"), COMPLETED)
    for end in range(len(whole) - 1 - len(msgspec.json.encode(COMPLETED)), len(whole) - 40, 7):
        cut = answers.parse(whole[:end])
        assert (cut.completion, cut.content) == (False, "Good")
        assert cut.completion_id == "resp_1"


def test_a_failed_stream_has_its_error() -> None:
    failed = {
        "type": "response.failed",
        "response": response(status="failed", error={"code": "server_error", "message": "It broke"}),
    }
    read_ = answers.parse(stream(CREATED, delta("Go"), failed))
    assert (read_.completion, read_.error_message, read_.error_code) == (False, "It broke", "server_error")
    error = {"type": "error", "code": "rate_limit_exceeded", "message": "Slow down"}
    assert answers.parse(stream(CREATED, error)).error_message == "Slow down"


def test_tokens_and_ends_are_seen_in_events() -> None:
    encoded = {
        name: msgspec.json.encode(event)
        for name, event in (("made", CREATED), ("text", delta("x")), ("end", COMPLETED))
    }
    assert [has_token(data) for data in encoded.values()] == [False, True, False]
    assert [is_done(data) for data in encoded.values()] == [False, False, True]
    assert not is_done(msgspec.json.encode(delta('"type":"response.completed"')))


def test_a_stated_cost_is_read() -> None:
    assert read(response(MESSAGE, usage={**USAGE, "cost": 0.5})).reported_cost_pico_usd == pico("0.5")
