"""The lean transport: one write and one wake-up per request, on aiohttp's connector and C parser, without its session.

`ClientSession._request` costs 50 µs per request beyond what lies below it (measured: docs/benchmarks.md, "The wire"):
it builds a request, merges headers, starts a timer and a writer. Here the shared part is built once, and a
connection's parser lives as long as the connection. `internals` lists what this needs of aiohttp.
"""

import ssl
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from aiohttp.client_reqrep import ClientRequest
from multidict import CIMultiDict

from batchrun.credentials import Credentials
from batchrun.errors import APIConnectionError
from batchrun.job.settings import Endpoint
from batchrun.records import Attempt
from batchrun.transport.connector import Connector, Peer
from batchrun.transport.exchange import Exchange, end_overdue
from batchrun.transport.internals import head_of, request_of
from batchrun.transport.link import Link
from batchrun.transport.pool import Pool
from batchrun.transport.receiving import Receiver
from batchrun.transport.session import SessionTransport, open_session, session_transport

MAX_JOINED_BYTES = 1_048_576
"""A larger request is sent by the session in pieces: writing it at once would block the event loop."""


@asynccontextmanager
async def lean_transport(
    url: str, endpoint: Endpoint, credentials: Credentials, tls: ssl.SSLContext, peer: Peer
) -> AsyncIterator["LeanTransport"]:
    """A lean transport to this URL, closed at the end of the block."""
    connector = Connector(peer, ssl_context=tls, tls=url.startswith("https:"))
    async with (
        open_session(endpoint, credentials, connector) as session,
        session_transport(url, endpoint, credentials, tls, peer) as large,
    ):
        request = await request_of(session, url)
        pool = Pool(connector, request, endpoint.connect_timeout_s, peer)
        head = Head(request, endpoint.id_header, credentials)
        try:
            yield LeanTransport(head, pool, peer, Receiver(endpoint, credentials), endpoint, large)
        finally:
            pool.sweep(idle_s=0.0)


class Head:
    """The part of a request before its body."""

    def __init__(self, request: ClientRequest, id_header: str | None, credentials: Credentials) -> None:
        """`request` has the request line and the headers that all requests share."""
        self._request = request
        self._credentials = credentials
        self._version = credentials.version
        self._common = head_of(request)
        self._id_name = None if id_header is None else f"{id_header}: ".encode()

    def joined(self, body: bytes, client_request_id: str) -> bytes:
        """The whole request."""
        if self._version != self._credentials.version:  # the key was replaced
            self._version = self._credentials.version
            self._request.headers.update(self._credentials.headers)
            self._common = head_of(self._request)
        length = b"Content-Length: %d\r\n" % len(body)
        if self._id_name is None:
            return b"".join((self._common, length, b"\r\n", body))
        return b"".join((self._common, length, self._id_name, client_request_id.encode(), b"\r\n\r\n", body))


class LeanTransport:
    """A `Transport`."""

    def __init__(
        self, head: Head, pool: Pool, peer: Peer, receiver: Receiver, endpoint: Endpoint, large: SessionTransport
    ) -> None:
        """`large` sends requests that are too large for one write."""
        self._head = head
        self._pool = pool
        self._peer = peer
        self._receiver = receiver
        self._endpoint = endpoint
        self._large = large
        self._exchanges: set[Exchange] = set()

    def send(self, body: bytes, client_request_id: str) -> Coroutine[Any, Any, Attempt]:
        if len(body) > MAX_JOINED_BYTES:
            return self._large.send(body, client_request_id)
        return self._exchange(body, client_request_id, fresh=False)

    def expire(self) -> int:
        self._pool.sweep()
        return end_overdue(self._exchanges, self._endpoint) + self._large.expire()

    async def _exchange(self, body: bytes, client_request_id: str, *, fresh: bool) -> Attempt:
        exchange = Exchange(time.time(), time.monotonic())
        self._exchanges.add(exchange)
        error: APIConnectionError | None = None
        try:
            link = None if fresh else self._pool.acquire_kept(exchange)
            if link is None:
                link = await self._pool.acquire(exchange, fresh=fresh)
            error = await self._answered(link, self._head.joined(body, client_request_id), exchange)
        except Exception as raised:  # translate() handles every exception of aiohttp; a test walks them
            error = self._receiver.failed(raised, exchange, self._peer.round_trip_s)
        finally:
            self._exchanges.discard(exchange)
            self._peer.end(exchange, error)
        if error is not None and error.kind == "stale_connection" and not fresh:
            return await self._exchange(body, client_request_id, fresh=True)
        return self._receiver.attempt(exchange, client_request_id, error)

    async def _answered(self, link: Link, request: bytes, exchange: Exchange) -> APIConnectionError | None:
        """Writes the request, reads its response into the exchange, and returns or closes the link."""
        content: aiohttp.StreamReader | None = None
        try:
            if link.transport.is_closing():
                exchange.sent_at = None  # nothing was sent
                raise aiohttp.ClientConnectionResetError("the connection ended before the request")
            exchange.sent_at = time.monotonic()
            link.transport.write(request)
            message, content = await link.protocol.read()
            # interim responses (100 Continue, 103 Early Hints) are skipped, even unexpected ones (RFC 9110, section
            # 15.2); after a 101 the connection is no longer HTTP
            while message.code < 200 and message.code != 101:
                message, content = await link.protocol.read()
            exchange.http_status = message.code
            exchange.headers = CIMultiDict(message.headers)  # a plain value: aiohttp's proxy can't be pickled
            return await self._receiver.receive(content, exchange)
        except BaseException:
            exchange.unsent = exchange.is_writing
            raise
        finally:
            # a wrong key may be that of one server behind the address: the next request meets another
            if content is not None and content.is_eof() and exchange.http_status != 401:
                self._pool.give_back(link)
            elif content is not None and exchange.stream is not None and exchange.stream.done:
                self._pool.put_aside(link, content)
            else:
                self._pool.drop(link)
