"""Whatever bytes come, they are read as far as they can be, and nothing without a message counts as a completion."""

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.records import Answer, Choice, FunctionCall, Usage
from batchrun.response.answer import decode, parse
from batchrun.response.error_body import MAX_MESSAGE_CHARS
from batchrun.response.sse import events
from batchrun.response.usage import MAX_COUNT

USAGE = {
    "prompt_tokens": 12,
    "completion_tokens": 7,
    "total_tokens": 19,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 3},
}


def completion(message: object = ..., **changed: object) -> dict[str, Any]:
    message = {"role": "assistant", "content": "Fine."} if message is ... else message
    whole: dict[str, Any] = {
        "id": "c-1",
        "object": "chat.completion",
        "created": 1_790_000_000,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": USAGE,
    }
    return {name: value for name, value in (whole | changed).items() if value is not ...}


def body(message: object = ..., **changed: object) -> bytes:
    return json.dumps(completion(message, **changed)).encode()


WHOLE = Answer(
    completion=True,
    completion_id="c-1",
    created=1_790_000_000,
    model="m",
    content="Fine.",
    finish_reason="stop",
    usage=Usage(12, 7, 19, cached_tokens=4, reasoning_tokens=3),
)


def but(**changed: Any) -> Answer:
    return msgspec.structs.replace(WHOLE, **changed)


def test_a_completion_is_read_whole() -> None:
    assert parse(body()) == WHOLE


def test_an_empty_usage_hides_no_other() -> None:
    assert parse(body(usage={}, x_groq={"usage": USAGE})) == WHOLE


NO_COMPLETION = Answer(model="m", usage=WHOLE.usage)
DEEP = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    ("raw", "answer"),
    [
        pytest.param(b"", Answer(), id="nothing"),
        pytest.param(b"<html><body>502 Bad Gateway</body></html>", Answer(), id="HTML"),
        pytest.param(b"\x00\xff\xfe", Answer(), id="binary"),
        pytest.param(b"[]", Answer(), id="a list"),
        pytest.param(b"null", Answer(), id="null"),
        pytest.param(body()[:-20], Answer(), id="cut JSON"),
        pytest.param(body() + b"x", Answer(), id="JSON with a tail"),
        pytest.param(DEEP, Answer(), id="100,000 deep"),
        pytest.param(body(choices=[]), NO_COMPLETION, id="empty choices"),
        pytest.param(body(choices=...), NO_COMPLETION, id="no choices"),
        pytest.param(body(choices={}), NO_COMPLETION, id="choices no list"),
        pytest.param(body(choices=[None]), NO_COMPLETION, id="null choice"),
        pytest.param(body(None), NO_COMPLETION, id="null message"),
        pytest.param(body("Fine."), WHOLE, id="message is text"),
        pytest.param(body(choices=[{"text": "Fine.", "finish_reason": "stop"}]), WHOLE, id="the older API's text"),
        pytest.param(
            body(choices=[{"delta": {"content": "Fine."}, "finish_reason": "stop"}]), WHOLE, id="a delta that is whole"
        ),
        pytest.param(body(choices=[{"delta": {"content": "Fi"}}]), NO_COMPLETION, id="a delta that may go on"),
        pytest.param(
            body(choices=[{"index": 1, "message": {"content": "?"}}, *completion()["choices"]]),
            but(choices=(Choice(1, "?", None), Choice(0, "Fine.", "stop"))),
            id="choices in another order",
        ),
        pytest.param(body({"content": None}), but(content=None), id="null content"),
        pytest.param(body({}), but(content=None), id="no content"),
        pytest.param(body({"content": 5}), but(content="5"), id="content is a number"),
        pytest.param(body({"content": False}), but(content="false"), id="content is false"),
        pytest.param(
            body({"content": {"text": "a", "type": ["b"]}}),
            but(content='{"text":"a","type":["b"]}'),
            id="content is an object",
        ),
        pytest.param(
            body({"content": [{"label": 1}]}), but(content='[{"label":1}]'), id="content is a list of objects"
        ),
        pytest.param(body({"content": ["Fi", "ne."]}), WHOLE, id="content is a list of texts"),
        pytest.param(body({"content": {"type": "text", "text": "Fine."}}), WHOLE, id="content is one part"),
        pytest.param(
            body({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}]}),
            but(content=""),
            id="content is thinking",
        ),
        pytest.param(
            body({"content": [{"type": "text", "text": "Fi"}, {"x": 1}, "y", {"text": "ne."}]}),
            WHOLE,
            id="content list",
        ),
        pytest.param(body({"content": "a\u2028b\u0000c"}), but(content="a\u2028b\0c"), id="NUL and U+2028"),
        pytest.param(body(usage=...), but(usage=None), id="no usage"),
        pytest.param(body(usage=None), but(usage=None), id="null usage"),
        pytest.param(body(usage=[]), but(usage=None), id="usage is a list"),
        pytest.param(body(usage={"prompt_tokens": 1}), but(usage=None), id="half a usage"),
        pytest.param(
            body(usage={"prompt_tokens": 12, "completion_tokens": None, "total_tokens": 19}),
            but(usage=Usage(12, 7, 19)),
            id="a completion in the total only",
        ),
        pytest.param(
            body(usage={"completion_tokens": 7, "total_tokens": 19}),
            but(usage=Usage(12, 7, 19)),
            id="a prompt in the total only",
        ),
        pytest.param(
            body(usage={"prompt_tokens": 12, "total_tokens": 12}), but(usage=None), id="a total that says nothing new"
        ),
        pytest.param(
            body(usage={"prompt_tokens": "12", "completion_tokens": "7"}),
            but(usage=Usage(12, 7, 19)),
            id="usage as strings",
        ),
        pytest.param(
            body(usage={"prompt_tokens": 12.0, "completion_tokens": 7}),
            but(usage=Usage(12, 7, 19)),
            id="usage as floats",
        ),
        pytest.param(body(usage={"prompt_tokens": -1, "completion_tokens": 7}), but(usage=None), id="negative usage"),
        pytest.param(body(usage={"prompt_tokens": True, "completion_tokens": 7}), but(usage=None), id="boolean usage"),
        pytest.param(
            body(usage={"prompt_tokens": MAX_COUNT + 1, "completion_tokens": 7}), but(usage=None), id="absurd usage"
        ),
        pytest.param(
            body(usage={"prompt_tokens": "٣", "completion_tokens": 7}), but(usage=None), id="digits of another script"
        ),
        pytest.param(
            body(usage={**USAGE, "prompt_tokens_details": 5, "completion_tokens_details": {}}),
            but(usage=Usage(12, 7, 19)),
            id="odd details",
        ),
        pytest.param(body(created="yesterday"), but(created=None), id="created is text"),
        pytest.param(body(created=True), but(created=None), id="created is true"),
        pytest.param(body(created=10**15), but(created=None), id="created in another unit"),
        pytest.param(body(id=5, model=None), but(completion_id=None, model=None), id="id is a number"),
        pytest.param(
            body(
                service_level="x", choices=[{"message": {"content": "Fine.", "x": 1}, "finish_reason": "stop", "y": {}}]
            ),
            WHOLE,
            id="unknown fields",
        ),
        pytest.param(body(error=None), WHOLE, id="null error"),
        pytest.param(body(error={}), WHOLE, id="empty error"),
        pytest.param(body(error=""), WHOLE, id="error is empty text"),
        pytest.param(body(error="broken"), but(completion=False, error_message="broken"), id="choices and an error"),
        pytest.param(
            body({"content": None, "function_call": {"name": "f", "arguments": "{"}}),
            but(content=None, function_call=FunctionCall("f", "{")),
            id="function call",
        ),
        pytest.param(
            body({"function_call": {"name": 5}}),
            but(content=None, function_call=FunctionCall(None, None)),
            id="odd function call",
        ),
        pytest.param(body({"function_call": "f"}), but(content=None), id="function call is text"),
        pytest.param(
            b'{"error":{"message":"no","code":"bad","type":"t"}}',
            Answer(error_message="no", error_code="bad", error_words="t"),
            id="error object",
        ),
        pytest.param(
            b'{"error":{"message":"no","code":null,"type":"t"}}',
            Answer(error_message="no", error_code="t"),
            id="error type",
        ),
        pytest.param(
            b'{"error":{"message":"no","code":503}}',
            Answer(error_message="no", error_code="503", error_status=503),
            id="error code number",
        ),
        pytest.param(b'{"error":{"message":"no","code":{"a":1}}}', Answer(error_message="no"), id="error code object"),
        pytest.param(b'{"error":{"reason":"x"}}', Answer(error_message="x"), id="error without message"),
        pytest.param(b'{"error":"no"}', Answer(error_message="no"), id="error text"),
        pytest.param(body(error=[1]), but(completion=False, error_message="[1]"), id="error is a list"),
        pytest.param(
            b'{"message":"no","code":40301}', Answer(error_message="no", error_code="40301"), id="bare message"
        ),
    ],
)
def test_an_odd_body_is_read_where_possible(raw: bytes, answer: Answer) -> None:
    assert parse(raw) == answer


@pytest.mark.parametrize(
    ("raw", "answer"),
    [
        pytest.param(body({"content": "a\ud83db"}), but(content="a\ufffdb"), id="lone surrogate"),
        pytest.param(body().replace(b"Fine.", b"F\xffne."), but(content="F\ufffdne."), id="invalid UTF-8"),
        pytest.param(body(x=float("nan"), y=float("-inf")), WHOLE, id="NaN and Infinity"),
        pytest.param(body().replace(b"1790000000", b"9" * 5000), but(created=None), id="5,000 digits"),
        pytest.param(body().replace(b"Fine.", b"a\tb\nc"), but(content="a\tb\nc"), id="raw control characters"),
        pytest.param(b"\xef\xbb\xbf" + body(), WHOLE, id="BOM"),
    ],
)
def test_lenient_json_is_read_and_flagged(raw: bytes, answer: Answer) -> None:
    assert parse(raw) == msgspec.structs.replace(answer, flagged=True)


def test_of_a_name_twice_the_last_counts() -> None:
    assert parse(body()[:-1] + b',"model":"m2"}').model == "m2"


def test_an_error_message_is_bounded() -> None:
    answer = parse(json.dumps({"error": {"message": "x" * 10_000, "code": "y" * 10_000}}).encode())
    assert (len(answer.error_message or ""), len(answer.error_code or "")) == (MAX_MESSAGE_CHARS, 200)


@pytest.mark.parametrize("depth", range(850, 1010, 3))
def test_a_deeply_nested_error_raises_nothing(depth: int) -> None:
    assert not parse(b'{"error":{"x":' + b"[" * depth + b"]" * depth + b"}}").completion


# -- streams


def chunk(delta: object = None, finish_reason: str | None = None, **changed: object) -> dict[str, Any]:
    choice = {"index": 0, "delta": {} if delta is None else delta, "finish_reason": finish_reason}
    whole = {
        "id": "c-1",
        "object": "chat.completion.chunk",
        "created": 1_790_000_000,
        "model": "m",
        "choices": [choice],
    }
    return whole | changed


def stream(*chunks: object, end: str = "\n\n", done: bool = True) -> bytes:
    sent = [f"data: {json.dumps(each)}{end}" for each in chunks]
    return "".join([*sent, f"data: [DONE]{end}" if done else ""]).encode()


FIRST = chunk({"role": "assistant", "content": ""})
WORDS = [FIRST, chunk({"content": "Fi"}), chunk({"content": "ne."})]
STOP = chunk({}, "stop")
COUNTED = chunk(choices=[], usage=USAGE)


@pytest.mark.parametrize(
    ("raw", "answer"),
    [
        pytest.param(stream(*WORDS, STOP, COUNTED), WHOLE, id="whole"),
        pytest.param(stream(*WORDS, STOP, COUNTED, end="\r\n\r\n"), WHOLE, id="CRLF"),
        pytest.param(stream(*WORDS, STOP, COUNTED, end="\r\r"), WHOLE, id="CR"),
        pytest.param(b"\xef\xbb\xbf" + stream(*WORDS, STOP, COUNTED), WHOLE, id="BOM"),
        pytest.param(b"\n\n" + stream(*WORDS, STOP, COUNTED), WHOLE, id="blank lines first"),
        pytest.param(b": keep-alive\n\n" + stream(*WORDS, STOP, COUNTED), WHOLE, id="comment first"),
        pytest.param(b"id: 7\nevent: x\n" + stream(*WORDS, STOP, COUNTED), WHOLE, id="other fields first"),
        pytest.param(
            stream(*WORDS, STOP, COUNTED).replace(b"\n\n", b"\n: ping\n\nretry: 5\n\n"), WHOLE, id="comments between"
        ),
        pytest.param(stream(*WORDS, STOP, COUNTED).replace(b"data: ", b"data:"), WHOLE, id="no space"),
        pytest.param(
            stream(*WORDS, STOP, COUNTED).replace(b', "object"', b',\ndata: "object"'), WHOLE, id="data over lines"
        ),
        pytest.param(stream(*WORDS, STOP, COUNTED, done=False), WHOLE, id="without [DONE]"),
        pytest.param(stream(*WORDS, STOP, COUNTED, done=False)[:-2], WHOLE, id="without a last blank line"),
        pytest.param(stream(*WORDS, STOP), but(usage=None), id="without usage"),
        pytest.param(stream(*WORDS, STOP | {"usage": USAGE}), WHOLE, id="usage in the last chunk"),
        pytest.param(
            stream(*(each | {"usage": None} for each in WORDS), STOP, COUNTED, STOP | {"usage": None}),
            WHOLE,
            id="null usage",
        ),
        pytest.param(stream(*WORDS, COUNTED), but(finish_reason=None), id="[DONE] without finish_reason"),
        pytest.param(stream(STOP), but(content=None, usage=None), id="no content"),
        pytest.param(
            stream(*WORDS, COUNTED, done=False), but(completion=False, finish_reason=None), id="cut between chunks"
        ),
        pytest.param(b"data: [DONE]\n\n", Answer(), id="only [DONE]"),
        pytest.param(
            stream(*(chunk(each["choices"][0]["delta"], "") for each in WORDS), COUNTED, done=False),
            but(completion=False, finish_reason=None),
            id="a finish_reason of nothing in every chunk",
        ),
        pytest.param(
            stream(*WORDS, chunk(choices=[{"index": 1, "delta": {"content": "?"}}]), STOP, COUNTED, done=False),
            but(completion=False, choices=(Choice(0, "Fine.", "stop"), Choice(1, "?", None))),
            id="cut before a second choice has ended",
        ),
        pytest.param(stream(COUNTED), Answer(model="m", usage=WHOLE.usage), id="only usage"),
        pytest.param(
            stream({"error": {"message": "no", "code": "c"}}),
            Answer(error_message="no", error_code="c"),
            id="error at once",
        ),
        pytest.param(stream({"message": "no"}), Answer(error_message="no"), id="bare message"),
        pytest.param(
            stream(*WORDS, {"error": {"message": "gone"}}, done=False),
            but(completion=False, finish_reason=None, usage=None, error_message="gone"),
            id="error in the middle",
        ),
        pytest.param(
            stream(
                FIRST,
                chunk({"content": "Fi"}),
                chunk(choices=[{"index": 1, "delta": {"content": "?"}, "finish_reason": "length"}]),
                chunk({"content": "ne."}),
                STOP,
                COUNTED,
            ),
            but(choices=(Choice(0, "Fine.", "stop"), Choice(1, "?", "length"))),
            id="a second choice between",
        ),
        pytest.param(
            stream(
                chunk({"function_call": {"name": "f", "arguments": ""}}),
                chunk({"function_call": {"arguments": "{}"}}),
                STOP,
            ),
            but(content=None, usage=None, function_call=FunctionCall("f", "{}")),
            id="function call",
        ),
        pytest.param(stream(*WORDS, [], None, 5, STOP, COUNTED), WHOLE, id="events that are no objects"),
        pytest.param(stream(*WORDS, STOP, COUNTED, STOP | {"usage": {}}), WHOLE, id="a usage of nothing after usage"),
        pytest.param(
            stream(FIRST, {"error": "gone"}, chunk({"content": "Fine."}, error={}), STOP, COUNTED),
            but(completion=False, error_message="gone"),
            id="an error of nothing after an error",
        ),
        pytest.param(
            stream(chunk(choices=[{"message": {"content": "Fine."}, "finish_reason": "stop"}]), COUNTED),
            WHOLE,
            id="a message in one event",
        ),
        pytest.param(
            stream(
                *(chunk(choices=[{"message": {"content": text}}]) for text in ("Fi", "Fine.", "Fine.")), STOP, COUNTED
            ),
            WHOLE,
            id="messages that repeat what came before",
        ),
        pytest.param(
            stream(*WORDS, STOP | {"choices": [{"message": {"content": "Fine."}, "finish_reason": "stop"}]}, COUNTED),
            WHOLE,
            id="a whole message behind its deltas",
        ),
        pytest.param(
            stream(*(chunk(choices=[{"message": {"content": text}}]) for text in ("Fi", "ne.")), STOP, COUNTED),
            WHOLE,
            id="messages in pieces",
        ),
        pytest.param(stream(*WORDS, STOP, COUNTED, end="\n"), WHOLE, id="no blank lines"),
        pytest.param(
            stream(*WORDS, STOP, COUNTED, done=False, end="\n") + b'data: {"cho',
            WHOLE,
            id="no blank lines, cut after the end",
        ),
        pytest.param(
            stream(*WORDS, STOP, COUNTED).replace(b"data: ", b"data: data: ").replace(b"\n\n", b"\ndata: \ndata: \n\n"),
            WHOLE,
            id="a stream in a stream",
        ),
    ],
)
def test_a_stream_is_read_as_a_completion(raw: bytes, answer: Answer) -> None:
    assert parse(raw) == answer


def test_a_character_may_be_cut_between_events() -> None:
    """Servers that cut texts by UTF-16 units send one half of a surrogate pair in each of two events."""
    halves = [chunk({"content": "Fi\ud83d"}), chunk({"content": "\ude00ne.\ud83d"}), STOP, COUNTED]
    assert parse(stream(*halves)) == but(content="Fi\U0001f600ne.\ufffd", flagged=True)


def test_a_cut_stream_needs_its_end() -> None:
    raw = stream(*WORDS, STOP, COUNTED)
    said = raw.index(b'"stop"}') + len(b'"stop"}]}')
    for length in range(len(raw)):
        answer = parse(raw[:length])
        assert answer.completion == (length >= said), length
        assert "Fine.".startswith(answer.content or "")


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=8),
    st.sampled_from(["\n\n", "\r\n\r\n", "\r\r"]),
)
def test_streamed_text_arrives_letter_by_letter(parts: list[str], end: str) -> None:
    answer = parse(stream(FIRST, *(chunk({"content": part}) for part in parts), STOP, end=end))
    assert answer.content == "".join(parts)
    assert not answer.flagged


@given(st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"])), max_size=5))
def test_the_lines_of_an_event_are_joined(lines: list[str]) -> None:
    raw = "".join(f"data: {line}\n" for line in lines).encode() + b"\n"
    assert [event.data for event in events([raw])] == (["\n".join(lines).encode()] if lines else [])


@given(st.binary(max_size=200))
def test_no_bytes_at_all_raise(raw: bytes) -> None:
    assert not parse(raw).completion
    decode(raw)


# ── tools, and several choices ────────────────────────────────────────────────────────────────────────────────────────


CALLS = [
    {"id": "call_1", "type": "function", "function": {"name": "find", "arguments": '{"id":7}'}},
    {"id": "call_2", "type": "function", "function": {"name": "stop", "arguments": ""}},
]


def test_tool_calls_are_kept_as_json_text() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": CALLS}
    whole = parse(msgspec.json.encode({"choices": [{"message": message, "finish_reason": "tool_calls"}]}))
    pieces: list[dict[str, object]] = [
        {"content": None, "tool_calls": [{"index": 0, **CALLS[0], "function": {"name": "find", "arguments": ""}}]},
        {"tool_calls": [{"index": 1, **CALLS[1]}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"id"'}}, {"index": 1, "function": {}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ":7}"}}]},
    ]
    events = [{"choices": [{"index": 0, "delta": piece}]} for piece in pieces]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    streamed = parse(b"".join(b"data: %b\n\n" % msgspec.json.encode(event) for event in events))
    for said in (whole, streamed):
        assert said.completion
        assert json.loads(said.tool_calls or "") == CALLS
        assert (said.content, said.function_call) == (None, None)


def spelled(*tool_calls: Sequence[object]) -> Any:
    """The calls that the deltas of a stream add up to."""
    events = [{"choices": [{"index": 0, "delta": {"tool_calls": pieces}}]} for pieces in tool_calls]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    said = parse(b"".join(b"data: %b\n\n" % msgspec.json.encode(event) for event in events))
    return json.loads(said.tool_calls or "null")


def test_streamed_calls_are_separated_by_any_index() -> None:
    """Each as it was reported of a server: Ollama, Mistral, vLLM, gateways that repeat the name, custom tools."""
    first, second = CALLS[0], {**CALLS[1], "function": {"name": "stop", "arguments": "{}"}}
    assert spelled([{"index": 0, **first}], [{"index": 0, **second}]) == [first, second], "all with the number 0"
    assert spelled([first], [second]) == [first, second], "without a number, one a delta"
    assert spelled([first, second]) == [first, second], "without a number, in one delta"
    pieces = [[{"index": 0, "id": f"c{n}", "function": {"arguments": part}}] for n, part in enumerate(('{"id"', ":7}"))]
    started = [{"index": 0, **first, "function": {"name": "find"}}]
    assert spelled(started, *pieces) == [first], "another id in each piece"
    named = [[{"index": 0, "function": {"name": "find", "arguments": part}}] for part in ('{"id"', ":7}")]
    assert spelled(started, *named) == [first], "the name in each piece"
    whole = [{"index": 0, **first, "function": {"name": "find", "arguments": {"id": 7}}}]
    assert spelled(whole) == [first], "arguments as an object"
    text = {"id": "c", "type": "custom", "custom": {"name": "note", "input": "two words"}}
    parts = [[{"index": 0, "custom": {"input": part}}] for part in ("two ", "words")]
    assert spelled([{"index": 0, **text, "custom": {"name": "note", "input": ""}}], *parts) == [text]


@pytest.mark.parametrize("calls", [None, [], {}, "call", 7])
def test_malformed_tool_calls_are_ignored(calls: object) -> None:
    assert parse(msgspec.json.encode({"choices": [{"message": {"tool_calls": calls}}]})).tool_calls is None


def test_several_choices_keep_their_order() -> None:
    reasons = ["stop", "length", None]
    whole = parse(
        msgspec.json.encode(
            {
                "choices": [
                    {"index": at, "message": {"content": f"c{at}"}, "finish_reason": reason}
                    for at, reason in enumerate(reasons)
                ]
            }
        )
    )
    pieces = [(0, "c"), (2, "c"), (1, "c"), (1, "1"), (0, "0"), (2, "2")]
    events = [{"choices": [{"index": at, "delta": {"content": text}}]} for at, text in pieces]
    events += [{"choices": [{"index": at, "delta": {}, "finish_reason": reasons[at]} for at in (1, 0)]}]
    streamed = parse(b"".join(b"data: %b\n\n" % msgspec.json.encode(event) for event in events) + b"data: [DONE]\n\n")
    for said in (whole, streamed):
        assert [(c.index, c.content, c.finish_reason) for c in said.choices] == [
            (at, f"c{at}", reason) for at, reason in enumerate(reasons)
        ]
        assert (said.content, said.finish_reason, said.completion) == ("c0", "stop", True)


def test_one_choice_is_not_a_list() -> None:
    """Absurd usage numbers are left out."""
    assert parse(msgspec.json.encode({"choices": [{"message": {"content": "c"}}]})).choices == ()
    events = [{"choices": [{"index": at, "delta": {"content": "c"}, "finish_reason": "stop"}]} for at in (0, 10**8)]
    streamed = parse(b"".join(b"data: %b\n\n" % msgspec.json.encode(event) for event in events))
    assert (streamed.content, streamed.choices, streamed.completion) == ("c", (), True)


STATED = {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}


@pytest.mark.parametrize(
    ("later", "counts"),
    [
        ([{"prompt_tokens": 0, "completion_tokens": 7, "total_tokens": 7}], (10, 7, 17)),
        ([{"prompt_tokens": 0, "completion_tokens": 7, "total_tokens": 17}], (10, 7, 17)),
        ([{"prompt_tokens": 0, "completion_tokens": 7}], (10, 7, 17)),
        ([{"prompt_tokens": 0, "completion_tokens": 2, "total_tokens": 2}] * 2, (10, 7, 17)),
        ([{"prompt_tokens": 0, "completion_tokens": 7, "total_tokens": 12}], (10, 7, 22)),  # five of reasoning
        ([{"completion_tokens": 2}], (10, 2, 13)),
        ([{"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}], (10, 3, 13)),
        ([{"prompt_tokens": 11, "completion_tokens": 2, "total_tokens": 13}], (11, 2, 13)),
        ([{"input_tokens": 0, "output_tokens": 7}], (10, 3, 17)),
    ],
)
def test_usage_in_pieces_adds_up(later: list[dict[str, int]], counts: tuple[int, int, int]) -> None:
    usages = [chunk(choices=[], usage=usage) for usage in (STATED, *later)]
    usage = parse(stream(*WORDS, STOP, *usages)).usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == counts


COMPLETE: dict[str, Any] = json.loads(body())
AROUND: list[dict[str, Any]] = [
    {},
    {"status": {"code": 200, "message": "ok"}},
    {"code": 0, "message": "success"},
    {"success": True, "message": "Request completed"},
    {"error": None, "errors": []},
]


@pytest.mark.parametrize(
    ("raw", "flagged"),
    [
        (b": ping\n\n" + body(), False),
        (b": ping\r\n: ping\r\n\r\n" + body(), False),
        (b"\n:\n" + body(), False),
        (body() + b"\0", True),
        (body() + b"\n: bye\n\0\0", True),
        (json.dumps([COMPLETE]).encode(), False),
        *(
            (json.dumps({**around, name: COMPLETE}).encode(), False)
            for name in ("data", "result", "response", "body", "output")
            for around in AROUND
        ),
        (json.dumps(body().decode()).encode(), False),
        (json.dumps({"statusCode": 200, "body": body().decode()}).encode(), False),
    ],
)
def test_a_gateway_wrapper_is_removed(raw: bytes, flagged: bool) -> None:
    answer = parse(raw)
    assert (answer.completion, answer.content, answer.flagged) == (True, "Fine.", flagged)
    assert answer.usage == parse(body()).usage


def test_usage_beside_a_wrapped_answer_counts() -> None:
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    inner = {name: value for name, value in COMPLETE.items() if name != "usage"}
    read_usage = parse(json.dumps({"usage": usage, "data": inner}).encode()).usage
    assert read_usage is not None
    assert read_usage.prompt_tokens == 7


@pytest.mark.parametrize(
    "raw",
    [
        json.dumps({"status": {"code": 402, "message": "no credits"}, "data": COMPLETE}).encode(),
        json.dumps({"error": {"message": "gone"}, "data": COMPLETE}).encode(),
        json.dumps({"data": {"choices": []}}).encode(),
        json.dumps({"data": None, "status": {"code": 200}}).encode(),
        json.dumps({"message": "gone", "code": 502, "body": body().decode()}).encode(),
        json.dumps('{"error": {"message": "gone"}}').encode(),
        json.dumps([COMPLETE, COMPLETE]).encode(),
        body() + body(),
        b": ping\n\n: ping\n\n",
        b": ping\n\n" + body()[:-1],
        b": {\n" * 50_000,
    ],
)
def test_wrapped_failures_are_no_answers(raw: bytes) -> None:
    assert not parse(raw).completion
