"""The typed reader of the answer that nearly all servers send: one choice, text, a usage in the common words. PURE.

It takes what `answer.read` would read in the same way, at a fifth of the cost (docs/benchmarks.md), and leaves every
surprise to it: a field of another type, a second choice, a call, an error, a usage in other words. The two agree
wherever this one accepts (tests/unit/test_typed_reader.py), except `flagged`: a number too large for a double is not
noticed in a field that neither reads.
"""

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from batchrun.records import Answer, Usage
from batchrun.response.usage import MAX_COUNT, MAX_UNSTATED

MAX_CREATED = 253_402_300_799
"""The end of year 9999: what is later fits into no timestamp."""

Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]


class _PromptDetails(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    """Another detail may be of tokens written to a cache."""

    cached_tokens: Count | None = None
    audio_tokens: Literal[0] | None = None
    text_tokens: object = None
    image_tokens: object = None


class _CompletionDetails(msgspec.Struct, gc=False):
    reasoning_tokens: Count | None = None
    audio_tokens: Literal[0] | None = None
    image_tokens: Literal[0] | None = None


class _Usage(msgspec.Struct, gc=False, forbid_unknown_fields=True):
    """Another field may be a cost, or a count in a vendor's own words."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _Message(msgspec.Struct, gc=False):
    content: str
    refusal: None = None
    function_call: None = None
    tool_calls: None = None
    annotations: Annotated[list[object], Meta(max_length=0)] | None = None


class _Choice(msgspec.Struct, gc=False):
    message: _Message
    finish_reason: Literal["stop", "length"]
    error: None = None


class _Completion(msgspec.Struct, gc=False):
    id: str
    created: Annotated[int, Meta(ge=0, le=MAX_CREATED)]
    model: str
    choices: Annotated[list[_Choice], Meta(min_length=1, max_length=1)]
    usage: _Usage
    service_tier: Annotated[str, Meta(max_length=100)] | None = None
    error: None = None
    provider_metadata: UnsetType = UNSET


_decode = msgspec.json.Decoder(_Completion).decode


def read(body: bytes) -> Answer | None:
    """The body as an answer; None where it does not have the common shape."""
    try:
        if not body.isascii():
            body.decode()  # msgspec does not look into the text of fields that it skips
        found = _decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    # The usage counts only where its figures can mean but one thing.
    stated = found.usage
    prompt, completion, total = stated.prompt_tokens, stated.completion_tokens, stated.total_tokens
    cached = None if stated.prompt_tokens_details is None else stated.prompt_tokens_details.cached_tokens
    details = stated.completion_tokens_details
    reasoning = None if details is None else details.reasoning_tokens
    if not (prompt or completion) or (cached and (cached > prompt or total == prompt + completion + cached)):
        return None
    if (reasoning is not None and reasoning > completion) or total - prompt - completion > MAX_UNSTATED:
        return None

    choice = found.choices[0]
    return Answer(
        completion=True,
        completion_id=found.id,
        created=found.created,
        model=found.model,
        content=choice.message.content,
        finish_reason=choice.finish_reason,
        usage=Usage(prompt, completion, total, cached, reasoning),
        service_tier=None if found.service_tier is None else found.service_tier.lower(),
    )
