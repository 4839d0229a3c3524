"""An offline count: exact where a tokenizer is there, a quarter of the bytes elsewhere, of texts only."""

from typing import Any

import msgspec
import toktok
from hypothesis import example, given
from hypothesis import strategies as st

from batchrun.records import Answer, FunctionCall, OfflineCount
from batchrun.response.token_count import ENCODING, count, tokenizer, tokens

JSON = st.none() | st.integers(-9, 9) | st.text(max_size=5)
encoded = msgspec.json.encode


def fields(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(["messages", "content", "text", "tools", "functions"]), inner)


TEXTS = ["You label product reviews.", "Größe passt, leider verspätet.", "def f(x):\n    return x"]


def body(*contents: Any, **fields: Any) -> bytes:
    return msgspec.json.encode({"model": "m", "messages": [{"role": "user", "content": c} for c in contents]} | fields)


def exactly(*texts: str) -> int:
    return sum(toktok.batch_count(list(texts), ENCODING))


def test_with_a_tokenizer_texts_are_counted_exactly() -> None:
    assert tokenizer() is toktok.batch_count
    assert count(body(*TEXTS), Answer(content="Fine.")) == OfflineCount(exactly(*TEXTS), exactly("Fine."))


def test_without_one_a_quarter_of_their_bytes_is() -> None:
    assert tokens(["a" * 40, "ä" * 20], None) == 20
    assert tokens([], None) == tokens([""], None) == 0


def test_images_are_not_counted_as_tokens() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 10_000}}
    function = {"name": "rate", "parameters": {"type": "object"}}
    requested = body([{"type": "text", "text": "What is it?"}, image], None, functions=[function], tools=[function])
    described = ("name", "rate", "parameters", "type", "object")
    answer = Answer(function_call=FunctionCall("rate", '{"stars":5}'))
    assert count(requested, answer) == OfflineCount(
        exactly("What is it?", *described, *described), exactly("rate", '{"stars":5}')
    )


def test_an_answer_of_nothing_counts_nothing() -> None:
    assert count(body("Hi"), Answer(function_call=FunctionCall(None, None))) == OfflineCount(exactly("Hi"), 0)


@given(
    st.one_of(st.binary(max_size=40), st.recursive(JSON, lambda inner: st.lists(inner) | fields(inner)).map(encoded))
)
@example(b'{"messages":[null,{"content":[1,{"text":2}]}],"tools":' + b"[" * 2000 + b"]" * 2000 + b"}")
def test_counting_tokens_raises_for_nothing(raw: bytes) -> None:
    assert count(raw, Answer(content="Fine.")).completion_tokens == exactly("Fine.")
