"""Answers in the shapes that other servers are documented to give, over raw sockets, through a whole run.

vLLM: docs.vllm.ai, "Reasoning Outputs" (`reasoning_content`, since called `reasoning`) and its protocol page. LiteLLM:
docs.litellm.ai, "Output" and "Streaming". Both write null for what they do not have, where others leave it out.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tests.cli_process import batchrun, read_summary
from tests.fault_server import Exchange, answer, serving
from tests.jobs import write_lines

THOUGHT = "They want a word."

_VLLM_MESSAGE: dict[str, object] = {
    "role": "assistant",
    "content": "Fine.",
    "refusal": None,
    "annotations": None,
    "audio": None,
    "function_call": None,
    "tool_calls": [],
}


def vllm(finish_reason: str = "stop", **message: object) -> dict[str, Any]:
    """A whole answer as vLLM writes it."""
    choice = {"index": 0, "message": {**_VLLM_MESSAGE, **message}, "logprobs": None, "finish_reason": finish_reason}
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_750_000_000,
        "model": "qwen",
        "choices": [{**choice, "stop_reason": None, "token_ids": None}],
        "service_tier": None,
        "system_fingerprint": None,
        "usage": {"prompt_tokens": 12, "total_tokens": 20, "completion_tokens": 8, "prompt_tokens_details": None},
        "prompt_logprobs": None,
        "prompt_token_ids": None,
        "kv_transfer_params": None,
    }


LITELLM = {
    "id": "chatcmpl-2",
    "created": 1_750_000_000,
    "model": "qwen",
    "object": "chat.completion",
    "system_fingerprint": None,
    "choices": [
        {
            "finish_reason": "stop",
            "index": 0,
            "message": {
                "content": "Fine.",
                "role": "assistant",
                "tool_calls": None,
                "function_call": None,
                "reasoning_content": THOUGHT,
                "thinking_blocks": [{"type": "thinking", "thinking": THOUGHT, "signature": "x"}],
                "provider_specific_fields": {"refusal": None},
            },
        }
    ],
    "usage": {
        "completion_tokens": 8,
        "prompt_tokens": 12,
        "total_tokens": 20,
        "completion_tokens_details": {"reasoning_tokens": 5, "audio_tokens": None, "text_tokens": None},
        "prompt_tokens_details": {"cached_tokens": None, "audio_tokens": None},
        "cache_creation_input_tokens": 0,
    },
    "service_tier": None,
}


def stream() -> bytes:
    """The same as events: reasoning first, a null usage in every chunk but the last."""
    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": "", "reasoning_content": None},
        {"reasoning_content": THOUGHT},
        {"content": "Fi", "tool_calls": [], "function_call": None},
        {"content": "ne."},
    ]
    base = {"id": "chatcmpl-3", "object": "chat.completion.chunk", "created": 1_750_000_000, "model": "qwen"}
    chunks: list[dict[str, Any]] = [
        {**base, "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}], "usage": None}
        for delta in deltas
    ]
    chunks.append(
        {**base, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "stop_reason": None}], "usage": None}
    )
    chunks.append({**base, "choices": [], "usage": vllm()["usage"]})
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"


ANSWERS: dict[str, dict[str, Any]] = {
    "plain": vllm(),
    "reasoning_content": vllm(reasoning_content=THOUGHT),
    "reasoning": vllm(reasoning=THOUGHT),
    "only reasoning": vllm("length", content=None, reasoning=THOUGHT),
    "litellm": LITELLM,
}

JOB = """
[endpoint]
url = "{url}"
name = "other"
auth = "none"
max_tokens_field = "max_completion_tokens"

[input]
path = "{source}"

[request]
model = "qwen"
prompt = "{{{{ shape }}}}"
max_tokens = 8
stream = {stream}

[output]
raw = "always"
"""


async def rows_from(tmp_path: Path, *, stream_wanted: bool) -> tuple[list[dict[str, Any]], list[Exchange], Any]:
    """The rows of a run over every shape, what the server was sent, and the summary."""

    async def script(exchange: Exchange) -> None:
        shape = json.loads(exchange.body)["messages"][0]["content"]
        if stream_wanted:
            head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
            await exchange.send(head + stream())
            exchange.writer.close()
        else:
            await exchange.send(answer(json.dumps(ANSWERS[shape]).encode()))

    source = write_lines(tmp_path / "in.jsonl", [{"shape": shape} for shape in ANSWERS])
    async with serving(script) as server:
        job, out = tmp_path / "job.toml", tmp_path / "out"
        job.write_text(JOB.format(url=server.url, source=source, stream=str(stream_wanted).lower()))
        ended = await asyncio.to_thread(batchrun, "run", job, "-o", out)
    assert ended.exit_code == 0, ended.stderr
    return pq.read_table(out / "completions.parquet").to_pylist(), server.exchanges, read_summary(out)


def test_answers_of_other_servers_are_read(tmp_path: Path) -> None:
    """With their usage, and without the model's reasoning in the content."""
    rows, exchanges, summary = asyncio.run(rows_from(tmp_path, stream_wanted=False))
    for row in rows:
        only_thought = row["shape"] == "only reasoning"
        assert (row["status"], row["content"]) == (("truncated", None) if only_thought else ("ok", "Fine.")), row
        assert (row["prompt_tokens"], row["completion_tokens"], row["total_tokens"]) == (12, 8, 20)
        assert (row["cached_tokens"], row["reasoning_tokens"]) == (None, 5 if row["shape"] == "litellm" else None)
        assert row["function_call"] is None
        assert row["model"] == "qwen"
        assert (THOUGHT in row["raw"].decode()) == (row["shape"] != "plain")
    assert summary["without_usage"] == 0
    assert all(b"authorization" not in exchange.head.lower() for exchange in exchanges)
    bodies = [json.loads(exchange.body) for exchange in exchanges]
    assert {(body["max_completion_tokens"], "max_tokens" in body) for body in bodies} == {(8, False)}


def test_streams_of_other_servers_are_read(tmp_path: Path) -> None:
    """With their usage, and without the model's reasoning in the content."""
    rows, _, summary = asyncio.run(rows_from(tmp_path, stream_wanted=True))
    for row in rows:
        assert (row["status"], row["content"], row["finish_reason"]) == ("ok", "Fine.", "stop")
        assert (row["prompt_tokens"], row["completion_tokens"], row["cached_tokens"]) == (12, 8, None)
        assert row["function_call"] is None
    assert summary["without_usage"] == 0
