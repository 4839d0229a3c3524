"""One attempt over HTTP, and nothing else: no retry, no pace, no meaning. With `connections`, sole importer of the
aiohttp client.

aiohttp's defaults that are wrong for a batch are set here: its total timeout of 300 s, its pool of 100 connections,
redirects followed (a 307 would carry prompt and key headers to another origin), no TCP keepalive (NAT drops a socket
that is silent during a long reasoning call), bodies without a bound, no status for an answer that it can't unpack.
"""

import asyncio
import errno
import io
import ssl
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import aiohttp
from aiohttp.payload import TOO_LARGE_BYTES_BODY

from batchrun import __version__
from batchrun.answer import encoding, packed
from batchrun.answer.stream import Stream
from batchrun.connections import ROUTE, Connector, Route
from batchrun.credentials import Credentials
from batchrun.errors import APIConnectionError, APITimeoutError, JobError
from batchrun.job.job import Endpoint
from batchrun.records import Attempt, Request

READ_BUFFER_BYTES = 65_536

MAX_TAILS = 64
"""Streams whose last event has come but not the end of their response: more of them are not waited for."""


@dataclass(slots=True)
class _Exchange:
    """What is known of one exchange while it lasts."""

    task: "asyncio.Task[object]"
    payload: bytes | io.BytesIO
    route: Route = field(default_factory=Route)
    overdue: str | None = None
    http_status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    received: list[bytes] = field(default_factory=list)
    stream: Stream | None = None
    heard_at: float = 0.0
    first_token_at: float | None = None

    @property
    def sent_at(self) -> float | None:
        """When its connection stood; None: nothing was sent."""
        return self.route.ready_at

    @property
    def unsent(self) -> bool:
        """True where a part of the request has certainly not left."""
        payload = self.payload
        return isinstance(payload, io.BytesIO) and payload.tell() < payload.getbuffer().nbytes


class Client:
    """Sends requests of one endpoint. Close it, or use it as a context manager.

    Workers call `send`; somebody calls `expire` about once a second, which ends attempts beyond their deadline: one
    sweep costs less than a timeout object for each of a million requests (measured: 6 to 11 µs each).

    A whole answer has a deadline. A stream has none while bytes come (but for `endpoint.stream_timeout_s`): it may be
    silent for `endpoint.attempt_timeout_s` until its first token, since a model thinks before it writes, and for
    `endpoint.idle_timeout_s` from then on.
    """

    def __init__(self, url: str, endpoint: Endpoint, credentials: Credentials, *, tails: int = MAX_TAILS) -> None:
        """`tails`: how many connections of ended streams may stay open until the next sweep."""
        self._max_tails = tails
        self._url = url
        self._proxy = endpoint.proxy
        self._deadline_s = endpoint.attempt_timeout_s
        self._idle_s = endpoint.idle_timeout_s
        self._stream_s = endpoint.stream_timeout_s
        self._max_bytes = endpoint.max_answer_bytes
        self._id_header = endpoint.id_header
        self._credentials = credentials
        self._exchanges: dict[asyncio.Task[object], _Exchange] = {}
        self._tails: deque[aiohttp.ClientResponse] = deque()
        context = ssl_context(endpoint)
        headers = {
            "Content-Type": "application/json",
            "Accept": "application/json, text/event-stream",
            "Accept-Encoding": encoding.ASKED_FOR,
            "User-Agent": f"batchrun/{__version__}",
            **credentials.headers,
        }
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=endpoint.connect_timeout_s)
        tls = url.startswith("https:")
        self._connectors = [Connector(ssl_context=context, tls=tls, force_close=fresh) for fresh in (False, True)]
        self._pooled, self._fresh = (
            aiohttp.ClientSession(
                connector=connector,
                auto_decompress=False,
                headers=headers,
                timeout=timeout,
                cookie_jar=aiohttp.DummyCookieJar(),
                read_bufsize=READ_BUFFER_BYTES,
            )
            for connector in self._connectors
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close_tails(0)
        await self._pooled.close()
        await self._fresh.close()

    async def send(self, request: Request, client_request_id: str) -> Attempt:
        """How one exchange ended, as a value, whatever happened on the wire.

        Where a kept connection turns out to have been closed while it was idle, the request goes out once more, on a
        fresh one, within the same attempt: the server can't have read it.
        """
        attempt = await self._exchange(self._pooled, request, client_request_id)
        if attempt.error is not None and attempt.error.kind == "stale_connection":
            return await self._exchange(self._fresh, request, client_request_id)
        return attempt

    def expire(self) -> int:
        """Ends every attempt that has taken too long, and what streams left open; returns how many attempts."""
        self._close_tails(0)
        now = time.monotonic()
        late = 0
        for exchange in self._exchanges.values():
            exchange.overdue = self._overdue(exchange, now)
            if exchange.overdue is not None:
                late += 1
                exchange.task.cancel()
        return late

    def _overdue(self, exchange: _Exchange, now: float) -> str | None:
        """Why the attempt has taken too long, if it has."""
        if exchange.sent_at is None:
            return None
        age_s = now - exchange.sent_at
        if exchange.stream is None:
            return f"no whole answer within {self._deadline_s:g} s" if age_s > self._deadline_s else None
        patience_s = self._idle_s if exchange.stream.speaks else self._deadline_s
        if now - exchange.heard_at > patience_s:
            return f"a stream that was silent for {patience_s:g} s"
        return f"a stream without its end after {self._stream_s:g} s" if age_s > self._stream_s else None

    def _close_tails(self, left: int) -> None:
        while len(self._tails) > left:
            self._tails.popleft().close()

    async def _exchange(self, session: aiohttp.ClientSession, request: Request, client_request_id: str) -> Attempt:
        exchange = self._begin(request.body)
        started_at, started = time.time(), time.monotonic()
        error: APIConnectionError | None = None
        try:
            error = await self._answered(session, client_request_id, exchange)
        except asyncio.CancelledError:
            if exchange.overdue is None or exchange.task.uncancel():  # somebody else ends this worker as well
                raise
            error = APITimeoutError(exchange.overdue, kind="timeout", sent=exchange.sent_at is not None)
        except Exception as raised:  # translate() knows every exception of aiohttp's; a test walks them
            error = self._translated(raised, exchange)
        finally:
            del self._exchanges[exchange.task]
            self._free(exchange, error)
        request_id = exchange.headers.get("x-request-id")
        if request_id is None and self._id_header is not None and exchange.sent_at is not None:
            request_id = client_request_id  # the one name by which the vendor can look for this exchange
        first_token_at = exchange.first_token_at
        return Attempt(
            started_at=started_at,
            latency_s=time.monotonic() - started,
            http_status=exchange.http_status,
            headers=exchange.headers,
            body=self._stored(exchange),
            error=error,
            time_to_first_token_s=None if first_token_at is None else first_token_at - started,
            request_id=None if request_id is None else self._credentials.clean_text(request_id),
            streamed=exchange.stream is not None,
        )

    def _begin(self, body: bytes) -> _Exchange:
        task = asyncio.current_task()
        assert task is not None
        exchange = self._exchanges[task] = _Exchange(task, _payload(body))
        ROUTE.set(exchange.route)
        return exchange

    def _free(self, exchange: _Exchange, error: APIConnectionError | None) -> None:
        """The exchange's connection is no longer in use, and what its end says of the server is known."""
        link = exchange.route.link
        if link is None:
            return
        now_s = time.monotonic()
        read_to_its_end = exchange.stream is None or not exchange.stream.done
        link.free_since = now_s if read_to_its_end else None
        answered = True if exchange.http_status is not None else None
        if error is not None and error.kind in ("reset", "stale_connection") and not answered:
            answered = False
        self._connectors[0].keep_alive.end(link, now_s, answered=answered)

    async def _answered(
        self, session: aiohttp.ClientSession, client_request_id: str, exchange: _Exchange
    ) -> APIConnectionError | None:
        """The request is sent and its answer read into the exchange."""
        own_headers = {self._id_header: client_request_id} if self._id_header is not None else None
        response = await session.post(
            self._url, data=exchange.payload, headers=own_headers, allow_redirects=False, proxy=self._proxy
        )
        exchange.http_status, exchange.headers = response.status, response.headers
        try:
            unpacker = encoding.Unpacker(response.headers.get("Content-Encoding", ""))
            if _is_stream(response):
                exchange.stream = Stream(self._credentials.cleaner())
                return await self._receive_stream(response, exchange, exchange.stream, unpacker)
            return await self._receive(response, exchange, unpacker)
        except encoding.EncodingError as error:
            response.close()
            if response.status >= 300:
                return None  # its status says what it is
            return APIConnectionError(str(error), kind="bad_encoding", sent=True)
        finally:
            if exchange.stream is not None and exchange.stream.done:
                self._tails.append(response)  # its connection is used again if its end comes before the next sweep
                self._close_tails(self._max_tails)
            else:
                response.release()
                await response.wait_for_close()

    async def _receive(
        self, response: aiohttp.ClientResponse, exchange: _Exchange, unpacker: encoding.Unpacker
    ) -> APIConnectionError | None:
        """Reads the body into the exchange; bounded in decoded bytes, so a gzip bomb ends here."""
        size = 0
        while packed_piece := await response.content.readany():
            piece = unpacker.unpack(packed_piece, self._max_bytes - size + 1)
            size += len(piece)
            if size > self._max_bytes:
                return self._too_large(response)
            exchange.received.append(piece)
        return None

    async def _receive_stream(
        self, response: aiohttp.ClientResponse, exchange: _Exchange, stream: Stream, unpacker: encoding.Unpacker
    ) -> APIConnectionError | None:
        """Reads the stream into the exchange up to its last event: some servers leave the connection open behind it."""
        exchange.heard_at = time.monotonic()
        while not stream.done and (packed_piece := await response.content.readany()):
            room = self._max_bytes - stream.size
            piece = unpacker.unpack(packed_piece, room + 1)
            stream.take(piece[:room])
            if len(piece) > room:
                return self._too_large(response)
            exchange.heard_at = time.monotonic()
            if stream.speaks and exchange.first_token_at is None:
                exchange.first_token_at = exchange.heard_at
        return None

    def _too_large(self, response: aiohttp.ClientResponse) -> APIConnectionError:
        response.close()
        message = f"the answer is larger than endpoint.max_answer_bytes ({self._max_bytes:,})"
        return APIConnectionError(message, kind="answer_too_large", sent=True)

    def _stored(self, exchange: _Exchange) -> bytes:
        """What came, as it is stored: without the key, a stream packed."""
        if exchange.stream is not None:
            return exchange.stream.stored()
        received = exchange.received
        return packed.stored(self._credentials.clean(received[0] if len(received) == 1 else b"".join(received)))

    def _translated(self, raised: Exception, exchange: _Exchange) -> APIConnectionError:
        sent_at, link = exchange.sent_at, exchange.route.link
        error = translate(raised, sent=sent_at is not None)
        if error.kind == "reset" and exchange.http_status is None and sent_at is not None and link is not None:
            round_trip_s = min(connector.round_trip_s for connector in self._connectors)
            if exchange.unsent:
                error = APIConnectionError(str(error), kind="lost_before_send", sent=True)
            elif link.was_stale(time.monotonic() - sent_at, round_trip_s):
                error = APIConnectionError(str(error), kind="stale_connection", sent=False)
        error.args = (self._credentials.clean_text(str(error)),)
        return error


def _payload(body: bytes) -> bytes | io.BytesIO:
    """The body as aiohttp likes it: a large one in pieces, so that the event loop is not held up."""
    return body if len(body) <= TOO_LARGE_BYTES_BODY else io.BytesIO(body)


def translate(raised: Exception, *, sent: bool) -> APIConnectionError:
    """aiohttp's exception as ours. `sent`: a connection was there, so the request may have left.

    Anything unknown is taken for a broken transfer after sending: the careful reading, since it may have been billed.
    """
    message = f"{type(raised).__name__}: {raised}"[:1000]
    for types, kind, timeout in _KINDS:
        if isinstance(raised, types):
            if kind == "reset" and not sent:
                kind = "connect"
            if sent and kind in _BEFORE_SENDING:
                kind = "reset"  # whatever it is called: with a connection that stood, it may have been billed
            if isinstance(raised, aiohttp.ClientConnectorError) and kind == "connect":
                kind = _connect_kind(raised)
            error_type = APITimeoutError if timeout else APIConnectionError
            return error_type(message, kind=kind, sent=sent)
    return APIConnectionError(message, kind="reset" if sent else "connect", sent=sent)


_KINDS: tuple[tuple[tuple[type[Exception], ...], str, bool], ...] = (
    ((aiohttp.ClientConnectorDNSError,), "dns", False),
    (
        (aiohttp.ClientConnectorCertificateError, aiohttp.ServerFingerprintMismatch, ssl.SSLCertVerificationError),
        "certificate",
        False,
    ),
    ((aiohttp.ClientConnectorSSLError,), "tls", False),
    ((aiohttp.ClientProxyConnectionError, aiohttp.ClientConnectorError), "connect", False),
    ((aiohttp.ConnectionTimeoutError,), "connect", True),
    ((aiohttp.ServerTimeoutError, asyncio.TimeoutError), "timeout", True),
    ((aiohttp.ServerDisconnectedError, aiohttp.ClientConnectionResetError, ConnectionError), "reset", False),
    ((aiohttp.ClientPayloadError,), "cut", False),
    ((aiohttp.ClientHttpProxyError,), "connect", False),
    ((aiohttp.InvalidURL, aiohttp.TooManyRedirects), "malformed_http", False),
    ((aiohttp.ClientResponseError,), "malformed_http", False),
    ((aiohttp.ClientOSError, OSError, aiohttp.ClientConnectionError), "reset", False),
)
"""First match wins; (types, kind, is a timeout)."""

_BEFORE_SENDING = frozenset({"dns", "refused", "connect", "tls"})
"""Kinds of which the policy says that nothing was sent."""


def _connect_kind(raised: aiohttp.ClientConnectorError) -> str:
    if isinstance(raised.os_error, ssl.SSLCertVerificationError):
        return "certificate"
    return "refused" if raised.os_error.errno == errno.ECONNREFUSED else "connect"


def _is_stream(response: aiohttp.ClientResponse) -> bool:
    """True for an answer that comes as server-sent events; what refuses a request comes whole."""
    content_type = response.headers.get("Content-Type", "")
    return 200 <= response.status < 300 and content_type.lower().startswith("text/event-stream")


def ssl_context(endpoint: Endpoint) -> ssl.SSLContext:
    """One verified TLS context for all connections: building it costs 20 ms and more.

    Raises:
        JobError: endpoint.ca_file can't be read.
    """
    try:
        return ssl.create_default_context(cafile=endpoint.ca_file)
    except OSError as error:
        raise JobError(f"endpoint.ca_file: can't load {endpoint.ca_file}: {error}") from error
