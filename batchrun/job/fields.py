"""Validates the API's fields that come from a row, by the types and ranges in docs/api.md. PURE."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from batchrun.errors import InputError

ROLES = ("user", "assistant", "system", "developer", "tool", "function")
"""`tool` and `function` hold the results of calls. docs/api.md does not name them, but servers accept them."""

OUTPUT_LIMITS = ("max_tokens", "max_completion_tokens")
"""The two names of the output limit. No request has both: some servers reject that, others pick one of the two."""

CHAT_ONLY = frozenset({"n", "stop", "seed", "logit_bias", "logprobs", "presence_penalty", "frequency_penalty"})
"""Fields of a chat completion that the Responses API does not have. Leaving one out would change the question."""

EFFORTS = ("low", "medium", "high", "xhigh")
MAX_TOKENS = 128_000  # docs/api.md, "Request"


def as_json(value: Any) -> Any:
    """A text value decoded as JSON; any other value unchanged. Columns of mixed types hold JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return msgspec.json.decode(value)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InputError(f"a column that should hold JSON text holds something else: {error}") from error


def plain(value: Any, column: str) -> Any:
    """`value` without the null fields of its objects: Parquet pads every struct with them.

    Raises:
        InputError: JSON can't represent a value in it. The encoder would send NaN as null and bytes as base64.
    """
    if isinstance(value, dict):
        return {name: plain(item, column) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [plain(item, column) for item in value]
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise InputError(f"{column}: JSON has no {type(value).__name__} such as {value!r:.80}; convert it first")


def same_number(value: Any) -> Any:
    """A whole number as an integer: Parquet stores integers beside nulls or fractions as doubles, JSONL does not."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_messages(messages: Any) -> list[Any]:
    """The messages, unchanged.

    Raises:
        InputError: they don't match docs/api.md; the message names the field.
    """
    if not isinstance(messages, list) or not messages:
        raise InputError("messages: expected at least one message")
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise InputError(f"messages[{place}].role: expected one of {', '.join(ROLES)} (is {role!r:.80})")
        content = message.get("content")
        calls = "function_call" in message or "tool_calls" in message
        declined = message["role"] == "assistant" and isinstance(message.get("refusal"), str)
        if content is None and declined and not calls:
            message["content"] = None  # the API wants the field, and `plain` has removed it as a null
        elif not isinstance(content, str | list) and not (content is None and (calls or message["role"] == "function")):
            raise InputError(f"messages[{place}].content: expected text or a list of parts")
        if message["role"] == "function" and not isinstance(message.get("name"), str):
            raise InputError(f"messages[{place}].name: expected the name of the function that this is the result of")
        if message["role"] == "tool" and not isinstance(message.get("tool_call_id"), str):
            raise InputError(f"messages[{place}].tool_call_id: expected the id of the call that this is the result of")
    return messages


def check_parameter(name: str, value: Any) -> Any:
    """The value, as an integer where it is a whole number. Fields that docs/api.md does not list pass unchanged.

    Raises:
        InputError: docs/api.md does not allow the value for this field.
    """
    if (check := _CHECKS.get(name)) is not None:
        value = same_number(value)
        allowed, expected = check
        if not allowed(value):
            raise InputError(f"{name}: expected {expected} (is {value!r:.80})")
    return value


def _number_within(value: Any, low: float, high: float) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and low <= value <= high  # False for NaN


_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "model": (lambda v: isinstance(v, str) and v != "", "a model id"),
    "reasoning_effort": (lambda v: v in EFFORTS, f"one of {', '.join(EFFORTS)}"),
    "max_tokens": (lambda v: isinstance(v, int) and _number_within(v, 1, MAX_TOKENS), "an integer from 1 to 128,000"),
    "temperature": (lambda v: _number_within(v, 0, 2), "a number from 0 to 2"),
    "top_p": (lambda v: _number_within(v, 0, 1), "a number from 0 to 1"),
    "functions": (
        lambda v: isinstance(v, list) and all(isinstance(f, dict) and isinstance(f.get("name"), str) for f in v),
        "a list of functions with names",
    ),
    "function_call": (
        lambda v: v in ("none", "auto") or (isinstance(v, dict) and isinstance(v.get("name"), str)),
        '"none", "auto" or an object with a name',
    ),
    "response_format": (
        lambda v: isinstance(v, dict) and v.get("type") in ("text", "json_object", "json_schema"),
        "an object with type text, json_object or json_schema",
    ),
}
