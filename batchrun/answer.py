"""Raw bytes of an answer → `Answer`. PURE. Strict first, then lenient; what neither reads is not a completion.

Bodies come from anywhere: the API, a proxy's HTML, a cut stream. Nothing here raises for any bytes.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from batchrun.records import Answer, FunctionCall, Usage

MAX_MESSAGE_CHARS = 1000
"""Error messages are for people and for a column: longer ones are cut, the raw body stays."""

MAX_COUNT = 10**9
"""Tokens. No request has a billion; a larger count is an error of the server's that no bill should be made of."""

_STREAM = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:data|event|id|retry)?:")


def read(body: bytes) -> Answer:
    """What `body` says: a chat completion as JSON or as server-sent events, an error object, or nothing usable."""
    if _STREAM.match(body):
        return _from_events(body)
    decoded, flagged = decode(body)
    return _from_object(decoded, flagged) if isinstance(decoded, dict) else Answer()


def decode(body: bytes) -> tuple[Any, bool]:
    """The JSON value in `body` and whether only the lenient reading took it; (None, True) if neither did.

    Lenient: invalid UTF-8 and lone surrogates become U+FFFD, NaN and Infinity are taken, huge integers become floats
    or text. msgspec refuses all of those, and reports too deep a nesting as RecursionError.
    """
    try:
        return msgspec.json.decode(body), False
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    try:
        text = body.decode("utf-8-sig", "replace")
        return _without_surrogates(json.loads(text, strict=False, parse_int=_parse_int)), True
    except (ValueError, RecursionError):
        return None, True


def _parse_int(digits: str) -> int | str:
    # CPython refuses to convert more than 4,300 digits; no count of ours is near 20
    return int(digits) if len(digits) < 20 else digits


_SURROGATE = re.compile("[\ud800-\udfff]")


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_SURROGATE.sub("\ufffd", key): _without_surrogates(item) for key, item in value.items()}
    return value


def _from_object(body: dict[str, Any], flagged: bool) -> Answer:
    choice = _first_choice(body)
    message = choice.get("message")
    error_message, error_code = _error(body)
    if not isinstance(message, dict):
        return Answer(
            flagged=flagged,
            usage=_usage(body.get("usage")),
            model=_text(body.get("model")),
            error_message=error_message,
            error_code=error_code,
        )
    return Answer(
        completion=error_message is None,
        flagged=flagged,
        completion_id=_text(body.get("id")),
        created=_created(body.get("created")),
        model=_text(body.get("model")),
        content=_content(message.get("content")),
        function_call=_function_call(message.get("function_call")),
        finish_reason=_text(choice.get("finish_reason")),
        usage=_usage(body.get("usage")),
        error_message=error_message,
        error_code=error_code,
    )


def _first_choice(body: dict[str, Any]) -> dict[str, Any]:
    choices = body.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) else {}


def _error(body: dict[str, Any]) -> tuple[str | None, str | None]:
    """Message and code of an error object, in the shapes gateways use (docs/api.md, "Errors")."""
    error = body.get("error")
    if isinstance(error, str) and error:
        return error[:MAX_MESSAGE_CHARS], None
    if isinstance(error, dict) and error:
        message = error.get("message")
        text = message if isinstance(message, str) else _as_text(error)
        return text[:MAX_MESSAGE_CHARS], _code(error.get("code") or error.get("type"))
    if not error and "choices" not in body and isinstance(body.get("message"), str):
        return body["message"][:MAX_MESSAGE_CHARS], _code(body.get("code"))
    return None, None


def _as_text(error: dict[str, Any]) -> str:
    try:
        return msgspec.json.encode(error).decode()
    except RecursionError:  # what can just be decoded can't always be encoded
        return "an error nested too deep to show"


def _code(value: Any) -> str | None:
    return str(value)[:200] if isinstance(value, str | int) else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _content(value: Any) -> str | None:
    """Text as it is; a list of text parts, as some servers answer, joined."""
    if isinstance(value, list):
        return "".join(part["text"] for part in value if isinstance(part, dict) and isinstance(part.get("text"), str))
    return _text(value)


def _function_call(value: Any) -> FunctionCall | None:
    if not isinstance(value, dict):
        return None
    return FunctionCall(_text(value.get("name")), _text(value.get("arguments")))


def _created(value: Any) -> int | None:
    # the column is a timestamp: what does not fit into years 1970 to 9999 is no time
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 253_402_300_800 else None


def _count(value: Any) -> int | None:
    """A token count: an integer, or digits in a string as some servers send them; anything else is unknown."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19:
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 <= value <= MAX_COUNT else None


def _usage(value: Any) -> Usage | None:
    """Both counts that are billed, or None: half a usage can't be priced."""
    if not isinstance(value, dict):
        return None
    prompt, completion = _count(value.get("prompt_tokens")), _count(value.get("completion_tokens"))
    if prompt is None or completion is None:
        return None
    total = _count(value.get("total_tokens"))
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion if total is None else total,
        cached_tokens=_detail(value.get("prompt_tokens_details"), "cached_tokens"),
        reasoning_tokens=_detail(value.get("completion_tokens_details"), "reasoning_tokens"),
    )


def _detail(details: Any, name: str) -> int | None:
    return _count(details.get(name)) if isinstance(details, dict) else None


def _from_events(body: bytes) -> Answer:
    """A whole stream folded into the completion it spells; incomplete with neither a finish_reason nor `[DONE]`."""
    deltas: list[dict[str, Any]] = []
    last: dict[str, Any] = {}
    finish_reason: str | None = None
    flagged = done = False
    for data in events(body):
        if done := data == b"[DONE]":
            break
        event, lenient = decode(data)
        flagged |= lenient
        if not isinstance(event, dict):
            continue
        last |= {name: value for name, value in event.items() if value is not None and name != "choices"}
        choice = _first_choice(event)
        if choice.get("index") not in (None, 0):
            continue  # the further ones of n > 1 are in the raw answer only
        finish_reason = _text(choice.get("finish_reason")) or finish_reason
        if isinstance(delta := choice.get("delta"), dict):
            deltas.append(delta)
    if deltas:
        last["choices"] = [{"message": _joined(deltas), "finish_reason": finish_reason}]
    answer = _from_object(last, flagged)
    return answer if done or finish_reason is not None else msgspec.structs.replace(answer, completion=False)


def _joined(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream's deltas add up to; what none of them has stays null."""
    contents = [text for delta in deltas if (text := _content(delta.get("content"))) is not None]
    calls = [call for delta in deltas if (call := _function_call(delta.get("function_call"))) is not None]
    message: dict[str, Any] = {"content": "".join(contents) if contents else None}
    if calls:
        name, arguments = (
            "".join(parts) for parts in zip(*((c.name or "", c.arguments or "") for c in calls), strict=True)
        )
        message["function_call"] = {"name": name, "arguments": arguments}
    return message


def events(body: bytes) -> Iterator[bytes]:
    """The data of each event in a finished stream: its lines joined, comments left out.

    Source: WHATWG HTML, "Server-sent events"; a last event without its blank line is still taken.
    """
    lines: list[bytes] = []
    for line in body.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n"):
        if not line and lines:
            yield b"\n".join(lines)
            lines = []
        elif line.startswith(b"data:"):
            lines.append(line[5:].removeprefix(b" "))
    if lines:
        yield b"\n".join(lines)
