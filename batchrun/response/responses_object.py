"""The answers of the Responses API as the chat completions that say the same. PURE.

Source: developers.openai.com, the reference of `POST /responses` and its streaming events. Stored answers keep the
server's own bytes; only reading them goes through here, so a file of either API is read without knowing which it was.
"""

import re
from typing import Any

Body = dict[str, Any]

ENDS = frozenset({"response.completed", "response.incomplete", "response.failed"})
"""The types of the events that end a stream. Each holds the whole response."""

_END = re.compile(rb'"type"\s*:\s*"response\.(?:completed|incomplete|failed)"')
"""In the data of a stream's last event. A quote within a text is escaped, so no text of a model's can hold it."""

_FINISH_REASONS = {"max_output_tokens": "length", "content_filter": "content_filter"}
"""`incomplete_details.reason` as the finish_reason of a chat completion."""


def ends(data: bytes) -> bool:
    """True for the data of the event that ends a stream."""
    return b'"response.' in data and _END.search(data) is not None


def is_response(decoded: Body) -> bool:
    return "choices" not in decoded and (
        decoded.get("object") == "response" or (isinstance(decoded.get("output"), list) and "status" in decoded)
    )


def as_completion(response: Body) -> Body:
    """The response as a chat completion. One that failed or is still in progress has its error and no choice."""
    kept = ("id", "model", "usage", "service_tier", "output")  # the output says which tools the server called
    body: Body = {name: response[name] for name in kept if name in response}
    body["created"] = response.get("created_at")
    status = response.get("status", "completed")
    if response.get("error"):
        return {**body, "error": response["error"]}
    if status not in ("completed", "incomplete"):
        return {**body, "error": {"message": f"the response has the status {status!r:.60}", "code": status}}
    message = _message(response.get("output"))
    finish_reason = "tool_calls" if "tool_calls" in message else "stop"
    if status == "incomplete":
        details = response.get("incomplete_details")
        reason = details.get("reason") if isinstance(details, dict) else None
        finish_reason = _FINISH_REASONS.get(str(reason), str(reason or "incomplete"))
    return {**body, "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}]}


def as_chunk(event: Body) -> Body:
    """An event of a stream as the chunk of a chat completion's stream; empty for one that adds nothing.

    The event that ends a stream holds the whole answer, as `message`: it counts instead of the deltas.
    """
    kind, delta = event.get("type"), event.get("delta")
    match kind:
        case "response.output_text.delta":
            return _delta({"content": delta})
        case "response.refusal.delta":
            return _delta({"refusal": delta})
        case "response.output_item.added" if isinstance(item := event.get("item"), dict):
            if item.get("type") != "function_call":
                return {}
            function = {"name": item.get("name"), "arguments": item.get("arguments") or ""}
            numbered = {"index": event.get("output_index"), "id": item.get("call_id")}
            return _delta({"tool_calls": [{**numbered, "type": "function", "function": function}]})
        case "response.function_call_arguments.delta":
            piece = {"index": event.get("output_index"), "function": {"arguments": delta}}
            return _delta({"tool_calls": [piece]})
        case "response.created" | "response.completed" | "response.incomplete" | "response.failed":
            response = event.get("response")
            if not isinstance(response, dict):
                return {}
            if kind == "response.created":  # names and times, in case that the stream is cut
                return {"id": response.get("id"), "model": response.get("model"), "created": response.get("created_at")}
            return as_completion(response)
    return {}


def _delta(delta: Body) -> Body:
    return {"choices": [{"index": 0, "delta": delta}]}


def _message(output: Any) -> Body:
    """The joined items of `output`: the text of its messages and the calls of functions. Reasoning, and
    what tools of the server's did, stay in the raw answer.
    """
    texts: list[str] = []
    refusals: list[str] = []
    calls: list[Body] = []
    for item in output if isinstance(output, list) else ():
        if not isinstance(item, dict):
            continue
        if item.get("type") == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            calls.append({"id": item.get("call_id"), "type": "function", "function": function})
        content = item.get("content")
        for part in content if item.get("type") == "message" and isinstance(content, list) else ():
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                texts.append(part["text"])
            elif isinstance(part, dict) and isinstance(part.get("refusal"), str):
                refusals.append(part["refusal"])
    message: Body = {"role": "assistant", "content": "".join(texts) if texts else None}
    if refusals:
        message["refusal"] = "".join(refusals)
    if calls:
        message["tool_calls"] = calls
    return message
