"""An offline count of tokens for answers that came without usage. For a line of the report, and for nothing else: no
row, total or cost is made of it. PURE, except for loading a tokenizer.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from batchrun.records import Answer, OfflineCount
from batchrun.response.answer import decode

TOKENS_PER_BYTE = 0.25
"""Without a tokenizer: English prose has 4 to 5 bytes a token, code and JSON about 3."""

ENCODING = "o200k_base"
"""The vocabulary of the upstream's models since 2024."""

BatchCount = Callable[[Sequence[str], str], Sequence[int]]


def count(body: bytes, answer: Answer) -> OfflineCount:
    """About how many tokens a request had, its images not among them, and how many its answer. Raises nothing for any
    body, so that no answer is lost by it.
    """
    called = answer.function_call
    answered = [answer.content, *((called.name, called.arguments) if called is not None else ())]
    batch_count = tokenizer()
    return OfflineCount(
        tokens(list(_texts(decode(body)[0])), batch_count), tokens([text for text in answered if text], batch_count)
    )


@functools.cache
def tokenizer() -> BatchCount | None:
    """`toktok`'s, where the extra `tokens` is installed."""
    try:
        import toktok
    except ImportError:
        return None
    counted: BatchCount = toktok.batch_count
    return counted


def tokens(texts: Sequence[str], batch_count: BatchCount | None) -> int:
    """The tokens of all the texts together."""
    if batch_count is not None:
        return sum(batch_count(texts, ENCODING))
    return round(sum(len(text.encode("utf-8", "replace")) for text in texts) * TOKENS_PER_BYTE)


def _texts(body: Any) -> Iterator[str]:
    """The texts of a request: of its messages, and every name and text in what describes functions and tools."""
    if not isinstance(body, dict):
        return
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else [{"text": content}]:
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                yield part["text"]
    left = [body.get("functions"), body.get("tools")]
    while left:
        match left.pop():
            case str(text):
                yield text
            case dict(fields):
                left += [*fields, *fields.values()]
            case list(items):
                left += items
