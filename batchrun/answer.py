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

MAX_INT64 = 2**63 - 1


def read(body: bytes) -> Answer:
    """What `body` says: a chat completion as JSON or as server-sent events, an error object, or nothing usable."""
    if body.startswith((b"data:", b"event:", b":", b"\xef\xbb\xbfdata:")):
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
    if isinstance(error, str):
        return error[:MAX_MESSAGE_CHARS], None
    if isinstance(error, dict):
        message = error.get("message")
        text = message if isinstance(message, str) else msgspec.json.encode(error).decode()
        code = error.get("code") or error.get("type")
        return text[:MAX_MESSAGE_CHARS], str(code)[:200] if code is not None else None
    if error is None and "choices" not in body and isinstance(body.get("message"), str):
        code = body.get("code")
        return body["message"][:MAX_MESSAGE_CHARS], str(code)[:200] if code is not None else None
    return None, None


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
    return value if whole and 0 <= value <= MAX_INT64 else None


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
    """A whole stream folded into the completion it spells; incomplete without a finish_reason (or `[DONE]`)."""
    parts: list[str] = []
    names: list[str] = []
    arguments: list[str] = []
    last: dict[str, Any] = {}
    finish_reason: str | None = None
    flagged = False
    for data in events(body):
        if data == b"[DONE]":
            break
        event, lenient = decode(data)
        flagged |= lenient
        if not isinstance(event, dict):
            continue
        last = {**last, **{name: value for name, value in event.items() if value is not None}}
        choice = _first_choice(event)
        finish_reason = _text(choice.get("finish_reason")) or finish_reason
        delta = choice.get("delta")
        if isinstance(delta, dict):
            parts.append(_content(delta.get("content")) or "")
            if call := _function_call(delta.get("function_call")):
                names.append(call.name or "")
                arguments.append(call.arguments or "")
    message: dict[str, Any] = {"content": "".join(parts) if parts else None}
    if names:
        message["function_call"] = {"name": "".join(names), "arguments": "".join(arguments)}
    whole = {**last, "choices": [{"message": message, "finish_reason": finish_reason}]}
    answer = _from_object(whole, flagged)
    return answer if finish_reason is not None else msgspec.structs.replace(answer, completion=False)


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
