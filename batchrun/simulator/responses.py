"""The Responses API over the same simulated model: requests become those of chat completions, answers come back. PURE.

Source: developers.openai.com, the reference of `POST /responses` and its streaming events. One question has one answer
in both dialects, and one line in the ledger.
"""

from collections.abc import Iterator
from typing import Any

import msgspec

from batchrun.simulator.answers import Answer
from batchrun.simulator.refusal import Refused
from batchrun.simulator.render import Envelope, call_object, pieces

Fields = dict[str, Any]

_encode = msgspec.json.Encoder().encode

_SAME = frozenset(
    {"model", "temperature", "top_p", "stream", "service_tier", "metadata", "user", "parallel_tool_calls", "store"}
    | {"prompt_cache_key"}
)
_ROLES = ("user", "assistant", "system", "developer")


def as_chat(fields: Fields) -> Fields:
    """The same request as fields of a chat completion.

    Raises:
        Refused: 400, a field that the API does not have, or an item that has no known form.
    """
    given = fields.get("input")
    if isinstance(given, str):
        chat: Fields = {"messages": [{"role": "user", "content": given}]}
    elif isinstance(given, list) and given:
        chat = {"messages": [_message(item, f"input[{place}]") for place, item in enumerate(given)]}
    else:
        raise Refused(400, "input: expected a text or a list of items", code="invalid_type", param="input")
    if (instructions := fields.get("instructions")) is not None:
        chat["messages"].insert(0, {"role": "system", "content": instructions})
    for name, value in fields.items():
        match name:
            case "input" | "instructions" | "store":
                pass
            case "reasoning" | "text" if not isinstance(value, dict):
                raise Refused(400, f"Invalid type for {name!r}: expected an object", code="invalid_type", param=name)
            case "max_output_tokens":
                chat["max_tokens"] = value
            case "reasoning":
                chat["reasoning_effort"] = value.get("effort")
            case "text":
                form = value.get("format")
                if isinstance(form, dict) and form.get("type") == "json_schema":
                    schema = {name: value for name, value in form.items() if name != "type"}
                    chat["response_format"] = {"type": "json_schema", "json_schema": schema}
                elif isinstance(form, dict):
                    chat["response_format"] = form
            case "tools":
                chat["tools"] = [_nested(tool) for tool in value] if isinstance(value, list) else value
            case "tool_choice":
                chat["tool_choice"] = _nested(value) if isinstance(value, dict) else value
            case _ if name in _SAME:
                chat[name] = value
            case _:
                raise Refused(400, f"Unknown parameter: {name!r}", code="unknown_parameter", param=name)
    if fields.get("stream"):
        chat["stream_options"] = {"include_usage": True}  # the last event always has it
    return chat


def response(answer: Answer, envelope: Envelope) -> bytes:
    return _encode(_whole(answer, envelope))


def events(answer: Answer, envelope: Envelope) -> tuple[bytes, ...]:
    """The server-sent events: created, the items with their deltas, and the whole response in the last one."""
    whole = _whole(answer, envelope)
    first = {**whole, "status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    named: list[Fields] = [{"type": "response.created", "response": first}]
    for place, item in enumerate(whole["output"]):
        named += _of_item(place, item)
    named.append({"type": f"response.{whole['status']}", "response": whole})
    return tuple(
        b"event: %b\ndata: %b\n\n" % (event["type"].encode(), _encode({**event, "sequence_number": number}))
        for number, event in enumerate(named)
    )


def _message(item: Any, place: str) -> Fields:
    match item:
        case {"type": "function_call", "call_id": str(id_), "name": name, "arguments": arguments}:
            call = {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}
            return {"role": "assistant", "content": None, "tool_calls": [call]}
        case {"type": "function_call_output", "call_id": str(id_), "output": output}:
            return {"role": "tool", "tool_call_id": id_, "content": output}
        case {"role": role, "content": content} if role in _ROLES and item.get("type", "message") == "message":
            if not isinstance(content, list):
                return {"role": role, "content": content}
            return {"role": role, "content": [_part(part, f"{place}.content") for part in content]}
    raise Refused(400, f"Invalid value: {place} is not an item of a known type", code="invalid_value", param=place)


def _part(part: Any, place: str) -> Fields:
    match part:
        case {"type": "input_text" | "output_text", "text": text}:
            return {"type": "text", "text": text}
        case {"type": "input_image", "image_url": url}:
            return {"type": "image_url", "image_url": {"url": url, "detail": part.get("detail", "auto")}}
        case {"type": "refusal", "refusal": text}:
            return {"type": "refusal", "refusal": text}
    raise Refused(400, f"Invalid value: {place} has a part of no known type", code="invalid_value")


def _nested(tool: Any) -> Any:
    """A function's tool, or the choice of one, as a chat completion has it."""
    if isinstance(tool, dict) and tool.get("type") == "function" and "function" not in tool:
        return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}
    return tool


def _whole(answer: Answer, envelope: Envelope) -> Fields:
    choice = answer.choices[0]
    reason = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(choice.finish_reason)
    output: list[Fields] = []
    if choice.content is not None:
        part = {"type": "output_text", "text": choice.content, "annotations": []}
        status = "incomplete" if reason else "completed"
        message_id = envelope.id.replace("resp_", "msg_")
        output.append({"id": message_id, "type": "message", "status": status, "role": "assistant", "content": [part]})
    if (called := choice.tool_call or choice.function_call) is not None:
        call = call_object(called, called.arguments)
        item = {"id": call["id"].replace("call_", "fc_"), "type": "function_call", "status": "completed"}
        output.append({**item, "call_id": call["id"], **call["function"]})
    usage = answer.usage
    return {
        "id": envelope.id,
        "object": "response",
        "created_at": envelope.created,
        "status": "incomplete" if reason else "completed",
        "error": None,
        "incomplete_details": {"reason": reason} if reason else None,
        "instructions": None,
        "metadata": {},
        "model": envelope.model,
        "output": output,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        **({} if envelope.service_tier is None else {"service_tier": envelope.service_tier}),
        "usage": {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        if envelope.with_usage
        else None,
    }


def _of_item(place: int, item: Fields) -> Iterator[Fields]:
    """The events of one item: added, its text or arguments in pieces, done."""
    about = {"output_index": place, "item_id": item["id"]}
    added = {"type": "response.output_item.added", "output_index": place}
    if item["type"] == "function_call":
        yield {**added, "item": {**item, "arguments": "", "status": "in_progress"}}
        for piece in pieces(item["arguments"]):
            yield {"type": "response.function_call_arguments.delta", **about, "delta": piece}
        yield {"type": "response.function_call_arguments.done", **about, "arguments": item["arguments"]}
    else:
        yield {**added, "item": {**item, "content": [], "status": "in_progress"}}
        part = item["content"][0]
        about |= {"content_index": 0}
        yield {"type": "response.content_part.added", **about, "part": {**part, "text": ""}}
        for piece in pieces(part["text"]):
            yield {"type": "response.output_text.delta", **about, "delta": piece, "logprobs": []}
        yield {"type": "response.output_text.done", **about, "text": part["text"], "logprobs": []}
        yield {"type": "response.content_part.done", **about, "part": part}
    yield {"type": "response.output_item.done", "output_index": place, "item": item}
