"""What each outcome of an attempt asks of the run, as one table, and the caps, waits and jitter that follow from it."""

import email.utils
import gzip
import json
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from batchrun import attempt_caps
from batchrun.attempt_caps import (
    History,
    after,
    after_unwanted_answer,
    backoff_s,
    end_wait_s,
    exhausted,
    share_of_first,
    stretch,
)
from batchrun.errors import APIConnectionError, APITimeoutError
from batchrun.job.answer_schema import ANYTHING, Expected, of
from batchrun.job.settings import Finish, Retry
from batchrun.policy import ANSWERED, FAULT_VERDICTS, Fault, Judgement, judge
from batchrun.records import Answer, Attempt, FunctionCall, RowError, Status, Verdict
from batchrun.response.answer import parse
from batchrun.response.retry_after import reset_s, retry_after_s
from batchrun.row_status import Settlement, failing, settlement

pytestmark = pytest.mark.sampled(20)

OK, ROW, FREE, MAYBE, SLOW, PAUSE, STOP = Verdict
NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC).timestamp()
FINE = json.dumps({"choices": [{"message": {"content": "Fine."}, "finish_reason": "stop"}]}).encode()


def attempt(
    status: int | None,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    error: APIConnectionError | None = None,
) -> Attempt:
    return Attempt(NOW - 2.0, 2.0, status, CIMultiDict(headers or {}), body, error)


def judged(status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Judgement:
    return judge(attempt(status, body, headers), parse(body), Retry())


def said(message: str, code: str | int | None = None) -> bytes:
    return json.dumps({"error": {"message": message, "code": code}}).encode()


# -- the table

BY_STATUS: Mapping[int, tuple[Verdict, str]] = {
    **dict.fromkeys(range(300, 400), (STOP, "redirect")),
    **dict.fromkeys(range(400, 500), (ROW, "bad_request")),
    **dict.fromkeys(range(500, 600), (FREE, "server_error")),
    401: (PAUSE, "authentication"),
    402: (PAUSE, "payment_required"),
    403: (PAUSE, "forbidden"),
    404: (STOP, "not_found"),
    405: (STOP, "bad_request"),
    408: (FREE, "bad_request"),
    409: (FREE, "bad_request"),
    **dict.fromkeys((407, 426, 431), (STOP, "bad_request")),
    **dict.fromkeys((421, 423, 424, 425), (FREE, "bad_request")),
    429: (SLOW, "rate_limit"),
    499: (MAYBE, "bad_request"),
    501: (ROW, "not_supported"),
    503: (SLOW, "overloaded"),
    529: (SLOW, "overloaded"),
    **dict.fromkeys((504, 520, 521, 522, 523, 524), (MAYBE, "server_error")),
}


@pytest.mark.parametrize("status", range(300, 600))
def test_every_status_has_one_verdict(status: int) -> None:
    judgement = judged(status)
    assert judgement.error is not None
    assert (judgement.verdict, judgement.error.kind) == BY_STATUS[status]
    assert judgement.error.http_status == status
    assert str(status) in (judgement.error.message or "")
    assert not judgement.filtered


FAULTS: Mapping[Fault, Verdict] = {
    **dict.fromkeys(
        (Fault.DNS, Fault.REFUSED, Fault.CONNECT, Fault.TLS, Fault.STALE, Fault.UNSENT, Fault.KEY_REPLACED), FREE
    ),
    **dict.fromkeys((Fault.TIMEOUT, Fault.RESET, Fault.CUT, Fault.TOO_LARGE, Fault.ENCODING, Fault.MALFORMED), MAYBE),
    Fault.SENDER_LOST: MAYBE,
    Fault.CERTIFICATE: STOP,
}


@pytest.mark.parametrize("fault", Fault)
@pytest.mark.parametrize("body", [b"", FINE[:30], FINE[:-1]], ids=["no body", "cut", "without its last bracket"])
def test_every_fault_has_one_verdict(fault: Fault, body: bytes) -> None:
    error_type = APITimeoutError if fault is Fault.TIMEOUT else APIConnectionError
    exchange = attempt(200 if body else None, body, error=error_type("why", kind=fault, sent=True))
    judgement = judge(exchange, parse(body), Retry())
    assert judgement.verdict is FAULTS[fault]
    assert judgement.error == RowError(fault, exchange.http_status, None, "why")
    assert set(FAULT_VERDICTS) == set(Fault)


@pytest.mark.parametrize(
    ("page", "words"),
    [
        # haproxy's own
        (
            b"<html><body><h1>503 Service Unavailable</h1>\nNo server isn&#39;t busy.\n</body></html>\n",
            "503 Service Unavailable No server isn't busy.",
        ),
        (
            b"<!DOCTYPE html>\n<html><head><title>Just a moment...</title><style>" + b"a { b: c } " * 200 + b"</style>"
            b"<script>var x = '<b>';</script></head><!-- no --><body>Wait</body></html>",
            "Just a moment... Wait",
        ),
        (b"<?xml version='1.0'?><Error><Code>SlowDown</Code></Error>", "SlowDown"),
        (b"<html><script>" + b"x" * 20_000, "<html><script>" + "x" * 286),  # no words: what came
        (b"<think> 1 < 2", "<think> 1 < 2"),
    ],
)
def test_a_web_page_is_reported_by_its_words(page: bytes, words: str) -> None:
    error = judged(502, page).error
    assert error is not None
    assert error.message == f"HTTP 502: {words}"


def test_a_redirect_names_its_target_without_its_query() -> None:
    error = judged(302, b"<html>Found</html>", {"Location": "https://login.example/?token=1"}).error
    assert error is not None
    assert error.message == ("HTTP 302: the server redirects to https://login.example/, and redirects are not followed")


UNFINISHED = b'{"choices": [{"index": 0, "message": {"content": "Fi"}}]}'
CHUNK = b'{"choices": [{"index": 0, "delta": {"content": "Fi"}, "finish_reason": null}]}'


@pytest.mark.parametrize("fault", [Fault.TIMEOUT, Fault.RESET, Fault.CUT, Fault.ENCODING, Fault.TOO_LARGE])
@pytest.mark.parametrize(
    ("status", "body", "counts"),
    [
        pytest.param(200, FINE, ANSWERED, id="an answer"),
        pytest.param(200, gzip.compress(FINE)[:-8], None, id="packed bytes"),
        pytest.param(200, CHUNK, None, id="a chunk of a stream"),
        pytest.param(200, UNFINISHED, None, id="an answer without its end"),
        pytest.param(200, said("no luck"), None, id="an error inside 200"),
        pytest.param(429, b"Too many requ", judged(429, b"Too many requ"), id="a refusal"),
        pytest.param(500, b"", judged(500), id="a failure"),
    ],
)
def test_what_came_whole_counts_although_its_transfer_failed(
    fault: Fault, status: int, body: bytes, counts: Judgement | None
) -> None:
    """JSON ends with its last bracket, whatever length was announced; a refusal's status is enough."""
    judgement = judge(
        attempt(status, body, error=APIConnectionError("why", kind=fault, sent=True)), parse(body), Retry()
    )
    if counts is not None and fault in {Fault.TIMEOUT, Fault.RESET, Fault.CUT}:
        assert judgement == counts
    else:
        assert judgement.error == RowError(fault, status, None, "why")


@pytest.mark.parametrize("fault", [Fault.TIMEOUT, Fault.CUT, Fault.MALFORMED])
def test_a_stream_is_whole_with_its_last_mark(fault: Fault) -> None:
    """Whatever became of its connection afterwards."""
    error = APIConnectionError("why", kind=fault, sent=True)
    events = b"data: " + CHUNK.replace(b"null", b'"stop"') + b"\n\n"
    for body, verdict in ((events + b"data: [DONE]\n\n", OK), (b"data: " + CHUNK + b"\n\n", MAYBE)):
        ended = msgspec.structs.replace(attempt(200, body, error=error), streamed=True)
        assert judge(ended, parse(body), Retry()).verdict is verdict


ANTHROPIC_PACE = (
    "This request would exceed your organization's rate limit of 80,000 output tokens per minute. For details, refer "
    "to: https://h/rate-limits; see the response headers for current usage. Please reduce the prompt length or the "
    "maximum tokens requested, or try again later. You may also contact sales to discuss a rate limit increase."
)
GROQ_SIZE = "Limit 6000, Requested 6500, please reduce your message size and try again. Visit https://h for more."
MINIMAX = b'{"base_resp": {"status_code": 2056, "status_msg": "usage limit exceeded"}}'
OPENAI_RATE = "Rate limit reached for m on tokens per min (TPM). Add a payment method at https://h/account/billing."
AZURE_RATE = (
    "Requests have exceeded the rate limit of your tier. Please retry after 8 seconds. See https://h/quotaincrease"
)
QUOTA = "You exceeded your current quota, please check your plan and billing details."


@pytest.mark.parametrize(
    ("status", "body", "headers", "verdict", "kind"),
    [
        pytest.param(429, said(ANTHROPIC_PACE), {}, SLOW, "rate_limit", id="Anthropic's 429 of tokens a minute"),
        pytest.param(429, said(GROQ_SIZE), {}, ROW, "bad_request", id="Groq's 429 for one request's size"),
        pytest.param(200, FINE, {}, OK, None, id="200"),
        pytest.param(201, FINE, {}, OK, None, id="201"),
        pytest.param(200, b"", {}, MAYBE, "unreadable", id="200 empty"),
        pytest.param(200, b"<html>", {}, MAYBE, "unreadable", id="200 HTML"),
        pytest.param(200, FINE[:-5], {}, MAYBE, "unreadable", id="200 cut"),
        pytest.param(200, b'{"choices":[]}', {}, MAYBE, "unreadable", id="200 no choice"),
        pytest.param(200, said("broken"), {}, MAYBE, "error_in_answer", id="200 error"),
        pytest.param(200, said("broken", "500"), {}, FREE, "server_error", id="200 error 500"),
        pytest.param(200, said("slow down", 429), {}, SLOW, "rate_limit", id="200 error 429"),
        pytest.param(200, said("key", 401), {}, PAUSE, "authentication", id="200 error 401"),
        pytest.param(200, said("Content Policy Violation", 503), {}, ROW, "content_policy", id="200 error 503"),
        pytest.param(200, MINIMAX, {}, SLOW, "quota", id="200 MiniMax's plan is used up"),
        pytest.param(200, said("daily quota exceeded", 70002), {}, SLOW, "quota", id="200 error of a quota"),
        pytest.param(200, said("odd", 200), {}, MAYBE, "error_in_answer", id="200 error 200"),
        pytest.param(200, said("odd", 70001), {}, MAYBE, "error_in_answer", id="200 error of its own numbers"),
        pytest.param(403, said("Insufficient balance"), {}, PAUSE, "forbidden", id="403 balance"),
        pytest.param(403, said("No access to this model"), {}, PAUSE, "forbidden", id="403 permission"),
        pytest.param(403, b"<html>denied</html>", {}, PAUSE, "forbidden", id="403 HTML"),
        pytest.param(403, said("flagged by moderation"), {}, ROW, "content_policy", id="403 moderation"),
        pytest.param(403, said("no", "content_policy_violation"), {}, ROW, "content_policy", id="403 policy code"),
        pytest.param(451, said("flagged by moderation"), {}, ROW, "content_policy", id="451 moderation"),
        pytest.param(451, said("Not available in your country"), {}, ROW, "bad_request", id="451 law"),
        pytest.param(
            429, said(OPENAI_RATE, "rate_limit_exceeded"), {}, SLOW, "rate_limit", id="429 rate, with an offer"
        ),
        pytest.param(429, said(AZURE_RATE, "429"), {}, SLOW, "rate_limit", id="429 rate, with quota in a link"),
        pytest.param(
            429,
            said("Quota exceeded for metric 'requests per minute'"),
            {},
            SLOW,
            "rate_limit",
            id="429 quota a minute",
        ),
        pytest.param(429, b"<html>", {}, SLOW, "rate_limit", id="429 HTML"),
        pytest.param(429, said(QUOTA, "insufficient_quota"), {}, PAUSE, "insufficient_quota", id="429 quota"),
        pytest.param(
            429,
            said("rate limit", "billing_hard_limit_reached"),
            {},
            PAUSE,
            "insufficient_quota",
            id="429 billing code",
        ),
        pytest.param(429, said("Your credit balance is too low"), {}, PAUSE, "insufficient_quota", id="429 credit"),
        pytest.param(429, said("monthly spend limit"), {}, PAUSE, "insufficient_quota", id="429 spend"),
        pytest.param(429, b"", {"retry-after": "900"}, SLOW, "rate_limit", id="429 wait allowed"),
        pytest.param(429, b"", {"retry-after": "901"}, PAUSE, "rate_limit", id="429 wait too long"),
        pytest.param(503, said("Content Policy Violation"), {}, ROW, "content_policy", id="503 policy"),
        pytest.param(
            503,
            said("Content Policy Violation; do not try again"),
            {},
            ROW,
            "content_policy",
            id="503 policy beats load",
        ),
        pytest.param(503, said("blocked"), {}, ROW, "content_policy", id="503 JSON"),
        pytest.param(
            503, said("Content Policy Violation"), {"retry-after": "1"}, SLOW, "overloaded", id="503 with a wait"
        ),
        pytest.param(503, said("no"), {"retry-after-ms": "1"}, SLOW, "overloaded", id="503 with a wait in ms"),
        pytest.param(503, said("The server is overloaded"), {}, SLOW, "overloaded", id="503 overloaded"),
        pytest.param(503, said("x", "service_unavailable"), {}, SLOW, "overloaded", id="503 overload code"),
        pytest.param(503, b'{"detail":"Service Unavailable"}', {}, SLOW, "overloaded", id="503 detail"),
        pytest.param(
            503,
            b'{"error":{"code":503,"message":"Loading model","type":"x"}}',
            {},
            SLOW,
            "overloaded",
            id="503 loading",
        ),
        pytest.param(503, b'{"errors":[{"reason":"no healthy upstream"}]}', {}, SLOW, "overloaded", id="503 errors"),
        pytest.param(503, b"no healthy upstream", {}, SLOW, "overloaded", id="503 text"),
        pytest.param(503, b"<html>", {}, SLOW, "overloaded", id="503 HTML"),
        pytest.param(503, b"[]", {}, SLOW, "overloaded", id="503 list"),
        pytest.param(503, b"{}", {}, SLOW, "overloaded", id="503 says nothing"),
        pytest.param(503, said("overloaded"), {"retry-after": "3600"}, PAUSE, "overloaded", id="503 wait too long"),
        pytest.param(529, said("overloaded_error"), {}, SLOW, "overloaded", id="529"),
        pytest.param(400, said("bad"), {"x-should-retry": "true"}, FREE, "bad_request", id="400 should retry"),
        pytest.param(500, said("image input is not supported"), {}, ROW, "not_supported", id="500 can't do it"),
        pytest.param(500, b"not supported", {}, FREE, "server_error", id="500 that no server of a model wrote"),
        pytest.param(500, said("bad"), {"x-should-retry": "false"}, ROW, "server_error", id="500 should not retry"),
        pytest.param(504, said("bad"), {"x-should-retry": "false"}, ROW, "server_error", id="504 should not retry"),
        pytest.param(500, said("bad"), {"x-should-retry": "maybe"}, FREE, "server_error", id="500 odd header"),
        pytest.param(429, b"", {"x-should-retry": "false"}, SLOW, "rate_limit", id="429 should not retry"),
        pytest.param(401, b"", {"x-should-retry": "true"}, PAUSE, "authentication", id="401 should retry"),
        pytest.param(503, said("blocked"), {"x-should-retry": "true"}, FREE, "content_policy", id="503 should retry"),
        pytest.param(500, b"", {"retry-after": "3600"}, FREE, "server_error", id="500 with a long wait"),
    ],
)
def test_body_and_headers_refine_the_status(
    status: int, body: bytes, headers: dict[str, str], verdict: Verdict, kind: str | None
) -> None:
    judgement = judged(status, body, headers)
    assert judgement.verdict is verdict
    assert (judgement.error.kind if judgement.error else None) == kind
    assert judgement.filtered == (verdict is ROW and kind == "content_policy")


@pytest.mark.parametrize(
    ("status", "headers", "first_token_s", "code", "verdict", "in_doubt"),
    [
        (504, {}, None, None, MAYBE, True),
        (504, {"x-should-retry": "false"}, None, None, ROW, True),
        (500, {"x-should-retry": "false"}, None, None, ROW, False),
        (500, {}, None, None, FREE, False),
        (200, {}, None, 500, FREE, False),
        (200, {}, 0.4, 500, MAYBE, True),  # tokens had come before the error stood in the stream
        (200, {}, 0.4, 429, SLOW, True),
        (200, {}, 0.4, 400, ROW, True),
        (429, {}, None, None, SLOW, False),
        (402, {}, None, None, PAUSE, False),
    ],
)
def test_billed_attempts_are_counted_whatever_follows(
    status: int,
    headers: dict[str, str],
    first_token_s: float | None,
    code: int | None,
    verdict: Verdict,
    in_doubt: bool,
) -> None:
    body = said("odd", code)
    ended = msgspec.structs.replace(attempt(status, body, headers), time_to_first_token_s=first_token_s)
    judgement = judge(ended, parse(body), Retry())
    assert (judgement.verdict, judgement.in_doubt) == (verdict, in_doubt)


def test_only_certainly_unbilled_ends_are_free() -> None:
    in_doubt = {
        fault
        for fault in Fault
        if judge(attempt(None, error=APIConnectionError("x", kind=fault, sent=True)), Answer(), Retry()).in_doubt
    }
    certain = {
        Fault.DNS,
        Fault.REFUSED,
        Fault.CONNECT,
        Fault.TLS,
        Fault.CERTIFICATE,
        Fault.STALE,
        Fault.UNSENT,
        Fault.KEY_REPLACED,
    }
    assert in_doubt == set(Fault) - certain


def test_errors_repeat_the_server_bounded() -> None:
    judgement = judged(400, said("context is too long", "context_length_exceeded"))
    assert judgement.error == RowError("bad_request", 400, "context_length_exceeded", "context is too long")
    html = judged(502, b"<html>\r\n <b>Bad   gateway</b>\xff")
    assert html.error is not None
    assert html.error.message == "HTTP 502: Bad gateway \ufffd"
    long = judged(400, said("x" * 9000))
    assert long.error is not None
    assert len(long.error.message or "") == 1000
    fault = APIConnectionError("x" * 9000, kind=Fault.MALFORMED, sent=True)
    broken = judge(attempt(None, error=fault), Answer(), Retry()).error
    assert broken is not None
    assert len(broken.message or "") == 1000


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the answer is empty"),
        (b"[1]", "the answer is not a chat completion: [1]"),
        (b"<html><h1>Hi</h1>", "the answer is not a chat completion, but a web page: Hi"),
    ],
)
def test_an_unreadable_answer_is_described(body: bytes, message: str) -> None:
    error = judged(200, body).error
    assert error is not None
    assert error.message == message


# -- Retry-After


@pytest.fixture
def far_from_greenwich() -> Iterator[None]:
    """A date without a zone is not in this machine's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


def http_date(at: float) -> str:
    return email.utils.formatdate(at, usegmt=True)


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": " 7.5 "}, 7.5),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "abc"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "1e9"}, None),
        ({"retry-after": "1000000000"}, 1e9),
        ({"retry-after": "9" * 30}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "10s"}, 10.0),
        ({"retry-after": "500ms"}, 0.5),
        ({"retry-after": "1m30s"}, 90.0),
        ({"retry-after": "10 seconds"}, 10.0),
        ({"retry-after": f"{NOW + 20:.0f}"}, 20.0),
        ({"retry-after": f"{(NOW + 20) * 1000:.0f}"}, 20.0),
        ({"retry-after": f"{NOW - 20:.0f}"}, None),
        ({"retry-after": "2026-11-22T12:00:20Z"}, 20.0),
        ({"retry-after": "2026-11-22T12:00:20"}, 20.0),
        ({"retry-after": "2026-11-22T11:00:00Z"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "5, 60"}, None),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "7"}, 7.0),
        ({"x-ms-retry-after-ms": "1500", "retry-after": "2"}, 1.5),  # Azure/azure-sdk-for-python issue 9092
        ({"retry-after": http_date(NOW + 30)}, 30.0),
        ({"retry-after": http_date(NOW - 30)}, None),
        ({"retry-after": http_date(NOW)}, None),
        ({"retry-after": http_date(NOW + 3630), "date": http_date(NOW + 3600)}, 30.0),
        ({"retry-after": http_date(NOW - 3570), "date": http_date(NOW - 3600)}, 30.0),
        ({"retry-after": http_date(NOW + 30), "date": "yesterday"}, 30.0),
        ({"retry-after": "Sun Nov 22 12:00:30 2026"}, 30.0),
        ({"retry-after": "Mon, 99 Nov 2026 25:00:00 GMT"}, None),
        ({"retry-after": "Sun, 22 Nov 99999999999 12:00:00 GMT"}, None),
    ],
)
@pytest.mark.usefixtures("far_from_greenwich")
def test_every_retry_after_form_is_parsed(headers: dict[str, str], wait_s: float | None) -> None:
    assert retry_after_s(CIMultiDict(headers), NOW) == wait_s
    assert judged(429, headers=headers).retry_after_s == wait_s


RESETS = {
    "openai": ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m2.5s"}, 62.5),
    "openai, tokens": (
        {
            "x-ratelimit-remaining-requests": "59",
            "x-ratelimit-reset-requests": "1s",
            "x-ratelimit-remaining-tokens": "0",
            "x-ratelimit-reset-tokens": "6m0s",
        },
        360.0,
    ),
    "groq, a day's requests": (  # console.groq.com/docs/rate-limits: requests per day, tokens per minute
        {
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-reset-requests": "2h30m",
            "x-ratelimit-remaining-tokens": "17997",
            "x-ratelimit-reset-tokens": "7.66s",
        },
        9_000.0,
    ),
    "anthropic": (  # anthropics/anthropic-sdk-typescript issue 357
        {
            "anthropic-ratelimit-requests-remaining": "0",
            "anthropic-ratelimit-requests-reset": "2026-11-22T12:00:20Z",
            "anthropic-ratelimit-tokens-remaining": "0",
            "anthropic-ratelimit-tokens-reset": "2026-11-22T12:00:35Z",
            "anthropic-ratelimit-input-tokens-remaining": "9000",
            "anthropic-ratelimit-input-tokens-reset": "2026-11-22T12:00:50Z",
        },
        35.0,
    ),
    "anthropic, a skewed clock": (
        {
            "anthropic-ratelimit-requests-remaining": "0",
            "anthropic-ratelimit-requests-reset": "2026-11-22T13:00:20Z",
            "date": email.utils.formatdate(NOW + 3_600, usegmt=True),
        },
        20.0,
    ),
    "discord": ({"x-ratelimit-remaining": "0", "x-ratelimit-reset-after": "0.65"}, 0.65),  # discord-api-docs issue 127
    "github": ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": f"{NOW + 90:.0f}"}, 90.0),
    "openrouter, milliseconds": ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": f"{(NOW + 12) * 1000:.0f}"}, 12.0),
    "whoop": ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": "3"}, 3.0),  # developer.whoop.com, "Rate Limiting"
    "gitlab": ({"ratelimit-remaining": "0", "ratelimit-reset": f"{NOW + 30:.0f}"}, 30.0),
    "draft 5": ({"ratelimit-limit": "100", "ratelimit-remaining": "0", "ratelimit-reset": "50"}, 50.0),
    "draft 7": ({"ratelimit": "limit=100, remaining=0, reset=5", "ratelimit-policy": "100;w=10"}, 5.0),
    "draft 10": ({"ratelimit": '"default";r=0;t=30', "ratelimit-policy": '"default";q=50;w=60'}, 30.0),
    "draft 10, two policies": ({"ratelimit": '"minute";r=0;t=20, "day";r=900;t=40000'}, 20.0),
    "no remaining": ({"ratelimit-reset": "7"}, 7.0),
    "something is left": ({"x-ratelimit-remaining-requests": "12", "x-ratelimit-reset-requests": "20s"}, None),
    "in the past": ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": f"{NOW - 5:.0f}"}, None),
    "a month": ({"ratelimit-remaining": "0", "ratelimit-reset": "1900000"}, None),
    "nonsense": ({"ratelimit-remaining": "0", "ratelimit-reset": "soon", "ratelimit": "x;t=;r="}, None),
}
"""The wait that each vendor's headers mean beside a 429 without Retry-After."""


@pytest.mark.parametrize(("headers", "wait_s"), RESETS.values(), ids=RESETS)
def test_a_stated_reset_is_waited_for(headers: dict[str, str], wait_s: float | None) -> None:
    assert reset_s(CIMultiDict(headers), NOW) == (None if wait_s is None else pytest.approx(wait_s))
    waits_s = judged(429, headers=headers).retry_after_s
    assert waits_s == (None if wait_s is None else pytest.approx(wait_s))
    assert judged(429, headers=headers | {"retry-after": "1"}).retry_after_s == 1.0
    assert judged(500, headers=headers).retry_after_s is None
    assert judged(503, headers=headers).retry_after_s is None


def test_a_reset_hours_away_pauses_the_run() -> None:
    pause = judged(429, headers=RESETS["groq, a day's requests"][0])
    assert pause.verdict is PAUSE
    assert pause.error is not None
    assert "asks to wait 9000 s" in (pause.error.message or "")


def test_of_two_retry_after_headers_the_first_counts() -> None:
    assert retry_after_s(CIMultiDict([("Retry-After", "5"), ("Retry-After", "60")]), NOW) == 5.0


@given(
    st.text(max_size=60) | st.from_regex(r"\w{3}, \d{1,3} \w{3} \d{1,5} \d+:\d+:\d+ [+-]?\w{1,6}", fullmatch=True),
    st.text(max_size=40),
)
def test_no_header_raises_and_no_wait_is_negative(text: str, date: str) -> None:
    for name in ("retry-after", "retry-after-ms"):
        wait_s = retry_after_s({name: text, "date": date}, NOW)
        assert wait_s is None or wait_s >= 0


# -- caps


def reported(verdict: Verdict, status: int | None = None) -> Judgement:
    return Judgement(verdict, RowError("kind", status))


@pytest.mark.parametrize(
    ("judgement", "counted", "counted_5xx", "maybe_billed"),
    [
        (reported(FREE), 1, 0, 0),
        (reported(FREE, 408), 1, 0, 0),
        (reported(FREE, 500), 1, 1, 0),
        (reported(MAYBE), 1, 0, 1),
        (reported(MAYBE, 200), 1, 0, 1),
        (reported(MAYBE, 504), 1, 1, 1),
        (reported(SLOW, 429), 0, 0, 0),
        (reported(SLOW, 503), 1, 0, 0),
        (reported(SLOW, 529), 1, 0, 0),
        (reported(PAUSE, 401), 0, 0, 0),
        (reported(STOP, 404), 0, 0, 0),
        (reported(STOP), 0, 0, 0),
    ],
)
def test_an_attempt_counts_only_with_other_successes(
    judgement: Judgement, counted: int, counted_5xx: int, maybe_billed: int
) -> None:
    before = History(3, 2, 1, 0)
    assert after(before, judgement, corroborated=False) == History(4, 2, 1, 0)
    charged = History(4, 2 + counted, 1 + counted_5xx, maybe_billed)
    assert after(before, judgement, corroborated=True) == msgspec.structs.replace(charged, corroborated=counted)
    assert after(before, judgement, corroborated=False, at_end=True) == charged


@pytest.mark.parametrize(
    ("judgement", "retry", "wait_s"),
    [
        (reported(FREE, 500), Retry(), 30.0),
        (reported(FREE, 408), Retry(), 18.0),
        (reported(SLOW, 503), Retry(), 18.0),
        (reported(MAYBE), Retry(), 90.0),
        (reported(MAYBE, 504), Retry(), 90.0),
        (reported(MAYBE), Retry(max_maybe_billed=0), 90.0),
        (reported(FREE, 500), Retry(max_outage_s=10), 5 / 3),
        (reported(FREE, 500), Retry(max_5xx=1), 90.0),
    ],
)
def test_without_successes_attempts_last_ninety_seconds(judgement: Judgement, retry: Retry, wait_s: float) -> None:
    assert end_wait_s(History(1, 1), judgement, retry) == wait_s
    assert end_wait_s(History(2, 2, corroborated=1), judgement, retry) == 0


@pytest.mark.parametrize(
    ("judgement", "attempts"),
    [
        (reported(FREE), 6),
        (reported(FREE, 500), 4),
        (reported(FREE, 408), 6),
        (reported(MAYBE), 2),
        (reported(SLOW, 503), 6),
        (reported(SLOW, 429), None),
        (reported(PAUSE, 401), None),
    ],
)
def test_a_row_is_given_up_at_its_cap(judgement: Judgement, attempts: int | None) -> None:
    history = History()
    for n in range(1, 100):
        history = after(history, judgement, corroborated=True)
        assert exhausted(history, Retry()) == (attempts is not None and n >= attempts)


def test_an_outage_gives_up_no_row() -> None:
    history = History()
    for judgement in [reported(FREE, 500), reported(MAYBE), reported(SLOW, 503)] * 1000:
        history = after(history, judgement, corroborated=False)
    assert not exhausted(history, Retry())
    assert history.attempts == 3000


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.3, 0.4, 0.5])
def test_random_failures_use_up_no_caps(share: float) -> None:
    history, attempts = History(), 0
    while not exhausted(history, Retry(), stretch(share)):
        history, attempts = after(history, reported(FREE, 500), corroborated=True), attempts + 1
    assert 1e-8 < share**attempts <= 1e-6
    assert stretch(0.0) == stretch(0.03) == 1.0
    assert 1 < stretch(share) <= stretch(0.9) == stretch(1.0) == 5


def test_possibly_billed_attempts_have_one_cap() -> None:
    twice = after(after(History(), reported(MAYBE), corroborated=True), reported(MAYBE), corroborated=True)
    assert exhausted(twice, Retry(), stretch(0.9))


def test_the_failing_share_is_of_recent_attempts() -> None:
    share = 0.0
    for n in range(1_000):
        share = share_of_first(share, History(1), counts=n % 10 < 3)
        share = share_of_first(share, History(2), counts=True)
    assert 0.2 < share < 0.4
    for _ in range(200):
        share = share_of_first(share, History(1), counts=False)
    assert share < 0.01


def test_maybe_billed_zero_gives_up_at_the_first() -> None:
    retry = Retry(max_maybe_billed=0)
    assert exhausted(after(History(), reported(MAYBE), corroborated=True), retry)
    assert not exhausted(after(History(), reported(FREE), corroborated=True), retry)


# -- waits

UNIFORM = st.floats(0, 1, exclude_max=True)
RETRIES = st.builds(
    Retry,
    max_wait_s=st.floats(0.1, 1e6),
    backoff_base_s=st.floats(0.001, 1e3),
    backoff_cap_s=st.floats(0.001, 1e4),
)


@given(RETRIES, st.integers(0, 10**6), st.none() | st.floats(0, 1e12), UNIFORM)
def test_a_wait_is_bounded_by_retry_after(retry: Retry, attempts: int, floor_s: float | None, uniform: float) -> None:
    wait_s = backoff_s(History(attempts=attempts), floor_s, retry, uniform)
    assert min(floor_s or 0, retry.max_wait_s) <= wait_s <= retry.max_wait_s + retry.backoff_cap_s


@pytest.mark.parametrize(("attempts", "ceiling_s"), [(1, 1), (2, 2), (3, 4), (6, 32), (7, 60), (100, 60)])
def test_the_ceiling_doubles_up_to_its_cap(attempts: int, ceiling_s: float) -> None:
    assert backoff_s(History(attempts=attempts), None, Retry(), 0.0) == 0
    assert backoff_s(History(attempts=attempts), None, Retry(), 0.5) == ceiling_s / 2


def test_late_waits_still_have_jitter() -> None:
    late = History(attempts=50)
    waits = {backoff_s(late, 10.0, Retry(), uniform / 100) for uniform in range(100)}
    assert len(waits) == 100
    assert min(waits) == 10.0
    assert max(waits) < 70.0


# -- the status of an answer


@pytest.mark.parametrize(
    ("answer", "status", "status_of_json"),
    [
        ({"content": "Fine.", "finish_reason": "stop"}, Status.OK, Status.INVALID),
        ({"content": '{"a":1}', "finish_reason": "stop"}, Status.OK, Status.OK),
        ({"content": "NaN", "finish_reason": "stop"}, Status.OK, Status.INVALID),
        ({"content": "Fine."}, Status.OK, Status.INVALID),
        ({"content": "Fi", "finish_reason": "length"}, Status.TRUNCATED, Status.TRUNCATED),
        ({"content": None, "finish_reason": "length"}, Status.TRUNCATED, Status.TRUNCATED),
        ({"content": None, "finish_reason": "content_filter"}, Status.FILTERED, Status.FILTERED),
        ({"content": "", "finish_reason": "stop"}, Status.EMPTY, Status.EMPTY),
        ({"content": None}, Status.EMPTY, Status.EMPTY),
        ({"function_call": FunctionCall("f", "{}"), "finish_reason": "function_call"}, Status.OK, Status.OK),
        ({"tool_calls": "[]", "finish_reason": "tool_calls"}, Status.OK, Status.OK),
        ({"finish_reason": "tool_calls"}, Status.EMPTY, Status.EMPTY),
        ({"content": "Fine.", "finish_reason": "tool_calls"}, Status.OK, Status.INVALID),
    ],
)
def test_a_usable_answer_ends_by_its_finish_reason(
    answer: dict[str, Any], status: Status, status_of_json: Status
) -> None:
    whole = msgspec.convert({"completion": True, **answer}, Answer)
    assert settlement(whole, ANYTHING, Finish()).status is status
    settled = settlement(whole, Expected(in_json=True), Finish())
    assert settled.status is status_of_json
    assert settled.in_json == (status_of_json is Status.OK and whole.content is not None)


ANSWERS_BY_REASON: dict[str, tuple[dict[str, Any], Status, Status]] = {
    # setting of [finish]: an answer, its status when it is accepted, and when it is not
    "stop": ({"content": "Fine.", "finish_reason": "stop"}, Status.OK, Status.INVALID),
    "length": ({"content": "Fi", "finish_reason": "length"}, Status.TRUNCATED, Status.TRUNCATED),
    "function_call": (
        {"function_call": FunctionCall("f", "{}"), "finish_reason": "function_call"},
        Status.OK,
        Status.INVALID,
    ),
    "content_filter": ({"content": "F", "finish_reason": "content_filter"}, Status.FILTERED, Status.FILTERED),
    "empty": ({"content": "", "finish_reason": "stop"}, Status.EMPTY, Status.EMPTY),
    "refusal": ({"refusal": "I can't help.", "finish_reason": "stop"}, Status.REFUSED, Status.REFUSED),
    "other": ({"content": "Fine.", "finish_reason": "quux"}, Status.OK, Status.INVALID),
}


@pytest.mark.parametrize("reason", Finish.__struct_fields__)
@pytest.mark.parametrize("action", ["accept", "fail", "retry"])
def test_the_job_judges_each_finish_reason(reason: str, action: str) -> None:
    given, accepted, refused = ANSWERS_BY_REASON[reason]
    whole = msgspec.convert({"completion": True, **given}, Answer)
    finish = msgspec.convert({reason: action}, Finish)
    settled = settlement(whole, ANYTHING, finish, 200)
    assert (settled.status, settled.action) == (accepted if action == "accept" else refused, action)
    counts = settled.status in failing(finish)
    assert counts == (action != "accept")
    assert (settled.error is None) == (action == "accept" and reason != "empty")
    for other, (text, *_) in ANSWERS_BY_REASON.items():
        unchanged = settlement(msgspec.convert({"completion": True, **text}, Answer), ANYTHING, finish, 200)
        assert other == reason or unchanged.action == getattr(Finish(), other)


def test_an_answer_without_a_reason_is_any_other() -> None:
    whole = Answer(completion=True, content="Fine.")
    assert settlement(whole, ANYTHING, Finish(other="fail")).status is Status.INVALID
    assert settlement(whole, ANYTHING, Finish(stop="fail", length="fail")).status is Status.OK


def test_discarded_answers_count_as_attempts() -> None:
    history, sent = History(attempts=1), 1
    while (
        again := after_unwanted_answer(history, Settlement(Status.TRUNCATED, "retry"), Retry(max_attempts=3))
    ) is not None:
        history, sent = msgspec.structs.replace(again, attempts=again.attempts + 1), sent + 1
    assert sent == 3
    assert after_unwanted_answer(History(attempts=1), Settlement(Status.TRUNCATED, "fail"), Retry()) is None
    assert after_unwanted_answer(History(attempts=1), Settlement(Status.OK), Retry()) is None


def test_invalid_answers_retry_as_configured() -> None:
    wrong = settlement(Answer(completion=True, content="no"), Expected(in_json=True), Finish())
    assert after_unwanted_answer(History(attempts=1), wrong, Retry()) is None
    again = after_unwanted_answer(History(attempts=1, counted=5), wrong, Retry(invalid=2))
    assert again == History(attempts=1, counted=5, corrected=1)
    assert after_unwanted_answer(History(attempts=3, corrected=2), wrong, Retry(invalid=2)) is None
    refused = settlement(Answer(completion=True, content="no", finish_reason="stop"), ANYTHING, Finish(stop="fail"))
    assert after_unwanted_answer(History(attempts=1), refused, Retry(invalid=2)) is None
    kept = after(History(corrected=1), Judgement(Verdict.FREE, RowError("reset")), corroborated=True)
    assert kept.corrected == 1


def test_a_truncated_answer_is_not_validated() -> None:
    for reason, status in (("length", Status.TRUNCATED), ("content_filter", Status.FILTERED)):
        settled = settlement(
            Answer(completion=True, content='{"a": 1', finish_reason=reason), Expected(in_json=True), Finish()
        )
        assert (settled.status, settled.error, settled.in_json) == (status, None, False)


def test_calls_are_validated_beside_content() -> None:
    expected = of({"type": "json_object"}, [{"name": "f", "parameters": {"type": "object", "required": ["a"]}}])
    for arguments, status in (('{"a":1}', Status.OK), ("{}", Status.INVALID), ("{", Status.INVALID)):
        call = Answer(completion=True, content="no JSON", function_call=FunctionCall("f", arguments))
        settled = settlement(call, expected, Finish(), 200)
        assert settled.status is status
        assert not settled.in_json
        assert settled.error is None or settled.error.http_status == 200


def test_a_random_last_refusal_waits_its_retry_after() -> None:
    refused = Judgement(Verdict.SLOW, RowError("rate_limit", 429, None, "slow down"), retry_after_s=1.0)
    failed = Judgement(Verdict.FREE, RowError("server_error", 500, None, "broken"))
    assert attempt_caps.end_wait_s(History(attempts=1), refused, Retry()) == 0.0
    assert attempt_caps.end_wait_s(History(attempts=1), failed, Retry()) > 10.0


def refusal(kind: str = "rate_limit") -> Judgement:
    return Judgement(Verdict.SLOW, RowError(kind, 429))


def after_refusals(count: int, *, corroborated: bool, at_end: bool, kind: str = "rate_limit") -> History:
    history = History()
    for _ in range(count):
        history = attempt_caps.refused(history, refusal(kind), corroborated=corroborated, at_end=at_end)
    return history


@pytest.mark.parametrize(
    ("corroborated", "at_end", "kind", "share", "given_up_after"),
    [
        (True, False, "rate_limit", 0.0, 24),
        (True, False, "rate_limit", 0.5, 122),  # a fair coin does not fall the same way 122 times in a row
        (True, True, "rate_limit", 0.0, 24),
        (False, True, "rate_limit", 0.0, 6),
        (False, True, "rate_limit", 0.5, 6),
        (False, True, "quota", 0.0, None),
        (False, False, "rate_limit", 0.0, None),
    ],
)
def test_a_refused_row_needs_others_answered(
    corroborated: bool, at_end: bool, kind: str, share: float, given_up_after: int | None
) -> None:
    """It is given up only where other rows are answered or none is left."""
    counts = [
        count
        for count in range(200)
        if attempt_caps.is_refused_for_good(
            after_refusals(count, corroborated=corroborated, at_end=at_end, kind=kind), Retry(), share
        )
    ]
    assert next(iter(counts), None) == given_up_after


def test_an_answer_proves_the_limit_passes_rows() -> None:
    alone = after_refusals(5, corroborated=False, at_end=True)
    assert attempt_caps.refused(alone, refusal(), corroborated=True, at_end=True).refused_alone == 0


@pytest.mark.parametrize(("left", "wait_s"), [(0, 75.0), (12, 150.0), (1_000_000, 900.0)])
def test_refusals_at_the_end_are_spread(left: int, wait_s: float) -> None:
    few, many = (after_refusals(count, corroborated=False, at_end=True) for count in (1, 2))
    assert attempt_caps.end_wait_s(few, refusal(), Retry(), left) == 0.0
    assert attempt_caps.end_wait_s(many, refusal(), Retry(), left) == wait_s


@pytest.mark.parametrize(("attempts", "refused", "ceiling_s"), [(1, 1, 1), (5, 5, 1), (6, 4, 2), (6, 6, 4), (7, 7, 8)])
def test_few_refusals_without_a_stated_wait_double_nothing(attempts: int, refused: int, ceiling_s: float) -> None:
    """Refused by chance, a row is not kept for half a minute at the end of a run."""
    history = History(attempts=attempts, refused=refused)
    assert attempt_caps.backoff_s(history, None, Retry(), 0.5) == ceiling_s / 2


def test_repeated_refusals_wait_ever_longer() -> None:
    usual, stubborn = History(attempts=9, refused=5), History(attempts=10, refused=10)
    assert attempt_caps.backoff_s(usual, 1.0, Retry(), 0.999) < 2.0
    assert attempt_caps.backoff_s(stubborn, 1.0, Retry(), 0.999) > 50.0
