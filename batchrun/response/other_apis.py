"""Recognises an answer of another API than chat completions, by the fields that only this API's answers have. PURE.

Such an answer is whole and sound, and no request of the run will get another: the address is wrong, or a proxy behind
it. It may have been billed. The shapes are those of the vendors' own references.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from batchrun.response import packed


class Api(NamedTuple):
    """Another API. `fix`: the base URL of the same server's or vendor's chat completions, or another advice."""

    name: str
    fix: str
    is_of: Callable[[Mapping[str, Any]], bool]


def _has(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda body: all(name in body for name in names)


def _holds(name: str, *fields: str) -> Callable[[Mapping[str, Any]], bool]:
    """True for an object in that place which has the fields."""
    return lambda body: isinstance(inside := body.get(name), dict) and all(field in inside for field in fields)


def _is_of_cohere(body: Mapping[str, Any]) -> bool:
    message = body.get("message")
    answers = isinstance(message, dict) and isinstance(message.get("content"), list) and "finish_reason" in body
    return answers or "generation_id" in body


def _lists(name: str, field: str) -> Callable[[Mapping[str, Any]], bool]:
    """True for a list of objects that have the field."""

    def is_of(body: Mapping[str, Any]) -> bool:
        values = body.get(name)
        return isinstance(values, list) and bool(values) and isinstance(values[0], dict) and field in values[0]

    return is_of


APIS = (
    Api(
        "Ollama's own API", "http://HOST:11434/v1", lambda body: isinstance(body.get("done"), bool) and "model" in body
    ),
    Api(
        "Anthropic's Messages API",
        "https://api.anthropic.com/v1",
        lambda body: body.get("type") in ("message", "message_start") and ("stop_reason" in body or "message" in body),
    ),
    Api(
        "Google's Gemini API",
        "https://generativelanguage.googleapis.com/v1beta/openai",
        _lists("candidates", "content"),
    ),
    Api(
        "Cohere's own API",
        "https://api.cohere.ai/compatibility/v1",
        _is_of_cohere,
    ),
    Api(
        "Bedrock's Converse API",
        "https://bedrock-runtime.REGION.amazonaws.com/openai/v1",
        lambda body: "stopReason" in body and _holds("output", "message")(body),
    ),
    Api(
        "Alibaba's DashScope API",
        "https://dashscope-intl.aliyuncs.com/compatible-mode/v1",
        _holds("output", "text", "finish_reason"),
    ),
    Api("llama.cpp's own API", "http://HOST:8080/v1", _has("content", "stop", "tokens_predicted")),
    Api(
        "Hugging Face's text generation",
        "https://router.huggingface.co/v1, or your server's /v1",
        _has("generated_text"),
    ),
    Api("a prediction API of Vertex AI or TensorFlow", "a base URL of chat completions", _has("predictions")),
    Api("Replicate's predictions", "the address of a gateway with chat completions", _has("urls", "status", "output")),
    Api("an embeddings API", "the base URL without /embeddings", _lists("data", "embedding")),
    Api(
        "a list of models",
        "the base URL without /models",
        lambda body: body.get("object") == "list" and _lists("data", "object")(body),
    ),
)
"""The first that matches counts."""

COMES_FROM = "but comes from"
"""Stands before the API's name in the error of a row."""


def recognised(stored: bytes) -> Api | None:
    """The other API that an answer in its stored form comes from; None: none that is known.

    The first JSON value decides: an object, the first one of a list, or that of a stream's first event.
    """
    text = b"".join(packed.pieces(stored)).decode("utf-8-sig", "replace").lstrip()
    if not text.startswith(("{", "[")):
        data = next((line for line in text.splitlines() if line.startswith("data:")), "")
        text = data.removeprefix("data:").lstrip()
    try:
        value, _ = json.JSONDecoder(strict=False).raw_decode(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, list) and value:
        value = value[0]
    return next((api for api in APIS if api.is_of(value)), None) if isinstance(value, dict) else None


def named_in(reason: str) -> Api | None:
    """The other API that the error of a row names."""
    return next((api for api in APIS if f"{COMES_FROM} {api.name}:" in reason), None)
