"""The message of a choice: what it says, as it came whole or as a stream's deltas add up to it. PURE."""

from typing import Any

import msgspec

from batchrun.records import FunctionCall
from batchrun.response import usage as usages

MAX_CALLS = 1024
"""Of a stream. Calls with a higher index are in the raw answer only."""


def text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def finish_reason(choice: dict[str, Any]) -> str | None:
    """The choice's finish_reason; some servers send an object whose `type` it is (SGLang before 0.4)."""
    reason = choice.get("finish_reason")
    return text(reason.get("type") if isinstance(reason, dict) else reason)


def message_of(choice: dict[str, Any]) -> dict[str, Any] | None:
    """A choice's message, or what some servers send in its place: a text, or the only delta of a whole answer."""
    message, delta = choice.get("message"), choice.get("delta")
    if isinstance(message, dict):
        return message
    if isinstance(delta, dict) and choice.get("finish_reason"):
        return delta
    words = text(message) or text(choice.get("text"))
    return None if words is None else {"content": words}


_WITHOUT_TEXT = ("thinking", "redacted_thinking", "reasoning", "refusal")
"""Content parts that do not belong to the answer's text."""


def content(value: Any) -> str | None:
    """Text as it is, and a list of text parts joined; other JSON, which some servers send in JSON mode, as its text."""
    if value is None or isinstance(value, str):
        return value
    items = [value] if isinstance(value, dict) and value.get("type") == "text" else value
    if isinstance(items, list):
        parts = [item for item in items if isinstance(item, dict)]
        if any(part.get("type") in _WITHOUT_TEXT or isinstance(part.get("text"), str) for part in parts):
            return "".join(text(part.get("text")) or "" for part in parts)
        if all(isinstance(item, str) for item in items):
            return "".join(items)
    return as_text(value)[0]


def refusal(message: dict[str, Any]) -> str | None:
    """The words with which the model declined: `refusal`, or a content part of that type."""
    content = message.get("content")
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    texts = [message.get("refusal"), *(part.get("refusal") for part in parts)]
    return "".join(text for text in texts if isinstance(text, str)) or None


def function_call(value: Any) -> FunctionCall | None:
    if not isinstance(value, dict):
        return None
    arguments = value.get("arguments")
    if isinstance(arguments, dict):  # some servers send the object itself (practice)
        arguments, _ = as_text(arguments)
    return FunctionCall(text(value.get("name")), text(arguments))


def as_text(value: Any) -> tuple[str | None, bool]:
    """JSON text, and whether it could be made: what can just be decoded can't always be encoded."""
    try:
        return msgspec.json.encode(value).decode(), True
    except (RecursionError, UnicodeEncodeError):  # half a surrogate pair in a piece of a stream
        return None, False


def index(value: dict[str, Any], otherwise: int) -> int:
    """The number that a choice or a call gives itself."""
    index = usages.count(value.get("index"))
    return otherwise if index is None else index


def delta(choice: dict[str, Any]) -> dict[str, Any] | None:
    """A choice's delta; some gateways send the whole message in one event instead."""
    for delta in (choice.get("delta"), choice.get("message")):
        if isinstance(delta, dict):
            return delta
    return None


_PASSED_AS = {"function": "arguments", "custom": "input"}
"""The kinds of tools, and what a call of each passes."""


class _Called(msgspec.Struct):
    """The call in a stream's deltas: a name, and the pieces of its arguments."""

    name: str = ""
    passed: list[str] = []

    def add(self, piece: dict[str, Any]) -> None:
        name = text(piece.get("name")) or ""
        if name != self.name:  # some servers repeat it in every piece
            self.name += name
        passed = piece.get("arguments", piece.get("input"))
        if isinstance(passed, dict):
            passed, _ = as_text(passed)
        self.passed.append(text(passed) or "")


class _ToolCall(msgspec.Struct):
    """One call of a tool in a stream's deltas: the fields that are sent once, and the pieces of its arguments."""

    once: dict[str, Any] = {}
    called: dict[str, _Called] = {}

    def is_another(self, piece: dict[str, Any]) -> bool:
        """True for the beginning of another call: it has a name and another id. An id alone says nothing:
        servers were seen that draw one for each piece.
        """
        named = any(isinstance(part := piece.get(kind), dict) and part.get("name") for kind in _PASSED_AS)
        ids = piece.get("id"), self.once.get("id")
        return named and None not in ids and ids[0] != ids[1]

    def add(self, piece: dict[str, Any]) -> None:
        for name, value in piece.items():
            if value not in (None, "") and name != "index":
                self.once.setdefault(name, value)  # the first id that it was given counts
        for kind in _PASSED_AS:
            if isinstance(part := piece.get(kind), dict):
                self.called.setdefault(kind, _Called()).add(part)


class Message:
    """The message that a stream's deltas add up to; fields that no delta has stay null."""

    def __init__(self) -> None:
        self._contents: list[str] = []
        self._chars = 0
        self._refusals: list[str] = []
        self._call: _Called | None = None
        self._tool_calls: dict[int, list[_ToolCall]] = {}

    def add(self, delta: dict[str, Any], *, is_message: bool = False) -> None:
        """`is_message`: it is a whole message, which may repeat all earlier text."""
        if (text := content(delta.get("content"))) is not None:
            if is_message and len(text) >= self._chars > 0 and text.startswith("".join(self._contents)):
                self._contents, self._chars = [], 0
            self._contents.append(text)
            self._chars += len(text)
        if (declined := refusal(delta)) is not None:
            self._refusals.append(declined)
        if isinstance(call := delta.get("function_call"), dict):
            self._call = self._call or _Called()
            self._call.add(call)
        tool_calls = delta.get("tool_calls")
        for place, piece in enumerate(tool_calls if isinstance(tool_calls, list) else ()):
            if isinstance(piece, dict) and (number := index(piece, place)) < MAX_CALLS:
                # Most servers number their calls; some give each the same number and distinguish them by id alone.
                calls = self._tool_calls.setdefault(number, [])
                if not calls or calls[-1].is_another(piece):
                    calls.append(_ToolCall())
                calls[-1].add(piece)

    def whole(self) -> dict[str, Any]:
        message: dict[str, Any] = {
            "content": "".join(self._contents) if self._contents else None,
            "refusal": "".join(self._refusals),
        }
        if (call := self._call) is not None:
            message["function_call"] = {"name": call.name, "arguments": "".join(call.passed)}
        if self._tool_calls:
            message["tool_calls"] = [
                call.once
                | {
                    kind: {"name": called.name, _PASSED_AS[kind]: "".join(called.passed)}
                    for kind, called in call.called.items()
                }
                for _, calls in sorted(self._tool_calls.items())
                for call in calls
            ]
        return message
