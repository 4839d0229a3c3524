"""Answers as bytes: the completion object and the stream of docs/api.md, "Response". PURE."""

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import msgspec

from batchrun.simulator.answers import Answer, Choice, FunctionCall, Usage
from batchrun.simulator.tokens import BYTES_PER_TOKEN

DELTA_TOKENS = 4  # how much text a chunk carries
_DELTA_CHARACTERS = DELTA_TOKENS * BYTES_PER_TOKEN
_encode = msgspec.json.Encoder().encode


class Envelope(msgspec.Struct, frozen=True):
    """The fields around the choices; `created` is Unix time in seconds."""

    id: str
    created: int
    model: str
    with_usage: bool
    service_tier: str | None = None


def completion(answer: Answer, envelope: Envelope) -> bytes:
    choices: list[dict[str, Any]] = []
    for index, choice in enumerate(answer.choices):
        message: dict[str, Any] = {"role": "assistant", "content": choice.content}
        if choice.tool_call:
            message["tool_calls"] = [call_object(choice.tool_call, choice.tool_call.arguments)]
        elif choice.function_call:
            message["function_call"] = choice.function_call
        choices.append({"index": index, "message": message, "logprobs": None, "finish_reason": choice.finish_reason})
    whole = _head(envelope, "chat.completion") | {"choices": choices}
    return _encode(whole | {"usage": _usage(answer.usage)} if envelope.with_usage else whole)


def events(answer: Answer, envelope: Envelope) -> tuple[bytes, ...]:
    """The server-sent events: for each choice the role, its text in pieces and the finish; then usage, `[DONE]`."""
    head = _head(envelope, "chat.completion.chunk")
    chunks = [
        head | {"choices": [{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}]}
        for index, choice in enumerate(answer.choices)
        for delta, finish_reason in _deltas(choice)
    ]
    if envelope.with_usage:
        chunks.append(head | {"choices": [], "usage": _usage(answer.usage)})
    return (*(b"data: %b\n\n" % _encode(chunk) for chunk in chunks), b"data: [DONE]\n\n")


def _head(envelope: Envelope, kind: str) -> dict[str, Any]:
    head = {"id": envelope.id, "object": kind, "created": envelope.created, "model": envelope.model}
    return head if envelope.service_tier is None else head | {"service_tier": envelope.service_tier}


def call_object(call: FunctionCall, arguments: str) -> dict[str, Any]:
    """The call as it is sent; its id depends on its text alone, so that the same answer has the same id."""
    identity = blake2b(f"{call.name} {call.arguments}".encode(), digest_size=9).hexdigest()
    return {"id": f"call_{identity}", "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _deltas(choice: Choice) -> Iterator[tuple[dict[str, Any], str | None]]:
    call = choice.function_call
    if (tool_call := choice.tool_call) is not None:
        named_tool = {"index": 0, **call_object(tool_call, "")}
        yield {"role": "assistant", "content": None, "tool_calls": [named_tool]}, None
        for piece in pieces(tool_call.arguments):
            yield {"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}, None
    elif call is None:
        yield {"role": "assistant", "content": ""}, None
        yield from (({"content": piece}, None) for piece in pieces(choice.content or ""))
    else:
        named = {"name": call.name, "arguments": ""}
        yield {"role": "assistant", "content": None, "function_call": named}, None
        yield from (({"function_call": {"arguments": piece}}, None) for piece in pieces(call.arguments))
    yield {}, choice.finish_reason


def pieces(text: str) -> Iterator[str]:
    """A text as the deltas of a stream carry it."""
    return (text[start : start + _DELTA_CHARACTERS] for start in range(0, len(text), _DELTA_CHARACTERS))


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }
