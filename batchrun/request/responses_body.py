"""The body of a chat completion as the body of the Responses API that asks the same. PURE.

Source: developers.openai.com, "Migrate to the Responses API" and the reference of `POST /responses`. What both APIs
have under one name (`temperature`, `top_p`, `metadata`, `service_tier`, `parallel_tool_calls`, …) passes unchanged.
"""

from collections.abc import Iterator
from typing import Any

from batchrun.errors import InputError
from batchrun.job.fields import CHAT_ONLY

Body = dict[str, Any]

_RENAMED = {"max_tokens": "max_output_tokens", "max_completion_tokens": "max_output_tokens"}


def responses_body(chat: Body) -> Body:
    """The body for `/responses`. `store = false` keeps the server from storing the answer, as with a chat
    completion; `request.extra.store` overrides it.

    Raises:
        InputError: the chat body says something that the Responses API has no field for.
    """
    body: Body = {"model": chat["model"], "input": list(_items(chat["messages"])), "store": False}
    for name, value in chat.items():
        if name in CHAT_ONLY:
            raise InputError(f"{name}: the Responses API has no such field; leave it out")
        match name:
            case "model" | "messages":
                pass
            case "reasoning_effort":
                body["reasoning"] = {"effort": value}
            case "response_format":
                schema = value.get("json_schema")  # flat here: a schema is beside its type, not below it
                flat = {"type": value["type"], **schema} if isinstance(schema, dict) else value
                body.setdefault("text", {})["format"] = flat
            case "verbosity":
                body.setdefault("text", {})["verbosity"] = value
            case "functions":
                body["tools"] = [*body.get("tools", ()), *({"type": "function", **each} for each in value)]
            case "tools":
                body["tools"] = [*body.get("tools", ()), *map(_tool, value)]
            case "function_call":
                body["tool_choice"] = {"type": "function", **value} if isinstance(value, dict) else value
            case "tool_choice":
                body["tool_choice"] = _tool(value) if isinstance(value, dict) else value
            case _:
                body[_RENAMED.get(name, name)] = value
    return body


def append_message(body: Body, role: str, content: str) -> None:
    """Adds one message of text to a body of either API."""
    body["input" if "input" in body else "messages"].append({"role": role, "content": content})


def _items(messages: list[Any]) -> Iterator[Body]:
    """The items of `input`. A call and its result are separate items, not parts of a message."""
    for place, message in enumerate(messages):
        role, content = message["role"], message.get("content")
        if role == "tool":
            yield {"type": "function_call_output", "call_id": message["tool_call_id"], "output": content}
            continue
        if role == "function":  # the older form has no ids: a result belongs to the last call of that name
            yield {"type": "function_call_output", "call_id": f"call_{message['name']}", "output": content or ""}
            continue
        parts = _parts(content, role, f"messages[{place}].content")
        if isinstance(message.get("refusal"), str):
            parts = [*([] if isinstance(parts, str) else parts), {"type": "refusal", "refusal": message["refusal"]}]
        if parts:
            yield {"role": role, "content": parts}
        for call in message.get("tool_calls") or ():
            yield {"type": "function_call", "call_id": call["id"], **call["function"]}
        if isinstance(call := message.get("function_call"), dict):
            yield {"type": "function_call", "call_id": f"call_{call['name']}", **call}


def _parts(content: Any, role: str, place: str) -> str | list[Body]:
    """Text as it is; parts under the names that the Responses API has for them."""
    if not isinstance(content, list):
        return content or ""
    parts: list[Body] = []
    for part in content:
        match part:
            case {"type": "text", "text": text}:
                parts.append({"type": "output_text" if role == "assistant" else "input_text", "text": text})
            case {"type": "image_url", "image_url": image}:
                source = image if isinstance(image, dict) else {"url": image}
                detail = {"detail": source["detail"]} if source.get("detail") else {}
                parts.append({"type": "input_image", "image_url": source["url"], **detail})
            case {"type": "refusal" | "input_text" | "input_image" | "input_file"}:
                parts.append(part)
            case _:
                kind = part.get("type") if isinstance(part, dict) else part
                raise InputError(f"{place}: the Responses API has no part of the type {kind!r:.80}")
    return parts


def _tool(tool: Any) -> Any:
    """A function's tool, or the choice of one, is flat in the Responses API; other kinds stay as they are."""
    if isinstance(tool, dict) and isinstance(inner := tool.get(tool.get("type")), dict):
        return {"type": tool["type"], **inner}
    return tool
