"""One attempt against real sockets: however it ends, it ends as a value of the right kind, and asks no server twice."""

import asyncio
import contextlib
import gzip
import inspect
import os
import resource
import socket
import ssl
import time
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.client_reqrep import ConnectionKey
from yarl import URL

from batchrun.errors import APITimeoutError, JobError
from batchrun.job.settings import Endpoint
from batchrun.policy import FAULT_VERDICTS
from batchrun.records import Attempt, Verdict
from batchrun.response.encoding import Unpacker
from batchrun.transport import keep_alive as rules
from batchrun.transport.connector import TCP_KEEPALIVE_S, open_socket
from batchrun.transport.faults import translate
from batchrun.transport.keep_alive import KeepAlive, Loss
from batchrun.transport.transport import Transport
from tests.fault_server import (
    FINE,
    Exchange,
    FaultServer,
    Script,
    answer,
    black_hole,
    chunked,
    gzip_bomb,
    self_signed,
    sends,
    serving,
)
from tests.timing import TIMER_S
from tests.wires import KEY, client_of, run, wire

pytestmark = pytest.mark.sampled(8)

__all__ = ["wire"]  # the fixture that runs each test on every wire


@contextlib.asynccontextmanager
async def sweeping(client: Transport) -> AsyncIterator[None]:
    """What the run's heartbeat does, more often."""

    async def sweep() -> None:
        while True:
            await asyncio.sleep(0.01)
            client.expire()

    task = asyncio.create_task(sweep())
    try:
        yield
    finally:
        task.cancel()


def exchange_all(script: Script, *bodies: bytes, **endpoint: Any) -> tuple[list[Attempt], FaultServer]:
    """The attempts for the bodies, one after another, each ended by a sweep if it takes too long."""

    async def main() -> tuple[list[Attempt], FaultServer]:
        async with serving(script) as server, client_of(server.url, **endpoint) as client, sweeping(client):
            attempts = [await client.send(body, f"run-{n}-1") for n, body in enumerate(bodies or (b"{}",))]
            return attempts, server

    return run(main())


def ended(script: Script, **endpoint: Any) -> Attempt:
    (attempt,), _ = exchange_all(script, **endpoint)
    return attempt


def kind_of(attempt: Attempt) -> str | None:
    return attempt.error.kind if attempt.error else None


async def closes(exchange: Exchange) -> None:
    exchange.writer.close()


async def resets(exchange: Exchange) -> None:
    await asyncio.sleep(0.02)  # so that what was sent arrives before the RST
    exchange.reset()


# -- an answer


def test_an_answer_arrives_with_status_headers_and_body() -> None:
    (attempt,), server = exchange_all(sends(answer(FINE, "X-Request-Id: r-1")), b'{"a":1}')
    assert (attempt.http_status, attempt.body, attempt.error, attempt.request_id) == (200, FINE, None, "r-1")
    assert attempt.time_to_first_token_s is None
    assert abs(attempt.started_at - time.time()) < 60
    assert 0 < attempt.latency_s < 10
    (exchange,) = server.exchanges
    head = exchange.head.decode().lower()
    assert exchange.body == b'{"a":1}'
    assert head.startswith("post /v1/chat/completions http/1.1\r\n")
    for header in ("content-type: application/json", f"authorization: bearer {KEY}", "x-client-request-id: run-0-1"):
        assert f"\r\n{header}\r\n" in head


def test_a_key_in_the_request_id_is_removed() -> None:
    attempt = ended(sends(answer(FINE, f"X-Request-Id: for-{KEY}")))
    assert attempt.request_id == "for-[redacted]"


def test_the_request_id_can_be_switched_off() -> None:
    _, server = exchange_all(sends(answer()), client_request_id=False)
    assert b"x-client-request-id" not in server.exchanges[0].head.lower()


@pytest.mark.parametrize(
    "status", ["204 No Content", "400 Bad Request", "429 Too Many Requests", "500 Oops", "503 Busy", "999 Odd"]
)
def test_an_error_status_is_an_answer_too(status: str) -> None:
    body = b"" if status.startswith("204") else b"why"
    attempt = ended(sends(answer(body, status=status)))
    assert (attempt.http_status, attempt.body, attempt.error) == (int(status[:3]), body, None)


def test_an_id_of_odd_bytes_is_text() -> None:
    """It is in summary.json, which holds UTF-8 only."""
    head = b"HTTP/1.1 200 OK\r\nX-Request-Id: r\xff\xc3\xa9\r\nContent-Length: "
    (attempt,), _ = exchange_all(sends(head + b"%d\r\n\r\n%b" % (len(FINE), FINE)))
    assert (attempt.error, attempt.request_id) == (None, "r\ufffdé")


@pytest.mark.parametrize("size", [0, 1, 3_000_000])
def test_large_answers_and_requests_arrive_whole(size: int) -> None:
    body = (b"{" + os.urandom(size))[:size]  # one that begins with the byte 1f is unpacked as gzip
    (attempt,), server = exchange_all(sends(answer(body)), body)
    assert attempt.error is None
    assert attempt.body == body
    assert server.exchanges[0].body == body


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_a_compressed_answer_is_decompressed(encoding: str) -> None:
    packed = gzip.compress(FINE, mtime=0) if encoding == "gzip" else zlib.compress(FINE)
    attempt = ended(sends(answer(packed, f"Content-Encoding: {encoding}")))
    assert (attempt.body, attempt.error) == (FINE, None)


def test_a_repeated_key_is_not_in_the_body() -> None:
    attempt = ended(sends(answer(f'{{"error":"wrong key: Bearer {KEY}"}}'.encode(), status="401 No")))
    assert attempt.body == b'{"error":"wrong key: Bearer [redacted]"}'


@pytest.mark.parametrize(
    ("label", "body"),
    [
        *((label, FINE) for label in ("none", "utf-8", "identity", "", "identity, none", "gzip", "deflate", "br")),
        ("gzip", b"\n \n" + FINE),
        ("identity, gzip", gzip.compress(FINE, mtime=0)),
        ("gzip, gzip", gzip.compress(gzip.compress(FINE, mtime=0), mtime=0)),
        ("deflate, gzip", gzip.compress(zlib.compress(FINE), mtime=0)),
        ("identity", gzip.compress(FINE, mtime=0)),
        (None, gzip.compress(FINE, mtime=0)),
    ],
)
def test_a_readable_answer_is_read_whatever_its_label(label: str | None, body: bytes) -> None:
    attempt = ended(sends(answer(body, *([] if label is None else [f"Content-Encoding: {label}"]))))
    assert attempt.error is None
    assert attempt.body.strip() == FINE


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "gzip, br", "x-odd"])
@pytest.mark.parametrize("headers", [(), ("Content-Type: text/event-stream",)], ids=["whole", "streamed"])
def test_an_unrequested_encoding_is_named(encoding: str, headers: tuple[str, ...]) -> None:
    script = sends(answer(b"\x1b\x00packed", f"Content-Encoding: {encoding}", "X-Request-Id: r-9", *headers))
    (attempt,), server = exchange_all(script)
    assert b"\r\naccept-encoding: gzip, deflate\r\n" in server.exchanges[0].head.lower()
    assert attempt.error is not None
    assert (attempt.error.kind, attempt.error.sent, attempt.http_status) == ("bad_encoding", True, 200)
    assert str(attempt.error) == f"the answer has an encoding that was not requested: {encoding}"
    assert (attempt.body, attempt.request_id) == (b"", "r-9")


def test_an_error_in_unrequested_encoding_has_its_status() -> None:
    attempt = ended(sends(answer(b"\x1b\x00packed", "Content-Encoding: br", status="429 Slow Down")))
    assert (attempt.http_status, attempt.error, attempt.body) == (429, None, b"")


@pytest.mark.parametrize("pieces", [1, 2, 50])
def test_an_encoding_is_decoded_in_any_pieces(pieces: int) -> None:
    text = b"word " * 3_000 + os.urandom(3_000)  # not the other way round: chance may begin like gzip
    raw = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    packed = {
        "gzip": gzip.compress(text, mtime=0),
        "x-gzip": gzip.compress(text[:9], mtime=0) + gzip.compress(text[9:], mtime=0) + bytes(100),
        "deflate": zlib.compress(text),
        "Deflate": raw.compress(text) + raw.flush(),
        "identity": text,
    }
    for encoding, whole in packed.items():
        unpacker = Unpacker(encoding)
        size = -(-len(whole) // pieces)
        cuts = [whole[start : start + size] for start in range(0, len(whole), size)]
        assert b"".join(unpacker.unpack(piece, 1_000_000) for piece in cuts) == text, encoding
        assert Unpacker(encoding).unpack(whole, 100) == text[:100]


# -- the attempt's own id


@pytest.mark.parametrize(
    ("url", "endpoint", "header"),
    [
        ("https://api.example.com/v1", {}, "X-Client-Request-Id"),
        ("https://cloud.vtrix.ai/llm/chat/completions", {}, "X-Request-Id"),
        ("https://vtrix.ai.example.com/v1", {}, "X-Client-Request-Id"),
        ("https://api.example.com/v1", {"request_id_header": "X-Trace"}, "X-Trace"),
        ("https://cloud.vtrix.ai/v1", {"client_request_id": False}, None),
    ],
)
def test_the_attempt_id_uses_the_vendors_header(url: str, endpoint: dict[str, Any], header: str | None) -> None:
    assert Endpoint(url, **endpoint).id_header == header


def test_an_unanswered_attempt_has_its_id() -> None:
    (attempt,), server = exchange_all(closes, request_id_header="X-Request-Id")
    assert attempt.request_id == "run-0-1"
    assert b"\r\nx-request-id: run-0-1\r\n" in server.exchanges[0].head.lower()
    (attempt,), _ = exchange_all(closes, client_request_id=False)
    assert attempt.request_id is None
    (attempt,), _ = exchange_all(sends(answer(FINE, "X-Request-Id: theirs")), request_id_header="X-Request-Id")
    assert attempt.request_id == "theirs"


# -- keep-alive


def test_a_connection_is_used_again() -> None:
    attempts, server = exchange_all(sends(answer()), *[b"{}"] * 5)
    assert [kind_of(attempt) for attempt in attempts] == [None] * 5
    assert (server.connections, len(server.exchanges)) == (1, 5)


@pytest.mark.parametrize("pause_s", [0.0, 0.05])
def test_closed_keep_alive_repeats_no_request(pause_s: float) -> None:
    async def main() -> None:
        async with serving(sends(answer(), then=closes)) as server, client_of(server.url) as client:
            for n in range(20):
                attempt = await client.send(b"%d" % n, "x")
                assert (kind_of(attempt), attempt.body) == (None, FINE)
                await asyncio.sleep(pause_s)
            assert [exchange.body for exchange in server.exchanges] == [b"%d" % n for n in range(20)]

    run(main())


def test_a_closed_idle_connection_is_not_used() -> None:
    async def main() -> None:
        async with serving(sends(answer())) as server, client_of(server.url) as client:
            for _ in range(2):  # the second shows that the server keeps connections open
                await client.send(b"{}", "x")
            servers_end = server.exchanges[0].writer.get_extra_info("socket")
            with socket.socket(fileno=os.dup(servers_end.fileno())) as same:
                same.shutdown(socket.SHUT_RDWR)
            asyncio.get_running_loop().call_soon(time.sleep, 0.2)  # the loop is busy, and sees it late
            attempt = await client.send(b"{}", "x")
            assert (kind_of(attempt), attempt.body) == (None, FINE)
            assert (server.connections, len(server.exchanges)) == (2, 3)

    run(main())


def dropping_the_second(how: Script) -> Script:
    """A server whose connections answer once and meet `how` when they are used again."""

    async def script(exchange: Exchange) -> None:
        if exchange.place == 0:
            await exchange.send(answer())
        else:
            await how(exchange)

    return script


@pytest.mark.parametrize("how", ["FIN", "RST"])
@pytest.mark.parametrize("after_ms", [1, 5, 20, 50, 99, 200])
def test_a_closed_busy_connection_may_be_billed(after_ms: int, how: str) -> None:
    """The server has read the request, and may have served and billed it before it ended the connection."""

    async def bills_and_ends(exchange: Exchange) -> None:
        await asyncio.sleep(after_ms / 1000)
        exchange.reset() if how == "RST" else exchange.writer.close()

    attempts, server = exchange_all(dropping_the_second(bills_and_ends), b"0", b"1", b"2")
    assert [kind_of(attempt) for attempt in attempts] == [None, "reset", None]
    assert FAULT_VERDICTS["reset"] is Verdict.MAYBE
    assert [exchange.body for exchange in server.exchanges] == [b"0", b"1", b"2"]


@pytest.mark.parametrize("how", ["FIN", "RST"])
def test_a_late_close_may_be_billed_too(how: str) -> None:
    """An idle connection that ends later than two round trips after the send. A busy machine measures longer ones, so
    the server waits for longer until it is late.
    """

    async def ends_after(delay_s: float) -> str | None:
        async def bills_and_ends(exchange: Exchange) -> None:
            await asyncio.sleep(delay_s)
            exchange.reset() if how == "RST" else exchange.writer.close()

        script = dropping_the_second(bills_and_ends)
        async with serving(script) as server, client_of(server.url) as client:
            await client.send(b"0", "x")
            await asyncio.sleep(1.05)
            kind = kind_of(await client.send(b"1", "x"))
            assert kind == "stale_connection" or len(server.exchanges) == 2
            return kind

    assert any(run(ends_after(delay_s)) == "reset" for delay_s in (0.3, 1.5, 7.5))


@contextlib.asynccontextmanager
async def forgetful_nat(port: int, one_way_s: float = 0.02, forgets_after_s: float = 1.0) -> AsyncIterator[int]:
    """The port of a gateway in front of `port`: bytes take their time, and a flow that was idle is reset at its next
    bytes, which never arrive.
    """
    carrying: set[asyncio.Task[None]] = set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, forgets: bool) -> None:
        last_s = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(65_536):
                if forgets and time.monotonic() - last_s > forgets_after_s:
                    break
                last_s = time.monotonic()
                await asyncio.sleep(one_way_s)
                writer.write(piece)
        writer.transport.abort()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        way_back = asyncio.create_task(carry(far_reader, writer, forgets=False))
        carrying.add(way_back)
        await carry(reader, far_writer, forgets=True)
        writer.transport.abort()

    gateway = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield int(gateway.sockets[0].getsockname()[1])
    finally:
        gateway.close()
        await asyncio.gather(*carrying)


def test_a_forgotten_idle_connection_is_free(certificate: Path) -> None:
    """The request is sent again on a fresh connection."""

    async def main() -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        async with serving(sends(answer()), context) as server, forgetful_nat(server.port) as port:
            url = server.url.replace(str(server.port), str(port))
            async with client_of(url, ca_file=f"{certificate}.crt") as client:
                for n, idle_s in enumerate((0.0, 0.0, 1.1, 0.0)):
                    await asyncio.sleep(idle_s)
                    attempt = await client.send(b"%d" % n, "x")
                    assert (kind_of(attempt), attempt.body) == (None, FINE)
            assert [exchange.body for exchange in server.exchanges] == [b"%d" % n for n in range(4)]

    run(main())


@pytest.mark.parametrize(
    ("idle_s", "ended_after_s", "stale"),
    [
        (None, 0.001, False),  # the first request on its connection
        (0.0, 0.0, False),
        (0.99, 0.001, False),
        (1.0, 0.001, True),
        (29.0, 0.040, True),
        (29.0, 0.041, False),
        (29.0, 900.0, False),
    ],
)
def test_stale_means_idle_and_closed_quickly(idle_s: float | None, ended_after_s: float, stale: bool) -> None:
    """Within two round trips."""
    loss = Loss(idle_s, ended_after_s, round_trip_s=0.020, heard_bytes=0, unsent=False)
    assert rules.kind_of(loss) == ("stale_connection" if stale else "reset")


@pytest.mark.parametrize("closes_after_s", [0.0, 0.001, 0.005, 0.02, 0.04])
@pytest.mark.parametrize("workers", [1, 8])
def test_closing_after_each_answer_is_never_ambiguous(closes_after_s: float, workers: int) -> None:
    """The server closes its connection after each answer. A client that sends on it at once can't know whether that
    request was read. Where a busy machine delays the server until the client must take the connection for a kept one,
    the try shows nothing and is repeated.
    """

    async def main() -> bool:
        in_time, ended, places = True, list[Attempt](), set[int]()

        async def answers_and_closes(exchange: Exchange) -> None:
            nonlocal in_time
            places.add(exchange.place)
            started = time.monotonic()
            await exchange.send(answer())
            await asyncio.sleep(closes_after_s)
            exchange.writer.close()
            await exchange.writer.wait_closed()
            in_time &= time.monotonic() - started < rules.SETTLING_S - 0.002

        async with serving(answers_and_closes) as server, client_of(server.url) as client:

            async def work() -> None:
                for _ in range(2):  # the fewer, the likelier all of them are in time
                    ended.append(await client.send(b"{}", "x"))

            await asyncio.gather(*(work() for _ in range(workers)))
            if not in_time:
                return False
            assert {(kind_of(attempt), attempt.body) for attempt in ended} == {(None, FINE)}
            assert places == {0}, "a connection was used again"
            assert len(server.exchanges) == 2 * workers
            return True

    async def is_shown() -> bool:
        until_s = time.monotonic() + 60
        while not (shown := await main()) and time.monotonic() < until_s:
            pass
        return shown

    assert run(is_shown()), "the machine is too busy to show it"


def test_reuse_starts_with_one_connection() -> None:
    """It ends when two connections in a row are dropped."""
    keep_alive, links = KeepAlive(), [object() for _ in range(4)]
    assert keep_alive.may_try(0.0)
    keep_alive.start_trial(links[0])
    assert not keep_alive.may_try(0.0), "one at a time"
    keep_alive.end(links[0], 1.0, reused=True, answered=None)  # its own deadline says nothing of the server
    assert keep_alive.may_try(1.0)
    keep_alive.start_trial(links[1])
    keep_alive.end(links[1], 2.0, reused=True, answered=True)
    proven, certain = [keep_alive.proven], [keep_alive.is_certain]
    for answered in (False, True, False, False):
        keep_alive.end(links[2], 3.0, reused=True, answered=answered)
        proven.append(keep_alive.proven)
        certain.append(keep_alive.is_certain)
    assert proven == [True, True, True, True, False]
    assert certain == [True, False, True, False, False]
    assert not keep_alive.may_try(62.9)
    assert keep_alive.may_try(63.0)
    keep_alive.start_trial(links[3])
    keep_alive.close(links[3], 63.1)  # it was closed before anything was sent
    assert not keep_alive.may_try(64.0)


def test_a_closed_fresh_connection_may_be_billed() -> None:
    attempt = ended(closes)
    assert kind_of(attempt) == "reset"
    assert attempt.error is not None
    assert attempt.error.sent


def test_a_partly_sent_request_is_not_billed() -> None:
    """A server that goes away in the midst of a body has not seen the end of the JSON."""

    async def main() -> Attempt:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readexactly(10_000)
            writer.transport.abort()

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with server, client_of(url) as client:
            return await client.send(bytes(40_000_000), "x")

    attempt = run(main())
    assert attempt.error is not None
    assert (attempt.error.kind, attempt.error.sent) == ("lost_before_send", True)
    assert FAULT_VERDICTS["lost_before_send"] is Verdict.FREE


def test_a_sent_request_may_have_been_served() -> None:
    """Even if the server says that it read nothing."""

    async def main() -> Attempt:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(0.05)
            writer.transport.abort()

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        async with server, client_of(url) as client:
            return await client.send(bytes(10_000), "x")

    assert kind_of(run(main())) == "reset"


@pytest.mark.parametrize("interim", [b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\n\r\n"])
@pytest.mark.parametrize("then", ["an answer", "the end"])
def test_an_interim_response_is_no_answer(interim: bytes, then: str) -> None:
    attempts, _ = exchange_all(
        dropping_the_second(sends(interim + answer()) if then == "an answer" else sends(interim, then=closes)),
        b"0",
        b"1",
    )
    assert [kind_of(attempt) for attempt in attempts] == [None, None if then == "an answer" else "reset"]


def test_a_tls_close_before_answer_is_ambiguous(certificate: Path) -> None:
    async def main() -> list[str | None]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        async with (
            serving(dropping_the_second(closes), context) as server,
            client_of(server.url, ca_file=f"{certificate}.crt") as client,
        ):
            return [kind_of(await client.send(b"{}", "x")) for _ in range(3)]

    assert run(main()) == [None, "reset", None]


@pytest.mark.parametrize("how", [closes, resets], ids=["FIN", "RST"])
@pytest.mark.parametrize(
    "part",
    [answer(length=500)[: -len(FINE)], answer(length=500)],
    ids=["head", "half"],
)
def test_a_started_answer_is_not_sent_again(part: bytes, how: Script) -> None:
    attempts, server = exchange_all(dropping_the_second(sends(part, then=how)), b"0", b"1")
    assert kind_of(attempts[1]) in ("reset", "cut")
    assert len(server.exchanges) == 2


# -- broken answers


@pytest.mark.parametrize(
    ("script", "kind", "received"),
    [
        pytest.param(sends(answer(length=500), then=closes), "cut", FINE, id="Content-Length too long"),
        pytest.param(sends(answer(length=500), then=resets), "cut|reset", FINE, id="reset mid-body"),
        pytest.param(sends(chunked(FINE, end=False), then=closes), "cut", FINE, id="chunked cut"),
        pytest.param(sends(chunked(FINE, end=False), then=resets), "cut|reset", FINE, id="chunked reset"),
        pytest.param(
            sends(chunked(FINE, end=False) + b"zz\r\n", then=closes), "cut|malformed_http", None, id="chunk of no size"
        ),
        pytest.param(resets, "reset", b"", id="reset at once"),
        pytest.param(sends(b"HTTP/1.1 200", then=closes), "reset|malformed_http", b"", id="half a status line"),
        pytest.param(sends(b"SSH-2.0-OpenSSH_9\r\n", then=closes), "malformed_http", b"", id="no HTTP"),
        pytest.param(
            sends(b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", then=closes), "malformed_http", b"", id="no length"
        ),
        pytest.param(sends(answer(FINE, "X-Long: " + "x" * 20_000)), "malformed_http", b"", id="20 KB header line"),
        pytest.param(
            sends(answer(FINE, *(f"X-{n}: x" for n in range(1000)))), "malformed_http", b"", id="1,000 headers"
        ),
        pytest.param(sends(answer(b"no gzip", "Content-Encoding: gzip")), "bad_encoding", b"", id="bad gzip"),
    ],
)
def test_a_broken_answer_keeps_its_bytes(script: Script, kind: str, received: bytes | None) -> None:
    """It may have been billed."""
    attempt = ended(script)
    assert kind_of(attempt) in kind.split("|")
    assert received is None or attempt.body == received
    assert attempt.error is not None
    assert attempt.error.sent
    assert FAULT_VERDICTS[attempt.error.kind] is Verdict.MAYBE
    assert KEY not in str(attempt.error)


@pytest.mark.parametrize(
    "script",
    [
        Exchange.silence,
        sends(b"HTTP/1.1 200 OK\r\n", then=Exchange.silence),
        sends(answer(length=500), then=Exchange.silence),
        sends(chunked(FINE, end=False), then=Exchange.silence),
    ],
    ids=["at once", "in the head", "in the body", "between chunks"],
)
def test_silence_ends_at_the_deadline(script: Script) -> None:
    """What had come is kept."""
    attempt = ended(script, attempt_timeout_s=0.2)
    assert isinstance(attempt.error, APITimeoutError)
    assert (attempt.error.kind, attempt.error.sent) == ("timeout", True)
    assert str(attempt.error) == "no whole answer within 0.2 s"
    assert attempt.body in (b"", FINE)
    assert 0.2 - TIMER_S <= attempt.latency_s < 10


@pytest.mark.parametrize("start", [b"", answer(length=10_000)], ids=["head", "body"])
def test_trickling_bytes_do_not_extend_the_deadline(start: bytes) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(start)
        for byte in answer():
            await exchange.send(bytes([byte]))
            await asyncio.sleep(0.02)

    attempt = ended(script, attempt_timeout_s=0.2)
    assert kind_of(attempt) == "timeout", "with a deadline that each byte extends, the whole answer arrives"


def test_a_deadline_ends_only_its_attempt() -> None:
    async def script(exchange: Exchange) -> None:
        await (exchange.silence() if exchange.body == b"slow" else exchange.send(answer()))

    attempts, _ = exchange_all(script, b"slow", b"quick", b"slow", b"quick", attempt_timeout_s=0.2)
    assert [kind_of(attempt) for attempt in attempts] == ["timeout", None, "timeout", None]


def test_cancellation_at_the_deadline_is_kept() -> None:
    async def main() -> None:
        async with serving(Exchange.silence) as server, client_of(server.url, attempt_timeout_s=0.05) as client:
            task = asyncio.create_task(client.send(b"{}", "x"))
            while not server.exchanges:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.1)
            assert client.expire() == 1
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    run(main())


def test_a_gzip_bomb_stays_in_bounded_memory() -> None:
    bomb = gzip_bomb()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    attempt = ended(sends(answer(bomb, "Content-Encoding: gzip")), max_answer_bytes=4_000_000)
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert kind_of(attempt) == "answer_too_large"
    assert len(attempt.body) <= 4_000_000
    assert grown_kb < 60_000


def test_an_answer_without_end_stops_at_the_bound() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(chunked(end=False))
        while not exchange.writer.is_closing():
            await exchange.send(b"1000\r\n" + bytes(4096) + b"\r\n")

    assert kind_of(ended(script, max_answer_bytes=100_000)) == "answer_too_large"


# -- no answer


def test_a_redirect_is_not_followed() -> None:
    async def main() -> None:
        async with serving(sends(answer())) as other:
            for status in ("301 M", "302 F", "303 S", "307 T", "308 P"):
                moved = sends(answer(b"", f"Location: {other.url}", status=status))
                async with serving(moved) as server, client_of(server.url) as client:
                    attempt = await client.send(b"{}", "x")
                assert (attempt.http_status, attempt.error) == (int(status[:3]), None)
            assert other.connections == 0

    run(main())


def test_a_name_that_does_not_exist_is_dns() -> None:
    async def main() -> Attempt:
        async with client_of("https://api.batchrun.invalid/v1") as client:
            return await client.send(b"{}", "x")

    attempt = run(main())
    assert attempt.error is not None
    assert (attempt.error.kind, attempt.error.sent) == ("dns", False)


def _unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_closed_port_is_refused(scheme: str) -> None:
    async def main() -> Attempt:
        async with client_of(f"{scheme}://127.0.0.1:{_unused_port()}/v1") as client:
            return await client.send(b"{}", "x")

    attempt = run(main())
    assert attempt.error is not None
    assert (attempt.error.kind, attempt.error.sent) == ("refused", False)


def test_an_unaccepted_connection_times_out() -> None:
    async def main() -> Attempt:
        with black_hole() as port:
            async with client_of(f"http://127.0.0.1:{port}/v1", connect_timeout_s=0.2) as client:
                return await client.send(b"{}", "x")

    attempt = run(main())
    assert attempt.error is not None
    assert (attempt.error.kind, attempt.error.sent) == ("connect", False)
    assert attempt.latency_s < 8, "the default is 10 s"


# -- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return self_signed(tmp_path_factory.mktemp("tls"))


def over_tls(certificate: Path, **endpoint: Any) -> tuple[Attempt, FaultServer]:
    async def main() -> tuple[Attempt, FaultServer]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        async with serving(sends(answer()), context) as server, client_of(server.url, **endpoint) as client:
            return await client.send(b"{}", "x"), server

    return run(main())


def test_an_untrusted_certificate_is_refused_before_sending(certificate: Path) -> None:
    attempt, server = over_tls(certificate)
    assert attempt.error is not None
    assert (attempt.error.kind, attempt.error.sent) == ("certificate", False)
    assert server.exchanges == []


def test_the_jobs_ca_file_is_trusted(certificate: Path) -> None:
    attempt, _ = over_tls(certificate, ca_file=f"{certificate}.crt")
    assert (attempt.error, attempt.body) == (None, FINE)


@pytest.mark.parametrize("text", [None, "no certificate"])
def test_an_invalid_ca_file_is_named(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "ca.pem"
    if text:
        file.write_text(text)
    with pytest.raises(JobError, match=r"endpoint\.ca_file: can't load .*ca\.pem"):
        run(_made(str(file)))


async def _made(ca_file: str) -> None:
    async with client_of("https://h", ca_file=ca_file):
        pass


def test_plain_http_on_tls_port_is_named() -> None:
    async def main() -> Attempt:
        async with serving(sends(answer())) as server:
            url = server.url.replace("http:", "https:")
            async with client_of(url, connect_timeout_s=0.5) as client:
                return await client.send(b"{}", "x")

    attempt = run(main())
    assert attempt.error is not None
    assert attempt.error.kind in ("tls", "connect")
    assert not attempt.error.sent


# -- the wire below


def test_connections_have_tcp_keepalive_enabled() -> None:
    with open_socket((socket.AF_INET, socket.SOCK_STREAM, 6, "", ())) as opened:
        assert opened.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert opened.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == TCP_KEEPALIVE_S


# -- every exception of aiohttp's


def made(kind: type[Exception]) -> Exception:
    """An instance with arguments that its constructor takes, the key among them."""
    key = ConnectionKey("h", 443, True, True, None, None, None)
    info = aiohttp.RequestInfo(URL("https://h"), "POST", None, URL("https://h"))  # type: ignore[arg-type]
    certificate = ssl.SSLCertVerificationError(1, f"untrusted {KEY}")
    arguments: dict[type[Exception], tuple[Any, ...]] = {
        aiohttp.ClientConnectorCertificateError: (key, certificate),
        aiohttp.ServerFingerprintMismatch: (b"a", b"b", "h", 443),
        aiohttp.client_exceptions.UnixClientConnectorError: ("/socket", key, OSError(111, "refused")),
        aiohttp.ClientConnectorError: (key, OSError(111, f"refused {KEY}")),
        aiohttp.ClientResponseError: (info, ()),
        aiohttp.InvalidURL: (f"https://{KEY}",),
    }
    for base in kind.__mro__:
        if base in arguments:
            return kind(*arguments[base])
    return kind(KEY)


PUBLIC = sorted(
    {
        each
        for module in (aiohttp, aiohttp.client_exceptions)
        for _, each in inspect.getmembers(module, inspect.isclass)
        if issubclass(each, aiohttp.ClientError)
    },
    key=lambda each: each.__name__,
)


@pytest.mark.parametrize("sent", [True, False])
@pytest.mark.parametrize(
    "kind",
    [*PUBLIC, ConnectionResetError, TimeoutError, OSError, ValueError, RuntimeError],
    ids=lambda kind: kind.__name__,
)
def test_every_aiohttp_exception_has_a_known_kind(kind: type[Exception], sent: bool) -> None:
    error = translate(made(kind), sent=sent)
    assert error.kind in FAULT_VERDICTS
    assert error.sent == sent
    assert (
        FAULT_VERDICTS[error.kind] is not Verdict.FREE or not sent or error.kind in ("dns", "refused", "connect", "tls")
    )


def test_a_broken_response_is_named_in_one_line() -> None:
    """aiohttp shows the bytes over several lines, under a status that no server sent."""
    twice = ended(sends(answer(FINE, "Content-Length: 5")))
    assert twice.error is not None
    assert "Duplicate Content-Length" in str(twice.error)
    assert "\n" not in str(twice.error)
    assert "400" not in str(twice.error)


def test_exceptions_never_contain_the_key() -> None:
    async def main() -> Attempt:
        async with client_of("http://127.0.0.1:1/" + KEY) as client:
            return await client.send(b"{}", "x")

    attempt = run(main())
    assert KEY not in str(attempt.error)
    assert KEY not in repr(attempt)
