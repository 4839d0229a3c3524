"""The verdict on an attempt. PURE. docs/failures.md explains the tables; `row_status` is about usable answers."""

import re
from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

import msgspec

from batchrun.job.settings import Retry
from batchrun.patterns import Pattern
from batchrun.records import OTHER_API, WRONG_KEY, Answer, Attempt, RowError, Verdict
from batchrun.response import other_apis, packed
from batchrun.response.error_body import MAX_MESSAGE_CHARS
from batchrun.response.refusal_subjects import Subject, speaks_of
from batchrun.response.retry_after import reset_s, retry_after_s


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
    KEY_REPLACED = "key_replaced"
    SENDER_LOST = "sender_lost"


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
    Fault.KEY_REPLACED: Verdict.FREE,
    Fault.SENDER_LOST: Verdict.MAYBE,
}

BROKEN_OFF = frozenset({Fault.TIMEOUT, Fault.RESET, Fault.CUT})
"""Faults of a transfer that ended too early, or never."""

NO_EVIDENCE = frozenset({Fault.KEY_REPLACED, Fault.SENDER_LOST})
"""Faults that show nothing about the endpoint."""

BY_STATUS: Mapping[int, tuple[Verdict, str]] = {
    **dict.fromkeys((400, 413, 415, 422), (Verdict.ROW, "bad_request")),
    401: (Verdict.PAUSE, WRONG_KEY),
    402: (Verdict.PAUSE, "payment_required"),
    403: (Verdict.PAUSE, "forbidden"),
    404: (Verdict.STOP, "not_found"),
    # about the method, the proxy, the protocol and the headers, which all rows share
    **dict.fromkeys((405, 407, 426, 431), (Verdict.STOP, "bad_request")),
    # 424 is a failed generation (TGI, Bedrock)
    **dict.fromkeys((408, 409, 421, 423, 424, 425), (Verdict.FREE, "bad_request")),
    429: (Verdict.SLOW, "rate_limit"),
    499: (Verdict.MAYBE, "bad_request"),  # a proxy's: the client left, which says nothing about the server
    **dict.fromkeys((500, 502), (Verdict.FREE, "server_error")),
    501: (Verdict.ROW, "not_supported"),
    **dict.fromkeys((503, 529), (Verdict.SLOW, "overloaded")),
    # a proxy lost the server, which may have finished; 520 to 524 are Cloudflare's "origin" errors
    **dict.fromkeys((504, 520, 521, 522, 523, 524), (Verdict.MAYBE, "server_error")),
}
"""Verdict and `error.kind` by status alone. `RULES` has those where the body decides."""

CONTENT_POLICY = "content_policy"
QUOTA = "quota"
"""The `error.kind` of a quota that may be a minute's or a month's: only time shows which."""

RATE_KINDS = frozenset({"rate_limit", QUOTA})

CAPACITY = "capacity"
"""The `error.kind` of a refusal by a service tier that has no capacity left: not billed, and no limit of ours."""

CAPACITY_STATUSES = frozenset({429, 498, 503})
"""OpenAI refuses requests of the tier `flex` with a 429 (developers.openai.com/api/docs/guides/flex-processing), Groq
with a 498 (console.groq.com/docs/flex-processing)."""


class Rule(NamedTuple):
    """The verdict if the body speaks of all `subjects` and no earlier rule matches."""

    subjects: frozenset[Subject]
    verdict: Verdict
    kind: str


def _rule(*subjects: Subject, verdict: Verdict, kind: str) -> Rule:
    return Rule(frozenset(subjects), verdict, kind)


_BLOCKED = _rule(Subject.CONTENT, verdict=Verdict.ROW, kind=CONTENT_POLICY)
_CRASHED = _rule(Subject.CRASHED, verdict=Verdict.FREE, kind="server_error")
_BROKE = _rule(Subject.BROKE, verdict=Verdict.PAUSE, kind="insufficient_quota")
_TOO_FAST = _rule(Subject.PACE, verdict=Verdict.SLOW, kind="rate_limit")
_TOO_LARGE = _rule(Subject.TOO_LARGE, verdict=Verdict.ROW, kind="bad_request")
_DAILY = _rule(Subject.DAY, verdict=Verdict.SLOW, kind=QUOTA)
_DAILY_PACE = _rule(Subject.PACE, Subject.DAY, verdict=Verdict.SLOW, kind=QUOTA)
_USED_UP = _rule(Subject.QUOTA, verdict=Verdict.SLOW, kind=QUOTA)
_WRONG_KEY = _rule(Subject.KEY, verdict=Verdict.PAUSE, kind=WRONG_KEY)

RULES: Mapping[int, tuple[Rule, ...]] = {
    # an error object with a code of the vendor's own: MiniMax, Baidu
    200: (_BROKE, _TOO_LARGE, _DAILY_PACE, _TOO_FAST, _WRONG_KEY, _BLOCKED, _DAILY, _USED_UP),
    # an empty balance at Anthropic and DashScope, AWS's throttling, a wrong key at Google and xAI, LM Studio's crash
    400: (_BROKE, _TOO_LARGE, _DAILY_PACE, _TOO_FAST, _WRONG_KEY, _CRASHED, _BLOCKED),
    403: (_rule(Subject.BROKE, verdict=Verdict.PAUSE, kind="forbidden"), _WRONG_KEY, _BLOCKED, _DAILY_PACE, _TOO_FAST),
    422: (_BLOCKED,),
    429: (
        _BROKE,
        _TOO_LARGE,
        _DAILY_PACE,
        _TOO_FAST,
        _rule(Subject.WINDOW, verdict=Verdict.SLOW, kind="rate_limit"),
        _rule(Subject.WAIT, Subject.ACCOUNT, verdict=Verdict.SLOW, kind=QUOTA),
        _rule(Subject.ACCOUNT, verdict=Verdict.PAUSE, kind="insufficient_quota"),
        _DAILY,
        _USED_UP,
    ),
    451: (_BLOCKED,),
    498: (_rule(Subject.CAPACITY, verdict=Verdict.SLOW, kind="overloaded"),),  # Groq's, to a row that names no tier
    500: (
        _WRONG_KEY,
        _rule(Subject.UNABLE, verdict=Verdict.ROW, kind="not_supported"),
    ),
    503: (_rule(Subject.WAIT, verdict=Verdict.SLOW, kind="overloaded"), _BLOCKED),
}
"""The statuses whose body decides. The first rule that matches counts. For 403 an empty account comes before content:
some vendors name both in one message. Another 4xx that is the row's own is read like a 400: Fireworks says with a 412
that the account is suspended.
"""

IN_PLAIN_TEXT = frozenset({403, 429, 503})
"""With these statuses a short plain text is read too, because gateways and this vendor send some. HTML is a proxy's."""


class Judgement(msgspec.Struct, frozen=True):
    """The verdict on one attempt. `error` is None exactly if the verdict is OK.

    `in_doubt`: the attempt may have been billed, no matter how its row ends.
    """

    verdict: Verdict
    error: RowError | None = None
    filtered: bool = False
    retry_after_s: float | None = None
    in_doubt: bool = False

    @property
    def http_status(self) -> int | None:
        """The status of the failure."""
        return None if self.error is None else self.error.http_status

    @property
    def is_retried(self) -> bool:
        """Whether the row is retried, unless it has reached a cap."""
        return self.verdict in (Verdict.FREE, Verdict.MAYBE, Verdict.SLOW)

    @property
    def is_capacity(self) -> bool:
        """Whether the request's service tier had no capacity for it."""
        return self.error is not None and self.error.kind == CAPACITY

    @property
    def is_wrong_key(self) -> bool:
        """Whether the server rejects the key."""
        return self.error is not None and self.error.kind == WRONG_KEY

    @property
    def is_refusal(self) -> bool:
        """Whether it is a 429 that passes with time."""
        return self.verdict is Verdict.SLOW and self.http_status == 429 and not self.is_capacity

    @property
    def is_chargeable(self) -> bool:
        """Whether it can count against its row: every retried failure except a 429 and a full service tier."""
        return self.is_retried and not self.is_refusal and not self.is_capacity


ANSWERED = Judgement(Verdict.OK)
"""The only judgement with this verdict."""


def judge(attempt: Attempt, answer: Answer, retry: Retry, *, tier_may_be_full: bool = False) -> Judgement:
    """The verdict on one attempt, with its error for the row and its wait for the gate.

    `tier_may_be_full`: the request names a service tier that refuses requests while it has no capacity.
    """
    if attempt.error is not None and not _is_whole(attempt, answer, attempt.error.kind):
        error = RowError(attempt.error.kind, attempt.http_status, None, str(attempt.error)[:MAX_MESSAGE_CHARS])
        verdict = FAULT_VERDICTS[attempt.error.kind]
        return Judgement(verdict, error, in_doubt=verdict is Verdict.MAYBE)
    status = attempt.http_status
    assert status is not None
    if 200 <= status < 300:
        if answer.completion:
            return ANSWERED
        if answer.error_message is None:
            other = other_apis.recognised(attempt.body)
            kind = "unreadable" if other is None else OTHER_API
            error = RowError(kind, status, None, _why_unreadable(attempt, other)[:MAX_MESSAGE_CHARS])
            return Judgement(Verdict.MAYBE, error, in_doubt=True)
        status = answer.error_status or 200  # some gateways put an error of theirs into a 2xx
    if tier_may_be_full and (refusal := _by_capacity(status, attempt, answer)) is not None:
        return refusal
    return _judge_status(status, attempt, answer, retry)


def with_replaced_key(judgement: Judgement) -> Judgement:
    """The judgement on a refusal of a key, or of its account, that was replaced since the request was sent."""
    message = f"HTTP {judgement.http_status}: the key was replaced while the request was in flight"
    return Judgement(Verdict.FREE, RowError(Fault.KEY_REPLACED, judgement.http_status, None, message))


def _is_whole(attempt: Attempt, answer: Answer, fault: str) -> bool:
    """Whether all of the response came, although its connection or its framing failed.

    A stream has a mark at its end, and JSON ends with its last bracket: servers and proxies were seen that announce
    too long a body. A chunk of a stream may be JSON too, so a finish_reason must be there. A refusal has its status.
    """
    if attempt.streamed:
        return answer.completion
    if fault not in BROKEN_OFF or attempt.http_status is None:
        return False
    return attempt.http_status >= 300 or (answer.completion and answer.finish_reason is not None)


def _by_capacity(status: int, attempt: Attempt, answer: Answer) -> Judgement | None:
    """The refusal of a service tier that is full; None where this is another error."""
    words = _words(status, attempt, answer)
    if status not in CAPACITY_STATUSES or not speaks_of(Subject.CAPACITY, words) or speaks_of(Subject.PACE, words):
        return None
    wait_s = retry_after_s(attempt.headers, attempt.started_at + attempt.latency_s)
    message = answer.error_message or f"HTTP {status}: {_in_words(attempt.body)}"
    error = RowError(CAPACITY, attempt.http_status, answer.error_code, message[:MAX_MESSAGE_CHARS])
    return Judgement(Verdict.SLOW, error, retry_after_s=wait_s)


def _judge_status(status: int, attempt: Attempt, answer: Answer, retry: Retry) -> Judgement:
    """The verdict on an error of the server: by its status, the words of its body, and how long it asks to wait."""
    wait_s = retry_after_s(attempt.headers, attempt.started_at + attempt.latency_s)
    if wait_s is None:
        wait_s = answer.error_wait_s
    verdict, kind = _by_body(status, _words(status, attempt, answer), wait_s) or _by_status(status)
    message = answer.error_message or f"HTTP {status}: {_in_words(attempt.body)}".rstrip(": ")
    if kind == "redirect" and (target := attempt.headers.get("Location")):
        target = target.partition("?")[0][:300]  # what follows may be a secret
        message = f"HTTP {status}: the server redirects to {target}, and redirects are not followed"
    if verdict is Verdict.SLOW and wait_s is None and status == 429:
        wait_s = reset_s(attempt.headers, attempt.started_at + attempt.latency_s)
    if verdict is Verdict.SLOW and wait_s is not None and wait_s > retry.max_wait_s:
        verdict, message = Verdict.PAUSE, f"the server asks to wait {wait_s:.0f} s: {message}"
    # an answer had started before the error came, so its tokens may be billed
    had_started = attempt.time_to_first_token_s is not None or bool(answer.content)
    if had_started and verdict is Verdict.FREE:
        verdict = Verdict.MAYBE
    in_doubt = had_started or verdict is Verdict.MAYBE
    verdict = _should_retry(attempt.headers.get("x-should-retry"), verdict)
    # a rate limit with another status is treated as a 429
    shown = 429 if kind in RATE_KINDS else attempt.http_status
    error = RowError(kind, shown, answer.error_code, message[:MAX_MESSAGE_CHARS])
    return Judgement(verdict, error, kind == CONTENT_POLICY and verdict is Verdict.ROW, wait_s, in_doubt)


def _by_body(status: int, words: str, wait_s: float | None) -> tuple[Verdict, str] | None:
    """(verdict, kind) by the subjects of the body; None if no rule matches."""
    is_rows = status // 100 == 4 and _by_status(status)[0] is Verdict.ROW
    for rule in RULES.get(status, RULES[400] if is_rows else ()):
        named = {Subject.WAIT} if wait_s is not None else set()
        if all(subject in named or speaks_of(subject, words) for subject in rule.subjects):
            return rule.verdict, rule.kind
    return None


def _by_status(status: int) -> tuple[Verdict, str]:
    """(verdict, kind) by the tables, else by the class of the status."""
    if status < 300:
        return Verdict.MAYBE, "error_in_answer"
    if status < 400:
        return Verdict.STOP, "redirect"
    return BY_STATUS.get(status, (Verdict.FREE, "server_error") if status >= 500 else (Verdict.ROW, "bad_request"))


def _words(status: int, attempt: Attempt, answer: Answer) -> str:
    """The text of the error in the body, or a short plain text."""
    if answer.error_message is not None:
        return f"{answer.error_code or ''} {answer.error_words or ''} {answer.error_message}"
    text = _excerpt(attempt.body) if status in IN_PLAIN_TEXT else ""
    return "" if text.startswith(("<", "{", "[")) else text


def _should_retry(header: str | None, verdict: Verdict) -> Verdict:
    """The verdict, changed by the header `x-should-retry`, which the reference SDK's servers send."""
    if header == "true" and verdict is Verdict.ROW:
        return Verdict.FREE
    if header == "false" and verdict in (Verdict.FREE, Verdict.MAYBE):
        return Verdict.ROW
    return verdict


_MARKUP = Pattern(r"<(script|style)\b.*?(</\1\s*>|$)|<!--.*?(-->|$)|<[^>]*(>|$)", re.IGNORECASE)
"""The parts of a web page that are not text."""

_PAGE = Pattern(r"<(!doctype|html|head|body|title|center|h\d|p|div|\?xml|error)\b.*", re.IGNORECASE)


def _excerpt(body: bytes, size: int = 300) -> str:
    return " ".join(packed.beginning(body, size).decode("utf-8", "replace").split())


def _in_words(body: bytes) -> str:
    """The beginning of a body; of a web page, its words."""
    return _words_of_page(body) or _excerpt(body)


def _words_of_page(body: bytes) -> str | None:
    """The words of a web page, as proxies and gateways send it, without tags and styles; None for any other body."""
    if not _PAGE.fullmatch(beginning := _excerpt(body)):
        return None
    from html import unescape  # imported here: few runs get a page

    words = unescape(_MARKUP.sub(" ", _excerpt(body, 8192)))
    return " ".join(words.split())[:300] or beginning


def _why_unreadable(attempt: Attempt, other: other_apis.Api | None) -> str:
    """What came instead of a chat completion."""
    if not packed.size(attempt.body):
        return "the answer is empty"
    if other is not None:
        is_one = f"the answer is not a chat completion, {other_apis.COMES_FROM} {other.name}"
        return f"{is_one}: {_excerpt(attempt.body)}"
    what = "the stream holds no complete answer" if attempt.streamed else "the answer is not a chat completion"
    if (words := _words_of_page(attempt.body)) is not None:
        return f"{what}, but a web page: {words}"
    return f"{what}: {_excerpt(attempt.body)}"
