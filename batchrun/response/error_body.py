"""Reads an error body in any envelope of a vendor or gateway. PURE. One reader for all of them.

The shapes (docs/api.md, "Errors"): an `error` object, text or list; `errors`; a bare string; the vendor's own
`{"status": {"code", "message", "error_code"}, "data": null}`; FastAPI's `detail`; RFC 9457's `title` and `detail`;
AWS's `__type`; Google's object inside a list, with `details`; `base_resp`, `fault` and other names of the same thing.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from batchrun.patterns import Pattern
from batchrun.response.retry_after import duration_s

MAX_MESSAGE_CHARS = 1000
"""Error messages are for people and for a column: longer ones are cut, the raw body stays."""

# These only bound the work that a hostile body may cause: real ones have far less.
MAX_CODE_CHARS = 200
MAX_WORDS = 30
MAX_ITEMS = 10
MAX_DEPTH = 5  # no envelope that was seen nests its message deeper than three

_MESSAGE = (
    *("message", "Message", "error_message", "error_msg", "errorMessage", "error_description", "msg", "status_msg"),
    *("faultstring", "detail", "description", "title", "reason"),
)
_CODE = ("error_code", "code", "Code", "errorCode", "errcode", "status_code", "errorcode", "error_type", "type")
_SYMBOL = ("__type", "errorType", "status")
_INSIDE = ("error", "errors", "status", "detail", "base_resp", "fault", "Response", "Error", "err", "errorInfo")
_STATUS = ("code", "status", "status_code", "statusCode", "http_code")
_ECHOES = frozenset(
    {
        *("request", "body", "messages", "input", "prompt", "headers", "flagged_input", "data", "param"),
        *("choices", "usage", "id", "model", "object", "request_id"),
    }
)
"""Fields that repeat the question or hold an answer: a row's or a model's text is not a statement of the server's."""

_FINE = frozenset({"0", "200", "ok", "success", "succeeded"})
"""Codes with which an envelope says that nothing is wrong."""

_WAITS = (
    *((name, 1.0) for name in ("retry_after", "retryAfter", "retry_after_s", "retry_after_seconds")),
    *((name, 1.0) for name in ("estimated_time", "retryDelay")),
    *((name, 0.001) for name in ("retry_after_ms", "retryAfterMs")),
)
"""Fields that say how long to wait, and their unit in seconds. A value may be a number, words, or `{"seconds": 32}`."""

_WAIT = Pattern(
    r"\b(?:try again|retry|wait|available|resets?|retried)(?: again)?:? ?(?:(?:in|after|for|at least|about|~)[ :]*)*"
    r"(?P<wait>(?:\d+(?:\.\d+)? ?(?:ms|milliseconds?|sec(?:ond)?s?|min(?:ute)?s?|hours?|[smh])\b ?"
    r"|\d+(?:\.\d+)?[hm](?=\d))+)",
    re.IGNORECASE,
)
"""A wait in words: "Please try again in 7m12.5s", "retry after 8 seconds", "wait 20 seconds" (OpenAI, Groq, Azure)."""


class Failure(msgspec.Struct, frozen=True):
    """The failure that the body reports. `words` is its text besides message and code: types, states, reasons.

    `status` is the HTTP status that the body itself names, `wait_s` the seconds to wait that it names.
    """

    message: str
    code: str | None = None
    words: str | None = None
    status: int | None = None
    wait_s: float | None = None


def failure_in(body: Any) -> Failure | None:
    """The failure that a decoded body reports; None if it reports none.

    Beside `choices` only `error` counts: an answer may also have a `status` or a `message`.
    """
    match body:
        case str() if body.strip():
            return _failure(body.strip(), None, {})
        case list():
            return next(
                (found for item in body[:MAX_ITEMS] if isinstance(item, dict) and (found := failure_in(item))), None
            )
        case dict():
            if not (error := body.get("error")):
                return None if body.get("choices") else _inside(body, 0)
            return _of_error(error, body)
    return None


def _of_error(error: Any, body: Mapping[str, Any]) -> Failure:
    """The failure in `error`, with the fields beside it."""
    if isinstance(error, str):
        message = _first_text(body, _MESSAGE)
        if message is None:
            return _failure(error, _code(body), body)
        return _failure(message, error, body)  # `error` is a name then, and `message` what it means
    if isinstance(error, dict) and (found := _inside(error, 0)) is not None:
        return found
    if isinstance(error, list) and (found := _of_list(error, 0)) is not None:
        return found
    try:
        text = msgspec.json.encode(error).decode()
    except RecursionError:  # what can just be decoded can't always be encoded
        text = "an error nested too deep to show"
    return _failure(text, _code(error) if isinstance(error, dict) else None, {})


def _inside(fields: Mapping[str, Any], depth: int) -> Failure | None:
    """The failure that an object or one inside it reports."""
    if depth > MAX_DEPTH:
        return None
    code = _code(fields)
    if code is not None and code.lower() in _FINE:
        return None
    if (message := _first_text(fields, _MESSAGE)) is not None:
        detail, title = fields.get("detail"), fields.get("title")
        if isinstance(title, str) and isinstance(detail, str) and message == detail:
            message = f"{title}: {detail}"
        return _failure(message, code, fields)
    for name in _INSIDE:
        inner = fields.get(name)
        found: Failure | None = None
        if isinstance(inner, dict):
            found = _inside(inner, depth + 1)
        elif isinstance(inner, list):
            found = _of_list(inner, depth + 1)
        elif isinstance(inner, str) and inner and name in ("error", "err", "Error"):
            found = _failure(inner, code, fields)
        if found is not None:
            return found if found.code is not None else msgspec.structs.replace(found, code=code)
    return None


def _of_list(items: list[Any], depth: int) -> Failure | None:
    """The failures in a list as one: texts, objects, or FastAPI's `{"loc", "msg", "type"}`."""
    known: list[Failure] = []
    for item in items[:MAX_ITEMS]:
        failure = None
        if isinstance(item, str) and item:
            failure = _failure(item, None, {})
        elif isinstance(item, dict):
            failure = _inside(item, depth + 1)
            place = item.get("loc")
            if failure is not None and isinstance(place, list):
                where = ".".join(map(str, place[:20]))
                failure = msgspec.structs.replace(failure, message=f"{where}: {failure.message}"[:MAX_MESSAGE_CHARS])
        if failure is not None:
            known.append(failure)
    if not known:
        return None
    message = "; ".join(failure.message for failure in known)[:MAX_MESSAGE_CHARS]
    return msgspec.structs.replace(known[0], message=message)


def _failure(message: str, code: str | None, fields: Mapping[str, Any]) -> Failure:
    cause = metadata.get("raw") if isinstance(metadata := fields.get("metadata"), dict) else None
    if isinstance(cause, str) and cause and cause not in message:
        message = f"{message}: {cause}"  # OpenRouter's own message is "Provider returned error" whatever the reason
    param = fields.get("param")
    if isinstance(param, str) and param and param not in message:
        message = f"{message} (param: {param})"
    message = message[:MAX_MESSAGE_CHARS]
    known = {message, code}
    words = [word for word in _words(fields, 0) if word not in known][:MAX_WORDS]
    return Failure(
        message=message,
        code=code,
        words=" ".join(words) or None,
        status=_status(fields, code),
        wait_s=_wait_s(fields, message),
    )


def _first_text(fields: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((value for name in names if isinstance(value := fields.get(name), str) and value), None)


def _code(fields: Mapping[str, Any]) -> str | None:
    for name in (*_CODE, *_SYMBOL):
        value = fields.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
            return str(value).rpartition("#")[2][:MAX_CODE_CHARS]  # AWS: com.amazonaws.x#ThrottlingException
    return None


def _status(fields: Mapping[str, Any], code: str | None) -> int | None:
    """The HTTP status that the object names; the vendor's own codes begin with it (40201 is a 402)."""
    for value in (*(fields.get(name) for name in _STATUS), code):
        text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
        if text.isascii() and text.isdigit() and len(text) == 3 and 400 <= int(text) < 600:
            return int(text)
    vendors = "error_code" in fields and "code" in fields
    if vendors and code is not None and re.fullmatch(r"[45]\d{4}", code):
        return int(code[:3])
    return None


def _words(value: Any, depth: int) -> Iterator[str]:
    """Every short text in an error object. Fields that repeat the question are left out."""
    if depth > MAX_DEPTH:
        return
    if isinstance(value, str) and 0 < len(value) <= 300:
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            if name not in _ECHOES:
                yield from _words(item, depth + 1)
    elif isinstance(value, list):
        for item in value[:MAX_ITEMS]:
            yield from _words(item, depth + 1)


def _wait_s(fields: Mapping[str, Any], message: str) -> float | None:
    """Seconds to wait: a field, one of the `metadata`, Google's RetryInfo among the `details`, or words."""
    details = fields.get("details")
    for each in (fields, fields.get("metadata"), *(details if isinstance(details, list) else ())):
        for name, scale in _WAITS if isinstance(each, dict) else ():
            value = each.get(name)
            if isinstance(value, dict):
                value = value.get("seconds")
            if isinstance(value, int | float) and not isinstance(value, bool):
                if 0 <= value < 1e9:
                    return value * scale
            elif isinstance(value, str) and (seconds := duration_s(value)) is not None:
                return seconds * scale
    found = _WAIT.search(message)
    return None if found is None else duration_s(found["wait"])
