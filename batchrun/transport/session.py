"""The session transport, through aiohttp's `session.post`: for proxies, large bodies, and unsupported aiohttp versions.

It overrides aiohttp defaults that are wrong for a batch: the total timeout of 300 s, redirects (a 307 would send prompt
and key headers to another origin), unbounded decompression, no status for a response that it can't decompress.
"""

import asyncio
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from aiohttp.payload import TOO_LARGE_BYTES_BODY
from multidict import CIMultiDict

from batchrun import __version__
from batchrun.credentials import Credentials
from batchrun.errors import APIConnectionError
from batchrun.job.settings import Endpoint
from batchrun.records import Attempt
from batchrun.response import encoding
from batchrun.transport.connector import UNDER_WAY, Connector, Peer
from batchrun.transport.exchange import Exchange, end_overdue
from batchrun.transport.internals import READ_BUFFER_BYTES
from batchrun.transport.receiving import Receiver

PIECE_BYTES = 65_536
"""How much of a large body is written at once: what a socket accepts."""


def open_session(
    endpoint: Endpoint, credentials: Credentials, connector: aiohttp.BaseConnector
) -> aiohttp.ClientSession:
    """A session with the headers that all requests share."""
    headers = {
        "Content-Type": "application/json",
        "Accept": "application/json, text/event-stream",
        "Accept-Encoding": encoding.ACCEPTED,
        "User-Agent": f"batchrun/{__version__}",
        **credentials.headers,
    }
    return aiohttp.ClientSession(
        connector=connector,
        auto_decompress=False,
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=endpoint.connect_timeout_s),
        cookie_jar=aiohttp.DummyCookieJar(),
        read_bufsize=READ_BUFFER_BYTES,
    )


@asynccontextmanager
async def session_transport(
    url: str, endpoint: Endpoint, credentials: Credentials, tls: ssl.SSLContext, peer: Peer
) -> AsyncIterator["SessionTransport"]:
    """A session transport to this URL, closed at the end of the block."""
    secure = url.startswith("https:")
    kept = Connector(peer, ssl_context=tls, tls=secure)
    unkept = Connector(peer, ssl_context=tls, tls=secure, force_close=True)
    async with (
        open_session(endpoint, credentials, kept) as pooled,
        open_session(endpoint, credentials, unkept) as fresh,
    ):
        transport = SessionTransport(url, endpoint, Receiver(endpoint, credentials), peer, pooled, fresh)
        try:
            yield transport
        finally:
            transport.close_tails()


class SessionTransport:
    """A `Transport`."""

    def __init__(
        self,
        url: str,
        endpoint: Endpoint,
        receiver: Receiver,
        peer: Peer,
        pooled: aiohttp.ClientSession,
        fresh: aiohttp.ClientSession,
    ) -> None:
        """`fresh` never reuses a connection: a request that met a stale one is sent again through it."""
        self._url = url
        self._endpoint = endpoint
        self._receiver = receiver
        self._peer = peer
        self._pooled = pooled
        self._fresh = fresh
        self._exchanges: set[Exchange] = set()
        self._tails: deque[aiohttp.ClientResponse] = deque()

    async def send(self, body: bytes, client_request_id: str) -> Attempt:
        attempt = await self._exchange(self._pooled, body, client_request_id)
        if attempt.error is not None and attempt.error.kind == "stale_connection":
            return await self._exchange(self._fresh, body, client_request_id)
        return attempt

    def expire(self) -> int:
        self.close_tails()
        return end_overdue(self._exchanges, self._endpoint)

    def close_tails(self, left: int = 0) -> None:
        """Closes responses that streams left open, except the `left` newest."""
        while len(self._tails) > left:
            self._tails.popleft().close()

    async def _exchange(self, session: aiohttp.ClientSession, body: bytes, client_request_id: str) -> Attempt:
        exchange = Exchange(time.time(), time.monotonic())
        self._exchanges.add(exchange)
        UNDER_WAY.set(exchange)
        error: APIConnectionError | None = None
        try:
            error = await self._answered(session, body, client_request_id, exchange)
        except Exception as raised:  # translate() handles every exception of aiohttp; a test walks them
            error = self._receiver.failed(raised, exchange, self._peer.round_trip_s)
        finally:
            self._exchanges.discard(exchange)
            self._free(exchange, error)
        return self._receiver.attempt(exchange, client_request_id, error)

    async def _answered(
        self,
        session: aiohttp.ClientSession,
        body: bytes,
        client_request_id: str,
        exchange: Exchange,
    ) -> APIConnectionError | None:
        """Sends the request and reads its response into the exchange."""
        payload = body if len(body) <= TOO_LARGE_BYTES_BODY else Pieces(body)
        credentials = self._receiver.credentials
        own_headers = dict(credentials.headers) if credentials.version else {}  # the session has those of version 0
        if self._endpoint.id_header is not None:
            own_headers[self._endpoint.id_header] = client_request_id
        try:
            response = await session.post(
                self._url, data=payload, headers=own_headers, allow_redirects=False, proxy=self._endpoint.proxy
            )
        except BaseException:
            exchange.unsent = _is_unsent(payload)
            raise
        exchange.http_status, exchange.headers = response.status, CIMultiDict(response.headers)
        try:
            return await self._receiver.receive(response.content, exchange)
        finally:
            if exchange.stream is not None and exchange.stream.done:
                self._tails.append(response)  # its connection is reused if its end comes before the next sweep
                self.close_tails(self._peer.most_tails)
            elif (
                response.content.is_eof()
                and not _is_unsent(payload)
                and not exchange.is_writing
                and response.status != 401  # as in `lean`: the next request may meet a server with another key
            ):
                response.release()
                await response.wait_for_close()
            else:  # also after an early response: the server may never read the rest of the request
                response.close()

    def _free(self, exchange: Exchange, error: APIConnectionError | None) -> None:
        """Marks the exchange's connection as free, and records what its end shows about the server."""
        link = exchange.link
        if link is None:
            return
        read_to_its_end = exchange.stream is None or not exchange.stream.done
        link.rest(time.monotonic() if read_to_its_end else None)
        self._peer.end(exchange, error)


class Pieces(aiohttp.Payload):
    """A large body, written in pieces so that the event loop is not blocked; `written` counts the bytes so far.

    With a BytesIO, aiohttp reads its buffer, which copies shared bytes: 10 to 60 ms for the 27 MB of a 20 MB image
    (measured).
    """

    _value: bytes

    def __init__(self, body: bytes) -> None:
        super().__init__(body)
        self._size = len(body)
        self.written = 0

    async def write(self, writer: AbstractStreamWriter) -> None:
        while self.written < len(self._value):
            piece = self._value[self.written : self.written + PIECE_BYTES]
            self.written += len(piece)
            await asyncio.sleep(0)  # a write to a socket with room does not wait
            await writer.write(piece)

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        await self.write(writer)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return self._value.decode(encoding, errors)


def _is_unsent(payload: bytes | Pieces) -> bool:
    """True if a part of the body has certainly not left."""
    return isinstance(payload, Pieces) and payload.written < len(payload._value)
