"""A stream against real sockets: it is read as long as it lives, kept when it is cut, and let go when it is done."""

import asyncio
import gzip
import json
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from batchrun import policy
from batchrun.errors import APITimeoutError
from batchrun.job.settings import Retry
from batchrun.records import Attempt, Verdict
from batchrun.response import answer as answers
from batchrun.response.packed import MARK, plain
from tests.fault_server import Exchange, Script, serving
from tests.run.test_exchange import closes, exchange_all, kind_of, resets
from tests.timing import TIMER_S
from tests.wires import KEY, client_of, run, wire

pytestmark = pytest.mark.sampled(8)

__all__ = ["wire"]  # the fixture that runs each test on every wire

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


def event(delta: dict[str, Any] | None = None, finish_reason: str | None = None, **fields: Any) -> bytes:
    choice = {"index": 0, "delta": delta or {}, "finish_reason": finish_reason}
    return f"data: {json.dumps({'id': 'c-1', 'model': 'm', 'choices': [choice], **fields})}\n\n".encode()


ROLE = event({"role": "assistant", "content": ""})
FI, NE = event({"content": "Fi"}), event({"content": "ne."})
STOP = event(finish_reason="stop")
USAGE = event(choices=[], usage={"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5})
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
WHOLE = (ROLE, FI, NE, STOP, USAGE, DONE)

Step = bytes | float | Callable[[Exchange], Awaitable[None]]


def chunk(part: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(part), part)


def streams(*steps: Step, head: bytes = HEAD) -> Script:
    """A server that sends the bytes as chunks of their own, waits the seconds and does what else there is."""

    async def script(exchange: Exchange) -> None:
        await exchange.send(head)
        for step in steps:
            if isinstance(step, bytes):
                await exchange.send(chunk(step))
            elif isinstance(step, float):
                await asyncio.sleep(step)
            else:
                await step(exchange)

    return script


async def ends(exchange: Exchange) -> None:
    await exchange.send(END)


def ended(*steps: Step, head: bytes = HEAD, **endpoint: Any) -> Attempt:
    (attempt,), _ = exchange_all(streams(*steps, head=head), **endpoint)
    return attempt


def judged(attempt: Attempt) -> policy.Judgement:
    return policy.judge(attempt, answers.parse(attempt.body), Retry())


def content(attempt: Attempt) -> str | None:
    return answers.parse(attempt.body).content


# -- what is kept


@pytest.mark.parametrize("size", [1, 2, 7, 10_000])
def test_a_stream_is_kept_byte_for_byte(size: int) -> None:
    raw = PING + b"".join(WHOLE)
    attempt = ended(*(raw[at : at + size] for at in range(0, len(raw), size)), ends)
    assert (attempt.error, attempt.streamed) == (None, True)
    assert attempt.body.startswith(MARK)
    assert plain(attempt.body) == raw
    assert answers.parse(attempt.body) == answers.parse(raw)
    assert judged(attempt).verdict is Verdict.OK


def test_a_key_across_two_pieces_is_removed() -> None:
    named = event({"content": f"for {KEY} and {KEY}"})
    raw = named * 400  # more than is gathered before it is packed
    attempt = ended(*(raw[at : at + 13] for at in range(0, len(raw), 13)), DONE, ends)
    assert plain(attempt.body) == raw.replace(KEY.encode(), b"[redacted]") + DONE


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_compressed_stream_is_unpacked(encoding: str) -> None:
    raw = b"".join(WHOLE)
    squeezed = gzip.compress(raw) if encoding == "gzip" else zlib.compress(raw)
    head = HEAD[:-2] + f"Content-Encoding: {encoding}\r\n\r\n".encode()
    assert plain(ended(squeezed[:50], squeezed[50:], ends, head=head).body) == raw


def test_the_bound_counts_what_a_stream_is_unpacked() -> None:
    squeezed = gzip.compress(FI * 100_000)
    head = HEAD[:-2] + b"Content-Encoding: gzip\r\n\r\n"
    attempt = ended(squeezed, ends, head=head, max_answer_bytes=100_000)
    assert len(squeezed) < 100_000
    assert kind_of(attempt) == "answer_too_large"
    assert 0 < len(plain(attempt.body)) <= 100_000
    assert set(content(attempt) or "") == {"F", "i"}


def test_a_refusal_of_a_stream_is_whole() -> None:
    body = b'{"error":{"message":"no"}}'
    head = HEAD.replace(b"200 OK", b"400 Bad Request")
    attempt = ended(body, ends, head=head)
    assert (attempt.http_status, attempt.body, attempt.streamed) == (400, body, False)


def test_an_unstreamed_answer_is_read() -> None:
    body = b'{"choices":[{"message":{"content":"Fine."},"finish_reason":"stop"}]}'
    for content_type in (b"text/event-stream", b"application/json"):
        attempt = ended(body, ends, head=HEAD.replace(b"text/event-stream", content_type))
        assert (content(attempt), judged(attempt).verdict) == ("Fine.", Verdict.OK)
        assert attempt.time_to_first_token_s is None


# -- the first token


@pytest.mark.parametrize(
    "first",
    [
        {"content": "Fi"},
        {"function_call": {"name": "f", "arguments": ""}},
        {"function_call": {"arguments": "{"}},
        {"tool_calls": [{"index": 0, "function": {"name": "f"}}]},
        {"reasoning_content": "Hm."},
        {"reasoning": "Hm."},
        {"refusal": "No."},
    ],
    ids=lambda delta: next(iter(delta)),
)
def test_a_stream_is_timed_to_first_token(first: dict[str, Any]) -> None:
    attempt = ended(PING, ROLE, event({"content": None}), 0.1, event(first), 0.3, NE, STOP, DONE, ends)
    assert attempt.time_to_first_token_s is not None
    assert 0.1 - TIMER_S <= attempt.time_to_first_token_s <= attempt.latency_s - 0.1


def test_a_stream_without_token_has_no_time() -> None:
    assert ended(PING, ROLE, STOP, USAGE, DONE, ends).time_to_first_token_s is None


# -- how long it may take


@pytest.mark.heavy
def test_a_live_stream_outlives_the_deadline() -> None:
    thinking: tuple[Step, ...] = (ROLE, *(0.1, PING) * 12)
    writing: tuple[Step, ...] = (FI, *(0.1, event({"content": "."})) * 12)
    attempt = ended(*thinking, *writing, STOP, DONE, ends, attempt_timeout_s=1.0, idle_timeout_s=1.0)
    assert (attempt.error, content(attempt)) == (None, "Fi" + "." * 12)
    assert attempt.latency_s > 2


def test_reasoning_may_pause_longer_than_writing() -> None:
    attempt = ended(ROLE, 1.2, FI, NE, STOP, DONE, ends, attempt_timeout_s=60.0, idle_timeout_s=0.6)
    assert (attempt.error, content(attempt)) == (None, "Fine.")


@pytest.mark.parametrize(
    ("before", "limits", "said"),
    [
        pytest.param((ROLE, FI), {"idle_timeout_s": 0.2}, "a stream that was silent for 0.2 s", id="while it writes"),
        pytest.param(
            (ROLE, PING),
            {"attempt_timeout_s": 0.2, "idle_timeout_s": 0.1},
            "a stream that was silent for 0.2 s",
            id="while it thinks",
        ),
        pytest.param(
            (ROLE, PING),
            {"attempt_timeout_s": 0.2, "idle_timeout_s": 3.0},
            "a stream that was silent for 0.2 s",
            id="while it thinks, though it might pause longer while it writes",
        ),
        pytest.param((), {"attempt_timeout_s": 0.2}, "no whole answer within 0.2 s", id="before its head"),
    ],
)
def test_a_long_silence_ends_a_stream(before: tuple[bytes, ...], limits: dict[str, float], said: str) -> None:
    attempt = ended(*before, Exchange.silence, head=HEAD if before else b"", **limits)
    assert isinstance(attempt.error, APITimeoutError)
    assert str(attempt.error) == said
    assert plain(attempt.body) == b"".join(before)
    assert judged(attempt).verdict is Verdict.MAYBE
    assert 0.2 - TIMER_S <= attempt.latency_s < 10


def test_a_stream_of_pings_ends() -> None:
    attempt = ended(ROLE, *(PING, 0.02) * 1000, stream_timeout_s=0.2)
    assert str(attempt.error) == "a stream without its end after 0.2 s"
    assert attempt.latency_s < 10


# -- how it ends


def test_the_last_event_ends_a_stream() -> None:
    """Even if the connection stays open."""
    attempt = ended(*WHOLE, Exchange.silence, attempt_timeout_s=5.0, idle_timeout_s=5.0)
    assert (attempt.error, content(attempt)) == (None, "Fine.")
    assert attempt.latency_s < 5


def test_a_streams_connection_is_used_again() -> None:
    async def script(exchange: Exchange) -> None:
        await streams(*WHOLE, 0.001, ends)(exchange)

    bodies = [b"%d" % n for n in range(5)]

    async def main() -> int:
        async with serving(script) as server, client_of(server.url) as client:
            for body in bodies:
                attempt = await client.send(body, "x")
                assert (attempt.error, content(attempt)) == (None, "Fine.")
                for _ in range(10):  # turns of the loop, so that the end of the response is read on a busy machine too
                    await asyncio.sleep(0.005)
            return server.connections

    assert run(main()) == 1


def test_an_open_streams_connection_is_swept() -> None:
    closed: list[bytes] = []

    async def script(exchange: Exchange) -> None:
        await streams(*WHOLE)(exchange)
        await exchange.silence()
        closed.append(exchange.body)

    async def main() -> int:
        async with serving(script) as server, client_of(server.url) as client:
            for body in (b"0", b"1", b"2"):
                assert content(await client.send(body, "x")) == "Fine."
            assert closed == []
            assert client.expire() == 0
            while len(closed) < 3:
                await asyncio.sleep(0.01)
            return server.connections

    assert run(asyncio.wait_for(main(), 30)) == 3
    assert sorted(closed) == [b"0", b"1", b"2"]


@pytest.mark.parametrize("how", [closes, resets], ids=["FIN", "RST"])
@pytest.mark.parametrize(
    "sent", [(), (ROLE,), (ROLE, FI), (ROLE, FI, NE), (ROLE, FI, NE, STOP[:-30])], ids=lambda sent: str(len(sent))
)
def test_a_cut_stream_keeps_its_text(sent: tuple[bytes, ...], how: Callable[[Exchange], Awaitable[None]]) -> None:
    """It may have been billed."""
    attempt = ended(*sent, 0.02, how)
    assert kind_of(attempt) in ("cut", "reset")
    assert plain(attempt.body) == b"".join(sent)
    assert (content(attempt) or "") == "Fine."[: (0, 0, 2, 5, 5)[len(sent)]]
    judgement = judged(attempt)
    assert judgement.verdict is Verdict.MAYBE
    assert judgement.error is not None
    assert judgement.error.kind == kind_of(attempt)


@pytest.mark.parametrize("how", [ends, closes, resets], ids=["end", "FIN", "RST"])
@pytest.mark.parametrize("last", [(), (USAGE,), (USAGE[:-9],)], ids=["no usage", "usage", "half its usage"])
def test_a_finish_reason_completes_a_stream(
    last: tuple[bytes, ...], how: Callable[[Exchange], Awaitable[None]]
) -> None:
    attempt = ended(ROLE, FI, NE, STOP, *last, 0.02, how)
    answer = answers.parse(attempt.body)
    assert judged(attempt) == policy.Judgement(Verdict.OK)
    assert (answer.content, answer.finish_reason, answer.flagged) == ("Fine.", "stop", False)
    assert (answer.usage is not None) == (last == (USAGE,))


FIRST_OF_TWO = event(choices=[{"index": 0, "delta": {"content": "One."}, "finish_reason": "stop"}])
SECOND = event(choices=[{"index": 1, "delta": {"content": "Two."}, "finish_reason": None}])
ITS_END = event(choices=[{"index": 1, "delta": {}, "finish_reason": "stop"}])


@pytest.mark.parametrize("how", [ends, closes, resets], ids=["end", "FIN", "RST"])
@pytest.mark.parametrize(
    ("sent", "whole"),
    [
        ((FIRST_OF_TWO,), False),
        ((FIRST_OF_TWO, SECOND), False),
        ((FIRST_OF_TWO, SECOND, ITS_END), True),
        ((FIRST_OF_TWO, b"data: [DONE]\n\n"), True),  # a server that knows no `n` says itself that this is all
    ],
    ids=["before the second", "within it", "behind it", "DONE"],
)
def test_without_done_every_choice_must_end(
    sent: tuple[bytes, ...], *, whole: bool, how: Callable[[Exchange], Awaitable[None]]
) -> None:
    attempt = ended(*sent, 0.02, how)
    answer = answers.parse(attempt.body, choices=2)
    assert answer.completion == whole
    assert answer.content == "One."
    expected = Verdict.OK if whole else Verdict.MAYBE
    assert policy.judge(attempt, answer, Retry()).verdict is expected


@pytest.mark.parametrize(
    "failure",
    [
        event(choices=[], error={"message": "gone", "code": "x"}),
        b'data: {"error": {"message": "gone", "code": "x"}}\n\n',
        b'event: error\ndata: {"error": {"message": "gone", "code": "x"}}\n\n',
        b'event: error\ndata: {"message": "gone", "code": "x"}\n\n',
        b"event: error\ndata: gone\n\n",
        b'{"error": {"message": "gone", "code": "x"}}\n',
        b'{"error": "gone"}\n\n',
        b'data: {"choices": [{"delta": \n\n',
    ],
    ids=["with choices", "object", "named object", "named bare object", "named text", "bare line", "bare text", "cut"],
)
def test_an_error_in_a_stream_is_no_answer(failure: bytes) -> None:
    attempt = ended(ROLE, FI, NE, failure, STOP, DONE, ends)
    answer = answers.parse(attempt.body)
    assert not answer.completion
    assert answer.content == "Fine."
    assert judged(attempt).verdict is Verdict.MAYBE
    assert answer.error_message == (None if b"delta" in failure and b"gone" not in failure else "gone")


@pytest.mark.parametrize(
    ("failure", "verdict"),
    [
        ({"message": "Content Policy Violation", "code": 503}, Verdict.ROW),
        ({"message": "the model is overloaded", "code": 503}, Verdict.SLOW),
        ({"message": "slow down", "code": 429}, Verdict.SLOW),
        ({"message": "no", "code": 400}, Verdict.ROW),
    ],
    ids=["content policy", "overload", "rate", "bad request"],
)
def test_a_streamed_error_has_its_status(failure: dict[str, Any], verdict: Verdict) -> None:
    attempt = ended(f"data: {json.dumps({'error': failure})}\n\n".encode(), DONE, ends)
    assert judged(attempt).verdict is verdict
