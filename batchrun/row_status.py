"""The status of a row by its usable answer, and whether that counts as success or failure, or is retried. PURE."""

import msgspec

from batchrun.job.answer_schema import Expected, Flaw
from batchrun.job.settings import Action, Finish
from batchrun.records import Answer, RowError, Status
from batchrun.response.error_body import MAX_MESSAGE_CHARS
from batchrun.response.finish_reasons import Meaning, meaning_of


class Settlement(msgspec.Struct, frozen=True):
    """The row's status by a usable answer, and the job's `action` for such answers.

    `in_json`: the content is valid JSON as requested. `correctable`: it is not, and the model can be shown why.
    """

    status: Status
    action: Action = "accept"
    error: RowError | None = None
    in_json: bool = False
    correctable: bool = False


def settlement(answer: Answer, expected: Expected, finish: Finish, http_status: int | None = None) -> Settlement:
    """The settlement by the answer's finish_reason (docs/api.md, "Response") and the expected schema.

    A truncated answer is neither read as JSON nor corrected.
    """
    if (
        answer.finish_reason == "stop"
        and answer.content
        and not expected.in_json
        and finish.stop == "accept"
        and not answer.refusal
        and answer.function_call is None
        and answer.tool_calls is None
    ):
        return PLAIN
    meaning = Meaning.REFUSAL if answer.refusal else meaning_of(answer.finish_reason)
    status, action = _status_and_action(meaning, finish)
    called = answer.function_call is not None or answer.tool_calls is not None
    if status is Status.OK and not called and not answer.content:
        error = RowError("empty", http_status, None, "the answer has no content")
        return Settlement(Status.EMPTY, finish.empty, error)
    if action != "accept":
        status = Status.INVALID if status is Status.OK else status
        message = f"the finish_reason is {answer.finish_reason or 'missing'}, which the job does not accept"
        if answer.refusal:
            message = f"the model refused, which the job does not accept: {answer.refusal}"
        return Settlement(status, action, RowError("finish_reason", http_status, None, message[:MAX_MESSAGE_CHARS]))
    if status is Status.OK and (flaw := _flaw(answer, expected)) is not None:
        error = RowError(flaw.kind, http_status, None, flaw.message)
        return Settlement(Status.INVALID, "fail", error, correctable=True)
    return Settlement(status, in_json=status is Status.OK and expected.in_json and not called)


PLAIN = Settlement(Status.OK)
"""By complete text, as nearly all answers are."""


def _status_and_action(meaning: Meaning, finish: Finish) -> tuple[Status, Action]:
    """The status of an answer that ended so, and what the job does with such answers."""
    match meaning:
        case Meaning.FILTER:
            return Status.FILTERED, finish.content_filter
        case Meaning.REFUSAL:
            return Status.REFUSED, finish.refusal
        case Meaning.LENGTH:
            return Status.TRUNCATED, finish.length
        case Meaning.STOP:
            return Status.OK, finish.stop
        case Meaning.FUNCTION_CALL | Meaning.TOOL_CALLS:
            return Status.OK, finish.function_call
        case _:
            return Status.OK, finish.other


def _flaw(answer: Answer, expected: Expected) -> Flaw | None:
    """What in the answer does not fit the schema that it should follow; None: it fits."""
    if (call := answer.function_call) is not None:
        return expected.call_flaw(call.name, call.arguments)
    if answer.tool_calls is not None:
        return expected.tool_flaw(answer.tool_calls)
    return expected.content_flaw(answer.content or "")


def failing(finish: Finish) -> frozenset[Status]:
    """The statuses whose rows count against `max_failures`."""
    by_reason = {
        Status.TRUNCATED: finish.length,
        Status.FILTERED: finish.content_filter,
        Status.REFUSED: finish.refusal,
        Status.EMPTY: finish.empty,
    }
    refused = {status for status, action in by_reason.items() if action != "accept"}
    return frozenset({Status.INVALID, Status.ERROR} | refused)
