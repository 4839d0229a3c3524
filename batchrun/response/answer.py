"""The bytes of an answer → `Answer`. PURE. Strict first, then lenient; a body that neither reads is not a completion.

Bodies come from anywhere: the API, a proxy's HTML, a cut stream. Nothing here raises for any bytes.
"""

import json
import re
from collections.abc import Iterable
from itertools import chain
from typing import Any

import msgspec

from batchrun.records import Answer
from batchrun.response import billed_apart, chat_completion, error_body, messages, packed, responses_object, sse
from batchrun.response import usage as usages

MAX_CHOICES = 1024
"""Of a stream: servers accept an `n` of 128. Choices with a higher index are in the raw answer only."""

_STREAM = re.compile(rb"(?:\xef\xbb\xbf)?\s*[\w-]*:")
"""The beginning of a stream, unlike any JSON or HTML: a colon, with or without a field's name before it."""

_COMMENTS = re.compile(rb"(?:\xef\xbb\xbf)?(?:\s*+:[^\r\n]*+[\r\n]++)++\s*+(?=[{\[])")
"""A stream's comments in front of whole JSON: gateways ping so while they wait for the answer."""

_ENVELOPES = ("data", "result", "response", "body", "output")

_GLUE = re.compile(r"(?:\s|\0|data:|event: ?\w*|:[^\n]*|\[DONE\]|0(?=\r?\n))*+")
"""Left by gateways after a complete JSON answer: a stream's end, its comments, a chunk's size, a NUL. No words.
Possessive: no tail of a server's makes it try again and again."""


def parse(stored: bytes, choices: int = 1) -> Answer:
    """The content of a body in its stored form: a chat completion as JSON or as server-sent events, an error object, or
    nothing usable. `choices`: how many the request wants. A stream without `[DONE]` is whole only when all have ended.
    """
    return chat_completion.parse_typed(stored) or parse_carefully(stored, choices)


def parse_carefully(stored: bytes, choices: int = 1) -> Answer:
    """As `parse`, for any bytes. It also reads what `parse_typed` reads, at a higher cost."""
    pieces = packed.pieces(stored)
    first = next(pieces, b"")
    comments = _COMMENTS.match(first)
    if comments is None and _STREAM.match(first):
        return _from_events(chain((first,), pieces), choices)
    body = first[0 if comments is None else comments.end() :] + b"".join(pieces)
    decoded, flagged = decode(body)
    if decoded is None:
        decoded, flagged = _unglued(body), True
    decoded = _unwrapped(_unquoted(decoded))
    if isinstance(decoded, dict):
        return chat_completion.parse_object(decoded, flagged)
    return chat_completion.with_failure(Answer(flagged=flagged and decoded is not None), error_body.failure_in(decoded))


def _unwrapped(decoded: Any) -> Any:
    """The completion inside a gateway's envelope that reports no failure; else the value as it is."""
    if isinstance(decoded, list) and len(decoded) == 1:
        return decoded[0] if _is_completion(decoded[0]) else decoded
    if not isinstance(decoded, dict) or "choices" in decoded:
        return decoded
    inside = {name: _unquoted(decoded.get(name)) for name in _ENVELOPES}
    name = next((name for name, value in inside.items() if _is_completion(value)), None)
    if name is None or decoded.get("error"):
        return decoded
    failure = error_body.failure_in({other: value for other, value in decoded.items() if other != name})
    if failure is not None and (failure.status is not None or failure.code is not None):
        return decoded
    return {"usage": decoded.get("usage"), **inside[name]}


def _unquoted(value: Any) -> Any:
    """The object in a text that is JSON itself: some servers encode their answer twice."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    inner, _ = decode(value.encode())
    return inner if isinstance(inner, dict) else value


def _is_completion(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return bool(isinstance(value.get("choices"), list) and value["choices"]) or responses_object.is_response(value)


def _unglued(body: bytes) -> Any:
    """The JSON value in front of a stream's end that was glued to it; None if anything else is behind it."""
    try:
        text = body.decode("utf-8-sig", "replace").lstrip()
        value, end = json.JSONDecoder(strict=False, parse_int=_parse_int).raw_decode(text)
    except (ValueError, RecursionError):
        return None
    return _without_surrogates(value) if _GLUE.fullmatch(text, end) else None


def decode(body: bytes) -> tuple[Any, bool]:
    """The JSON value in `body` and whether only the lenient reading took it; (None, True) if neither did.

    Lenient: invalid UTF-8 and lone surrogates become U+FFFD, NaN and Infinity are taken, huge integers become floats
    or text. msgspec refuses all of those, and reports too deep a nesting as RecursionError.
    """
    decoded, flagged = _decode_piece(body)
    return (_without_surrogates(decoded) if flagged else decoded), flagged


def _decode_piece(data: bytes) -> tuple[Any, bool]:
    """Decodes a piece of a stream. It keeps lone surrogates: the next piece may begin with the other half."""
    try:
        return msgspec.json.decode(data), False
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        return json.loads(data.decode("utf-8-sig", "replace"), strict=False, parse_int=_parse_int), True
    except (ValueError, RecursionError):
        return None, True


def _parse_int(digits: str) -> int | str:
    # CPython refuses to convert more than 4,300 digits; no count of ours is near 20
    return int(digits) if len(digits) < 20 else digits


_SURROGATE = re.compile("[\ud800-\udfff]")


def _without_surrogates(value: Any) -> Any:
    """The value with pairs joined and lone ones replaced in all its texts."""
    if isinstance(value, str) and _SURROGATE.search(value):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return value


def has_token(data: bytes) -> bool:
    """True when the event's data has some text, call or reasoning of an answer, not only a role."""
    event, _ = decode(data)
    if isinstance(event, dict) and str(event.get("type")).endswith(".delta"):
        return bool(event.get("delta"))  # text, arguments or reasoning of the Responses API
    choices = event.get("choices") if isinstance(event, dict) else None
    deltas = (
        [messages.delta(choice) for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []
    )
    return any(delta.get(name) for delta in deltas if delta is not None for name in _DELTA_PARTS)


_DELTA_PARTS = ("content", "function_call", "tool_calls", "reasoning_content", "reasoning", "refusal")
"""The servers' names for the parts of a delta (practice)."""


_DONE = b"[DONE]"


def is_done(data: bytes) -> bool:
    """True for the data of a stream's last event."""
    return data == _DONE or data.strip() == _DONE or responses_object.ends(data)


def _from_events(pieces: Iterable[bytes], choices: int) -> Answer:
    """The completion that a stream's events add up to. Without `[DONE]` it is whole only if every requested
    choice, and any other that began, has its finish_reason.
    """
    streamed = _StreamedAnswer()
    done = False
    for event in chain.from_iterable(_separated(event) for event in sse.events(pieces)):
        if done := event.data.strip() == _DONE:
            break
        streamed.add(event)
        if done := streamed.ended:
            break
    return streamed.answer(done=done, choices=choices)


def _separated(event: sse.Event) -> Iterable[sse.Event]:
    """The event, or those in it: some gateways leave out the blank lines between events, or write `data:` twice."""
    data = event.data
    if (b"\n" not in data and not data.startswith(_FIELD)) or decode(data)[0] is not None:
        return (event,)
    lines = [line for each in data.split(b"\n") if (line := each.removeprefix(_FIELD).strip())]
    whole = lines if event.whole else lines[:-1]
    if not whole or not all(line == _DONE or isinstance(decode(line)[0], dict) for line in whole):
        return (event,)
    return [sse.Event(line, event.name, event.whole or line is not lines[-1]) for line in lines]


_FIELD = b"data:"


_NO_MESSAGE = "the stream ended with an error"


class _StreamedAnswer:
    """The sum of a stream's events."""

    def __init__(self) -> None:
        self._last: dict[str, Any] = {}
        self._without_choices: dict[str, Any] = {}
        self._messages: dict[int, messages.Message] = {}
        self._finish_reasons: dict[int, str] = {}
        self._usages: dict[int, dict[str, Any]] = {}
        self._flagged = self._broken = self._searched = False
        self.ended = False  # by the last event of the Responses API

    def add(self, event: sse.Event) -> None:
        decoded, lenient = _decode_piece(event.data)
        if event.name == b"error":  # its data says what went wrong, in any form
            if not isinstance(decoded, dict):
                decoded = {"error": event.data.decode("utf-8", "replace") or _NO_MESSAGE}
            elif not decoded.get("error"):
                decoded = {"error": decoded or _NO_MESSAGE}
        if not isinstance(decoded, dict):
            if event.whole:  # a cut event is not flagged as odd
                self._flagged |= lenient
                self._broken |= event.data.lstrip().startswith(b"{")  # a piece of the answer that can't be read
            return

        self._flagged |= lenient
        if str(decoded.get("type")).startswith("response."):
            self.ended = decoded["type"] in responses_object.ENDS
            decoded = responses_object.as_chunk(decoded)
            message = decoded.get("choices", [{}])[0].get("message")
            if message is not None and any(message.get(name) for name in _DELTA_PARTS):
                self._messages.pop(0, None)  # the last event holds the whole message: it replaces the deltas
        for name in chat_completion.LAST_COUNTS:
            if (value := decoded.get(name)) is not None:
                self._last[name] = value
        if (usage := usages.found_in(decoded)) is not None:
            self._last["usage"] = usages.joined(self._last.get("usage"), usage)
        if error := decoded.get("error"):
            self._last["error"] = error
        choices = decoded.get("choices")
        if b"url_citation" in event.data:
            self._searched |= billed_apart.has_searched(decoded)
        if choices is None:
            self._without_choices |= decoded
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict):
                self._take_choice(choice)

    def _take_choice(self, choice: dict[str, Any]) -> None:
        index = messages.index(choice, 0)
        if index >= MAX_CHOICES:
            return
        if reason := messages.finish_reason(choice):
            self._finish_reasons[index] = reason
        if (usage := usages.in_choice(choice)) is not None:
            self._usages[index] = usages.joined(self._usages.get(index), usage)
        if index == 0 and (error := choice.get("error")):
            self._last["error"] = error
        if (delta := messages.delta(choice)) is not None:
            is_message = delta is not choice.get("delta")
            self._messages.setdefault(index, messages.Message()).add(delta, is_message=is_message)

    def answer(self, *, done: bool, choices: int) -> Answer:
        whole = self._last if self._messages else self._without_choices | self._last
        if 0 in self._messages:
            whole["choices"] = [
                {"index": index, "message": message.whole(), "finish_reason": self._finish_reasons.get(index)}
                for index, message in sorted(self._messages.items())
            ]
        elif 0 in self._finish_reasons:
            whole["choices"] = [{"index": 0, "finish_reason": self._finish_reasons[0]}]
        of_choices = usages.of_choices(self._usages.values())
        if of_choices is not None and usages.read(whole.get("usage")) is None:
            whole["usage"] = usages.joined(whole.get("usage"), of_choices)
        answer = chat_completion.parse_object(_without_surrogates(whole) if self._flagged else whole, self._flagged)
        if self._searched and answer.billed_apart is None:
            answer = msgspec.structs.replace(answer, billed_apart=billed_apart.SEARCHES)
        expected = self._messages.keys() | set(range(min(choices, MAX_CHOICES)))
        ended = (done or expected <= self._finish_reasons.keys()) and not self._broken
        return answer if ended else msgspec.structs.replace(answer, completion=False)
