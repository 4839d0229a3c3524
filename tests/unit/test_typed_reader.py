"""The typed reader of the common answer agrees with the careful one wherever it accepts, and accepts what is common."""

import copy
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from batchrun.response import answer as answers
from batchrun.response.chat_completion import parse_typed

PLAIN: dict[str, Any] = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1_760_000_000,
    "model": "vtrix-gpt-5.3-codex",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Fine.", "refusal": None, "annotations": []},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": {
        "prompt_tokens": 20,
        "completion_tokens": 5,
        "total_tokens": 25,
        "prompt_tokens_details": {"cached_tokens": 8, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 2, "accepted_prediction_tokens": 0},
    },
    "system_fingerprint": "fp",
}

PLACES: list[tuple[str | int, ...]] = [
    *((name,) for name in (*PLAIN, "service_tier", "error", "provider_metadata", "usageMetadata", "x_groq")),
    *(("choices", 0, name) for name in ("message", "finish_reason", "error", "usage", "index")),
    *(("choices", 0, "message", name) for name in ("content", "refusal", "tool_calls", "function_call", "reasoning")),
    *(("usage", name) for name in (*PLAIN["usage"], "cost", "cached_tokens", "prompt_cache_hit_tokens")),
    *(("usage", "prompt_tokens_details", name) for name in ("cached_tokens", "cache_write_tokens", "text_tokens")),
    ("usage", "prompt_tokens_details", "cache_read_input_tokens"),
    *(("usage", "completion_tokens_details", name) for name in ("reasoning_tokens", "audio_tokens")),
]

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1, 40),
    st.sampled_from([10**9, 10**9 + 1, 2**63, 253_402_300_800, 1.0, 20.0, 1.5, "", "5", "stop", "error", "default"]),
    st.text(max_size=5),
)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=8), inner))
REMOVED = object()


def changed(changes: list[tuple[tuple[str | int, ...], Any]]) -> dict[str, Any]:
    """The plain answer with other values at these places, where they are still there."""
    body: Any = copy.deepcopy(PLAIN)
    for place, value in changes:
        inside = body
        try:
            for name in place[:-1]:
                inside = inside[name]
            if value is REMOVED:
                del inside[place[-1]]
            else:
                inside[place[-1]] = value
        except (KeyError, IndexError, TypeError):
            continue
    return dict(body)


@given(st.lists(st.tuples(st.sampled_from(PLACES), VALUES | st.just(REMOVED)), max_size=3))
@example([(("created",), 1.0)])
@example([(("usage", "total_tokens"), 1_000_000)])
@example([(("usage", "total_tokens"), 25 + 65_536)])
@example([(("usage", "total_tokens"), 25 + 65_537)])
@example([(("usage", "prompt_tokens_details", "cache_read_input_tokens"), 8)])
@example([(("usage", "total_tokens"), 33)])
@example([(("choices",), [PLAIN["choices"][0], PLAIN["choices"][0]])])
@example([(("usage", "prompt_tokens"), 20.0)])
def test_typed_and_careful_readers_agree(
    changes: list[tuple[tuple[str | int, ...], Any]],
) -> None:
    body = msgspec.json.encode(changed(changes))
    assert parse_typed(body) in (None, answers.parse_carefully(body))


@given(st.integers(0, 700), st.integers(0, 255))
def test_so_it_does_with_any_byte_changed(place: int, byte: int) -> None:
    body = bytearray(msgspec.json.encode(PLAIN))
    body[place % len(body)] = byte
    assert parse_typed(bytes(body)) in (None, answers.parse_carefully(bytes(body)))


ODD = [
    *(
        rb'"\ud800"',
        rb'"\udc00\ud800"',
        rb'"\x"',
        b'"\n"',
        b'"\x01"',
        b'"\x7f"',
        b"NaN",
        b"1e999",
        b"-0",
        b"01",
        b"1.",
        b"+1",
    ),
    *(
        b"9" * 400,
        b"9" * 5000,
        b"[" * 2000 + b"]" * 2000,
        b"tru",
        b'{"a":1,"a":2}',
        b'{"a" 1}',
        b"{,}",
        b"[1,]",
        b"'a'",
    ),
]


HUGE = [b"1e999", b"9" * 400, b"9" * 5000]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("place", [b'"fp"', b"null", b"8", b'"Fine."', b"[]"])
def test_they_agree_on_odd_json_too(odd: bytes, place: bytes) -> None:
    """In fields that neither of them reads."""
    body = msgspec.json.encode(PLAIN).replace(place, odd, 1)
    careful = answers.parse_carefully(body)
    unread = place == b'"fp"' and odd in HUGE
    assert parse_typed(body) in (None, careful) or unread
    assert not unread or parse_typed(body) == msgspec.structs.replace(careful, flagged=False)


@pytest.mark.parametrize(
    "changes",
    [
        [],
        [(("usage", "prompt_tokens_details"), REMOVED), (("usage", "completion_tokens_details"), None)],
        [(("choices", 0, "finish_reason"), "length")],
        [(("choices", 0, "message", "reasoning_content"), "I think."), (("prompt_logprobs",), None)],
        [(("service_tier",), "Flex")],
        [(("timings",), {"predicted_ms": 3.5}), (("choices", 0, "stop_reason"), None)],
    ],
    ids=["OpenAI", "no details", "cut short", "vLLM with reasoning", "a service tier", "llama.cpp"],
)
def test_it_accepts_the_answers_of_common_servers(changes: list[tuple[tuple[str | int, ...], Any]]) -> None:
    body = msgspec.json.encode(changed(changes))
    assert parse_typed(body) == answers.parse_carefully(body) is not None
