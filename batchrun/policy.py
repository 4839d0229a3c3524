"""What an attempt's outcome means and what to do next. PURE: a table, not a ladder of ifs.

docs/guarantees.md explains each line; tests/test_policy.py walks the table.
"""

import email.utils
import math
import re
from collections.abc import Mapping
from datetime import UTC
from enum import StrEnum

import msgspec

from batchrun.answer import packed
from batchrun.answer.answer import MAX_MESSAGE_CHARS, decode
from batchrun.job.expected import Expected, Flaw
from batchrun.job.job import Action, Finish, Retry
from batchrun.records import Answer, Attempt, RowError, Status, Verdict


class Fault(StrEnum):
    """Why no whole answer came: the `kind` of an APIConnectionError."""

    DNS = "dns"
    REFUSED = "refused"
    CONNECT = "connect"
    TLS = "tls"
    CERTIFICATE = "certificate"
    STALE = "stale_connection"
    UNSENT = "lost_before_send"
    TIMEOUT = "timeout"
    RESET = "reset"
    CUT = "cut"
    TOO_LARGE = "answer_too_large"
    ENCODING = "bad_encoding"
    MALFORMED = "malformed_http"


FAULT_VERDICTS: Mapping[str, Verdict] = {
    Fault.DNS: Verdict.FREE,
    Fault.REFUSED: Verdict.FREE,
    Fault.CONNECT: Verdict.FREE,
    Fault.TLS: Verdict.FREE,
    Fault.CERTIFICATE: Verdict.STOP,
    Fault.STALE: Verdict.FREE,
    Fault.UNSENT: Verdict.FREE,
    Fault.TIMEOUT: Verdict.MAYBE,
    Fault.RESET: Verdict.MAYBE,
    Fault.CUT: Verdict.MAYBE,
    Fault.TOO_LARGE: Verdict.MAYBE,
    Fault.ENCODING: Verdict.MAYBE,
    Fault.MALFORMED: Verdict.MAYBE,
}

STATUS_VERDICTS: Mapping[int, Verdict] = {
    **dict.fromkeys((400, 413, 415, 422, 501), Verdict.ROW),
    **dict.fromkeys((408, 409, 425, 500, 502), Verdict.FREE),
    **dict.fromkeys((499, 504, 520, 521, 522, 523, 524), Verdict.MAYBE),
    **dict.fromkeys((429, 529), Verdict.SLOW),
    **dict.fromkeys((401, 402, 403), Verdict.PAUSE),
    **dict.fromkeys((404, 405), Verdict.STOP),
}
"""By status alone. 403, 429 and 503 depend on the body as well; 520 to 524 are Cloudflare's "origin" errors."""

KINDS: Mapping[int, str] = {
    400: "bad_request",
    401: "authentication",
    402: "payment_required",
    403: "forbidden",
    404: "not_found",
    429: "rate_limit",
    501: "not_supported",
    529: "overloaded",
}

_QUOTA = re.compile(r"quota|credit|balance|billing|spend|payment|insufficient[_ ]funds|arrear", re.IGNORECASE)
_PACE = re.compile(
    r"rate[ _-]?limit|too many requests|(per|/) ?(second|minute|min|hour)\b|\b[rt]p[ms]\b", re.IGNORECASE
)
"""Words of a limit that time alone lifts. Such refusals often add how to buy more quota or where to see the billing."""

_OVERLOAD = re.compile(
    r"overload|capacity|busy|temporar|unavailable|try again|upstream|timed? ?out|maintenance|loading|no healthy",
    re.IGNORECASE,
)
_MODERATION = re.compile(r"content[_ -]?(policy|filter|violation)|moderation|safety|flagged|prohibited", re.IGNORECASE)

_UNABLE = re.compile(r"\bnot (supported|implemented)\b|\bunsupported\b", re.IGNORECASE)
"""llama.cpp says so with 500 of what its model can't do, such as images: to ask again is in vain."""

SHARE_OF = 50
"""First attempts that the share of failing ones is taken over."""

WELL_SHARE = 0.03
"""So many failures are usual. Four in a row are then one row in a million."""

MAX_STRETCH = 5.0
"""Of the caps, where half and more fails: twenty 5xx instead of four."""

TAIL_S = 90.0
"""When only rows that failed are left, nobody can tell whether they or the endpoint are at fault. Such a row has all of
its attempts over so long at least: an outage of a minute fails none."""

MAX_SEARCHED_BYTES = 10_000
"""How much of a 503's body is searched for words of overload."""


class Judgement(msgspec.Struct, frozen=True):
    """What one attempt came to. `error` is None exactly when the verdict is OK.

    `in_doubt`: it may have been billed, whatever is done about its row now.
    """

    verdict: Verdict
    error: RowError | None = None
    filtered: bool = False
    retry_after_s: float | None = None
    in_doubt: bool = False


_ANSWERED = Judgement(Verdict.OK)


def judge(attempt: Attempt, answer: Answer, retry: Retry) -> Judgement:
    """The verdict on one attempt, with what the `error` column and the gate need of it."""
    if attempt.error is not None and not (attempt.streamed and answer.completion):  # a stream says itself when it ends
        error = RowError(attempt.error.kind, attempt.http_status, None, str(attempt.error)[:MAX_MESSAGE_CHARS])
        verdict = FAULT_VERDICTS[attempt.error.kind]
        return Judgement(verdict, error, in_doubt=verdict is Verdict.MAYBE)
    status = attempt.http_status
    assert status is not None
    if 200 <= status < 300:
        if answer.completion:
            return _ANSWERED
        if answer.error_message is None:
            error = RowError("unreadable", status, None, _why_unreadable(attempt))
            return Judgement(Verdict.MAYBE, error, in_doubt=True)
        status = _embedded_status(answer, status)
    return _judge_status(status, attempt, answer, retry)


def _judge_status(status: int, attempt: Attempt, answer: Answer, retry: Retry) -> Judgement:
    verdict, kind, filtered = _by_status_and_body(status, attempt, answer)
    message = answer.error_message or f"HTTP {status}: {_excerpt(attempt.body)}".rstrip(": ")
    wait_s = retry_after_s(attempt.headers, attempt.started_at + attempt.latency_s)
    if verdict is Verdict.SLOW and wait_s is not None and wait_s > retry.max_wait_s:
        verdict, message = Verdict.PAUSE, f"asked to wait {wait_s:.0f} s: {message}"
    had_begun = attempt.time_to_first_token_s is not None  # tokens were made before the error stood in the stream
    if had_begun and verdict is Verdict.FREE:
        verdict = Verdict.MAYBE
    in_doubt = had_begun or verdict is Verdict.MAYBE
    verdict = _should_retry(attempt.headers.get("x-should-retry"), verdict)
    error = RowError(kind, attempt.http_status, answer.error_code, message[:MAX_MESSAGE_CHARS])
    return Judgement(verdict, error, filtered and verdict is Verdict.ROW, wait_s, in_doubt)


def _by_status_and_body(status: int, attempt: Attempt, answer: Answer) -> tuple[Verdict, str, bool]:
    """(verdict, kind, filtered): the statuses that need the body, then the table, then the century."""
    code, message = answer.error_code or "", answer.error_message or ""
    if status == 429 and _is_quota(code, message):
        return Verdict.PAUSE, "insufficient_quota", False
    if status == 403 and _MODERATION.search(f"{code} {message}"):
        return Verdict.ROW, "content_policy", True
    if status == 503:
        # this vendor's code for "Content Policy Violation"; gateways use it for overload: the body decides
        if _is_overload(attempt, answer):
            return Verdict.SLOW, "overloaded", False
        return Verdict.ROW, "content_policy", True
    if status == 500 and _UNABLE.search(message):
        return Verdict.ROW, "not_supported", False
    if status < 400:
        return (
            Verdict.STOP if status >= 300 else Verdict.MAYBE,
            "redirect" if status >= 300 else "error_in_answer",
            False,
        )
    fallback = Verdict.FREE if status >= 500 else Verdict.ROW
    kind = KINDS.get(status, "server_error" if status >= 500 else "bad_request")
    return STATUS_VERDICTS.get(status, fallback), kind, False


def _is_quota(code: str, message: str) -> bool:
    """A 429 that waiting does not lift: its code says so, or its words speak of money and neither of a pace."""
    if _QUOTA.search(code):
        return True
    return _QUOTA.search(message) is not None and _PACE.search(f"{code} {message}") is None


def _is_overload(attempt: Attempt, answer: Answer) -> bool:
    """A 503 is trouble of the server's unless it is a JSON object that speaks of neither load nor a wait.

    The whole body is searched: gateways put their words under `detail`, `reason` and other names.
    """
    if "retry-after" in attempt.headers or "retry-after-ms" in attempt.headers:
        return True
    if attempt.streamed:
        words = f"{answer.error_code} {answer.error_message}"
    else:
        decoded, _ = decode(attempt.body)
        if not isinstance(decoded, dict) or not decoded:
            return True
        words = attempt.body[:MAX_SEARCHED_BYTES].decode("utf-8", "replace")
    return _OVERLOAD.search(words) is not None and _MODERATION.search(words) is None


def _should_retry(header: str | None, verdict: Verdict) -> Verdict:
    """`x-should-retry`, as the reference SDK's servers send it, has the last word on a row's retry."""
    if header == "true" and verdict is Verdict.ROW:
        return Verdict.FREE
    if header == "false" and verdict in (Verdict.FREE, Verdict.MAYBE):
        return Verdict.ROW
    return verdict


def _embedded_status(answer: Answer, status: int) -> int:
    """The status that an error object inside a 200 names as its code, as some gateways do; else the 200."""
    code = answer.error_code or ""
    return int(code) if code.isascii() and code.isdigit() and 400 <= int(code) < 600 else status


def _excerpt(body: bytes) -> str:
    return " ".join(packed.beginning(body, 300).decode("utf-8", "replace").split())


def _why_unreadable(attempt: Attempt) -> str:
    if not packed.size(attempt.body):
        return "the answer is empty"
    what = "the stream spells no whole answer" if attempt.streamed else "the answer is no chat completion"
    return f"{what}: {_excerpt(attempt.body)}"


class Settlement(msgspec.Struct, frozen=True):
    """What a usable answer makes of its row, and what the job says of such an answer: `accept`, `fail` or `retry`.

    `in_json`: the content is the JSON that was asked for. `correctable`: it is not, and the model can be told why.
    """

    status: Status
    action: Action = "accept"
    error: RowError | None = None
    in_json: bool = False
    correctable: bool = False


def settlement(answer: Answer, expected: Expected, finish: Finish, http_status: int | None = None) -> Settlement:
    """What becomes of a row by its answer's finish_reason (docs/api.md, "Response") and by what was expected.

    An answer that was cut short is neither read as JSON nor mended.
    """
    reason = answer.finish_reason
    called = answer.function_call is not None or answer.tool_calls is not None or reason == "tool_calls"
    if reason == "content_filter":
        status, action = Status.FILTERED, finish.content_filter
    elif reason == "length":
        status, action = Status.TRUNCATED, finish.length
    elif not called and not answer.content:
        error = RowError("empty", http_status, None, "the answer has no content")
        return Settlement(Status.EMPTY, finish.empty, error)
    else:
        action = _action_by(reason, finish)
        status = Status.OK if action == "accept" else Status.INVALID
    if action != "accept":
        told = f"the finish_reason is {reason or 'not said'}, which the job does not accept"
        return Settlement(status, action, RowError("finish_reason", http_status, None, told[:MAX_MESSAGE_CHARS]))
    if status is Status.OK and (flaw := _flaw(answer, expected)) is not None:
        error = RowError(flaw.kind, http_status, None, flaw.message)
        return Settlement(Status.INVALID, "fail", error, correctable=True)
    return Settlement(status, in_json=status is Status.OK and expected.in_json and not called)


def _action_by(reason: str | None, finish: Finish) -> Action:
    match reason:
        case "stop":
            return finish.stop
        case "function_call" | "tool_calls":
            return finish.function_call
        case _:
            return finish.other


def _flaw(answer: Answer, expected: Expected) -> Flaw | None:
    if (call := answer.function_call) is not None:
        return expected.call_flaw(call.name, call.arguments)
    if answer.tool_calls is not None or answer.finish_reason == "tool_calls":
        return None
    return expected.content_flaw(answer.content or "")


def failing(finish: Finish) -> frozenset[Status]:
    """The statuses whose rows count against `max_failures`."""
    by_reason = {
        Status.TRUNCATED: finish.length,
        Status.FILTERED: finish.content_filter,
        Status.EMPTY: finish.empty,
    }
    refused = {status for status, action in by_reason.items() if action != "accept"}
    return frozenset({Status.INVALID, Status.ERROR} | refused)


class History(msgspec.Struct, frozen=True):
    """What a row has been through: attempts made, and those that count against its caps.

    `corrected`: how often it was asked again with what was wrong with its answer. `witnessed`: the counted ones during
    which another row was answered.
    """

    attempts: int = 0
    counted: int = 0
    counted_5xx: int = 0
    maybe_billed: int = 0
    corrected: int = 0
    witnessed: int = 0


def after(history: History, judgement: Judgement, *, corroborated: bool, at_tail: bool = False) -> History:
    """`history` with one attempt more.

    It counts against the row only if another row succeeded meanwhile (`corroborated`), so that an outage burns no row;
    or where only rows that have failed are left (`at_tail`), since no other row can succeed there any more.
    A wait that a 429 asked for never counts; an overload that only this row meets does.
    """
    status = judgement.error.http_status if judgement.error is not None else None
    chargeable = is_chargeable(judgement)
    counts = (corroborated or at_tail) and chargeable
    server_error = status is not None and status >= 500 and judgement.verdict is not Verdict.SLOW
    return History(
        attempts=history.attempts + 1,
        counted=history.counted + counts,
        counted_5xx=history.counted_5xx + (counts and server_error),
        maybe_billed=history.maybe_billed + (counts and judgement.verdict is Verdict.MAYBE),
        corrected=history.corrected,
        witnessed=history.witnessed + (corroborated and chargeable),
    )


def is_chargeable(judgement: Judgement) -> bool:
    """Whether such an end can count against its row: what is retried, but for the wait that a 429 asks for."""
    if judgement.verdict is Verdict.SLOW:
        return judgement.error is None or judgement.error.http_status != 429
    return judgement.verdict in (Verdict.FREE, Verdict.MAYBE)


def asked_again(history: History, settled: Settlement, retry: Retry) -> History | None:
    """`history` with an answer set aside, where the job wants another in its place; None where this one stands."""
    if settled.correctable and history.corrected < retry.invalid:
        return msgspec.structs.replace(history, corrected=history.corrected + 1)
    if settled.action != "retry":
        return None
    counted = msgspec.structs.replace(history, counted=history.counted + 1)
    return None if exhausted(counted, retry) else counted


def exhausted(history: History, retry: Retry, stretched: float = 1.0) -> bool:
    """True when the row has used up one of its caps and is settled as `error`.

    `stretched` lengthens the caps on what costs nothing; the one on what may have been billed stays.
    """
    return (
        history.counted >= retry.max_attempts * stretched
        or history.counted_5xx >= retry.max_5xx * stretched
        or history.maybe_billed > retry.max_maybe_billed
    )


def tail_wait_s(history: History, judgement: Judgement, retry: Retry) -> float:
    """Seconds that a row waits at least before its next attempt at the tail, so that its attempts take `TAIL_S` or half
    of the longest outage; none where another row was answered while it failed.
    """
    if history.witnessed:
        return 0.0
    status = judgement.error.http_status if judgement.error is not None else None
    attempts = retry.max_attempts
    if judgement.verdict is Verdict.MAYBE:
        attempts = min(attempts, retry.max_maybe_billed + 1)
    elif judgement.verdict is Verdict.FREE and status is not None and status >= 500:
        attempts = min(attempts, retry.max_5xx)
    return min(TAIL_S, retry.max_outage_s / 2) / max(1, attempts - 1)


def failing_share(share: float, history: History, judgement: Judgement) -> float:
    """The share of first attempts that fail although their row may be fine, with one attempt more; over about
    `SHARE_OF` of them. First ones only: a row that fails for ever would show in it again and again.
    """
    if history.attempts > 1:
        return share
    failed = judgement.verdict in (Verdict.FREE, Verdict.MAYBE)
    return share + (failed - share) / SHARE_OF


def stretch(share: float) -> float:
    """How much longer a row's caps are while this share of first attempts fails: so long that chance alone uses them
    up no oftener than where the endpoint is well. With 30 % failing, four 5xx in a row are one row in 120.
    """
    if share <= WELL_SHARE:
        return 1.0
    return min(MAX_STRETCH, math.log(WELL_SHARE) / math.log(share)) if share < 1 else MAX_STRETCH


def backoff_s(history: History, floor_s: float | None, retry: Retry, uniform: float) -> float:
    """Seconds until the next attempt: full jitter below a doubling ceiling; a Retry-After is a floor under it.

    `uniform` is a random number in [0, 1). The ceiling is clamped first and jittered then, so late delays differ too.
    """
    ceiling_s = min(retry.backoff_cap_s, retry.backoff_base_s * 2.0 ** min(history.attempts - 1, 30))
    return min(floor_s or 0.0, retry.max_wait_s) + uniform * ceiling_s


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that the server asks to wait: `retry-after-ms`, or `Retry-After` in seconds or as an HTTP date.

    None where absent or meaningless (negative, no number, a date in the past). RFC 9110, section 10.2.3. A date is
    read against the server's own `Date` where it sends one, so a skewed clock does no harm.
    """
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        if (seconds := _number(headers.get(name))) is not None:
            return seconds * scale
    then = _date(headers.get("retry-after"))
    if then is None:
        return None
    wait_s = then - (_date(headers.get("date")) or now)
    return wait_s if wait_s > 0 else None


def _number(text: str | None) -> float | None:
    if text is None or not re.fullmatch(r"\s*\d{1,18}(\.\d{1,9})?\s*", text):
        return None
    return float(text)


def _date(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        date = email.utils.parsedate_to_datetime(text)
        # a date without a zone is UTC too, as in asctime's form, which RFC 9110 still allows
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
