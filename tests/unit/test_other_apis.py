"""Which API an answer comes from that is no chat completion."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.response import other_apis

WHOLE: dict[str, Any] = {
    "Ollama's own API": {"model": "llama3.2", "response": "Hi", "done": True, "context": [1], "eval_count": 298},
    "Bedrock's Converse API": {"output": {"message": {"content": [{"text": "Hi"}]}}, "stopReason": "end_turn"},
    "Cohere's own API": {"text": "Hi", "generation_id": "x", "finish_reason": "COMPLETE"},
    "Alibaba's DashScope API": {"output": {"text": "Hi", "finish_reason": "stop"}, "request_id": "x"},
    "llama.cpp's own API": {"content": "Hi", "stop": True, "tokens_predicted": 10},
    "Hugging Face's text generation": [{"generated_text": "Hi"}],
    "a prediction API of Vertex AI or TensorFlow": {"predictions": ["Hi"]},
    "Replicate's predictions": {"id": "x", "status": "starting", "urls": {"get": "https://…"}, "output": None},
    "an embeddings API": {"object": "list", "data": [{"object": "embedding", "embedding": [0.1]}]},
}


@pytest.mark.parametrize("name", WHOLE)
def test_an_answer_names_its_api(name: str) -> None:
    api = other_apis.recognised(json.dumps(WHOLE[name]).encode())
    assert api is not None
    assert (api.name, bool(api.fix)) == (name, True)
    assert other_apis.named_in(f"HTTP 200: … {other_apis.COMES_FROM} {name}: …") is api


@pytest.mark.parametrize(
    ("stream", "name"),
    [
        (b'event: message_start\ndata: {"type":"message_start","message":{"id":"m"}}\n\n', "Anthropic's Messages API"),
        (b'{"model":"l","message":{"content":"H"},"done":false}\n{"model":"l","done":true}\n', "Ollama's own API"),
        (b'data: {"candidates":[{"content":{"parts":[{"text":"Hi"}]}}]}\n\n', "Google's Gemini API"),
    ],
)
def test_a_stream_names_its_api(stream: bytes, name: str) -> None:
    api = other_apis.recognised(stream)
    assert api is not None
    assert api.name == name


@pytest.mark.parametrize(
    "body",
    [
        b'{"choices":[]}',
        b'{"id":"c","object":"chat.completion","choices":[{"message":null}]}',
        b'{"message":"overloaded"}',
        b'{"data":[]}',
        b'{"model":"llama3.2","done":true',
        b"Hello! How can I help?",
        b"",
        b"[]",
        b"null",
    ],
)
def test_other_bodies_belong_to_no_api(body: bytes) -> None:
    assert other_apis.recognised(body) is None


@given(st.binary(max_size=200))
def test_any_bytes_can_be_looked_at(body: bytes) -> None:
    assert other_apis.recognised(body) in (None, *other_apis.APIS)
