"""A chat completion as a JSON object → `Answer`. PURE. Two readers: a field that `Answer` gets is read in both.

`parse_typed` reads the answer that nearly all servers send: one choice, text, a usage in the common words. It takes
what `parse_object` would read in the same way, at a fifth of the cost (docs/benchmarks.md), and leaves every surprise
to it: a field of another type, a second choice, a call, an error, a usage in other words. The two agree wherever it
accepts (tests/unit/test_typed_reader.py), except `flagged`: a number too large for a double is not noticed in a field
that neither reads.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from batchrun.records import Answer, Choice, Usage
from batchrun.response import billed_apart, blocked, error_body, messages, responses_object
from batchrun.response import usage as usages
from batchrun.response.finish_reasons import Meaning, meaning_of
from batchrun.response.usage import MAX_COUNT, MAX_UNSTATED

MAX_CREATED = 253_402_300_799
"""The end of year 9999: what is later fits into no timestamp."""

LAST_COUNTS = ("id", "created", "model", "service_tier", "provider_metadata", "output", *blocked.RESULTS)
"""In a stream the last event that has one of these counts; of `usage` and `error` the last that says something."""

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


def parse_typed(body: bytes) -> Answer | None:
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


def parse_object(body: dict[str, Any], flagged: bool) -> Answer:
    """Any JSON object as an answer: a completion in any vendor's words, or the failure that it reports."""
    if responses_object.is_response(body):
        body = responses_object.as_completion(body)
    all_choices = body.get("choices")
    choices = all_choices if isinstance(all_choices, list) else []
    # the one with the lowest number: servers were seen that list the one first that ended first
    numbered = [(messages.index(each, place), place) for place, each in enumerate(choices) if isinstance(each, dict)]
    choice: dict[str, Any] = choices[min(numbered)[1]] if numbered else {}
    finish_reason = messages.finish_reason(choice)
    message = messages.message_of(choice)
    usage, service_tier, reported_cost_pico_usd = usages.stated_in(body)
    apart = billed_apart.kinds_in(body, usages.of_answer(body))

    failure = error_body.failure_in(body)
    if failure is None and choice.get("error"):  # a choice's own error, as OpenRouter sends it
        failure = error_body.failure_in({"error": choice["error"]})
    elif failure is None and meaning_of(finish_reason) is Meaning.FAILURE:
        text = f"the answer broke off with the finish_reason {finish_reason!r:.100}"
        failure = error_body.Failure(text, code=finish_reason)
    if message is None:
        read = Answer(
            flagged=flagged,
            usage=usage,
            model=messages.text(body.get("model")),
            service_tier=service_tier,
            reported_cost_pico_usd=reported_cost_pico_usd,
            billed_apart=apart,
        )
        return with_failure(read, failure or blocked.failure_in(body, finish_reason))

    calls = message.get("tool_calls")
    tool_calls, shown = messages.as_text(calls) if calls and isinstance(calls, list) else (None, True)
    created = body.get("created")
    is_time = isinstance(created, int) and not isinstance(created, bool) and 0 <= created <= MAX_CREATED
    read = Answer(
        completion=True,
        flagged=flagged or not shown,
        completion_id=messages.text(body.get("id")),
        created=created if is_time else None,
        model=messages.text(body.get("model")),
        content=messages.content(message.get("content")),
        refusal=messages.refusal(message),
        function_call=messages.function_call(message.get("function_call")),
        tool_calls=tool_calls,
        choices=tuple(_choice(each, place) for place, each in enumerate(choices) if isinstance(each, dict))
        if len(choices) > 1
        else (),
        finish_reason=finish_reason,
        usage=usage,
        service_tier=service_tier,
        reported_cost_pico_usd=reported_cost_pico_usd,
        billed_apart=apart,
    )
    return with_failure(read, failure)


def _choice(choice: dict[str, Any], place: int) -> Choice:
    message = messages.message_of(choice)
    content = None if message is None else messages.content(message.get("content"))
    return Choice(messages.index(choice, place), content, messages.finish_reason(choice))


def with_failure(answer: Answer, failure: error_body.Failure | None) -> Answer:
    """The answer with the failure that its body reports. It is then not a completion, even if it has choices."""
    if failure is None:
        return answer
    return msgspec.structs.replace(
        answer,
        completion=False,
        error_message=failure.message,
        error_code=failure.code,
        error_words=failure.words,
        error_status=failure.status,
        error_wait_s=failure.wait_s,
    )
