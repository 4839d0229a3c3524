"""aiohttp's connector, with settings for long batches, used by both transports."""

import asyncio
import contextlib
import contextvars
import functools
import socket
import ssl
import time
from collections.abc import Callable

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.client_reqrep import ClientRequest

from batchrun.errors import APIConnectionError, JobError
from batchrun.job.settings import Endpoint
from batchrun.transport.exchange import Exchange
from batchrun.transport.keep_alive import SETTLING_S, TRIAL_S, KeepAlive
from batchrun.transport.link import Link, Protocol

KEEPALIVE_S = 30.0
TCP_KEEPALIVE_S = 60  # below the 350 s and more after which common NAT gateways forget an idle flow

TLS_ROUND_TRIPS = 3
"""The most round trips until a TLS connection is established: one for TCP, two for TLS 1.2."""

AddressInfo = tuple[int | socket.AddressFamily, int | socket.SocketKind, int, str, tuple[object, ...]]

UNDER_WAY: contextvars.ContextVar[Exchange | None] = contextvars.ContextVar("exchange", default=None)
"""The exchange that needs a connection: aiohttp calls the connector, which records in it what it did."""


MAX_TAILS = 64
"""How many streams are kept whose last event has come but not the end of their response."""


class Peer:
    """What is known about the server, shared by both transports.

    `round_trip_s` is the shortest measured; infinite before the first.
    """

    def __init__(self, most_tails: int) -> None:
        """`most_tails`: how many ended streams may keep their connection until the next sweep."""
        self.most_tails = most_tails
        self.round_trip_s = float("inf")
        self.keep_alive = KeepAlive()
        self._trial_ended = asyncio.Event()
        self._trial_until_s = 0.0

    async def takes_another(self, link: Link) -> bool:
        """Whether a request may be sent on a connection that carried one before."""
        if link.is_over():
            return False
        if self.keep_alive.proven:
            return True
        now_s = time.monotonic()
        if self.keep_alive.may_try(now_s):
            return await self._is_kept(link, now_s)
        return await self._is_proven_soon(now_s) and not link.is_over()

    async def _is_proven_soon(self, now_s: float) -> bool:
        """The result of the trial of another link, if it comes soon."""
        if self.keep_alive.is_trying and now_s < self._trial_until_s:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._trial_until_s - now_s):
                    await self._trial_ended.wait()
        return self.keep_alive.proven

    async def _is_kept(self, link: Link, now_s: float) -> bool:
        """Puts the link on trial: whether it is still open after a while. Its next request ends the trial."""
        self.keep_alive.start_trial(link)
        self._trial_ended.clear()
        self._trial_until_s = now_s + TRIAL_S
        try:
            await asyncio.sleep(max(0.0, (link.free_since or now_s) + SETTLING_S - now_s))
            closed = link.is_over()
        except BaseException:
            self.keep_alive.close(link, now_s)
            self._trial_ended.set()
            raise
        if closed:
            self.keep_alive.close(link, time.monotonic())
            self._trial_ended.set()
        return not closed

    def end(self, exchange: Exchange, error: APIConnectionError | None) -> None:
        """The exchange has ended (`KeepAlive.end`)."""
        link = exchange.link
        if link is None or (exchange.http_status is not None and self.keep_alive.is_certain):
            return
        self.keep_alive.end(link, time.monotonic(), reused=link.idle_s is not None, answered=exchange.answered(error))
        if not self.keep_alive.is_trying:
            self._trial_ended.set()


class Connector(aiohttp.TCPConnector):
    """aiohttp's connector, which records the link it chose in the exchange that is `UNDER_WAY`."""

    def __init__(self, peer: Peer, *, ssl_context: ssl.SSLContext, tls: bool, force_close: bool = False) -> None:
        super().__init__(
            ssl=ssl_context,
            limit=0,  # the gate limits requests in flight; aiohttp's default of 100 would queue them unseen
            force_close=force_close,
            keepalive_timeout=None if force_close else KEEPALIVE_S,
            socket_factory=open_socket,
        )
        self._peer = peer
        self._round_trips = TLS_ROUND_TRIPS if tls else 1
        if getattr(self._factory, "func", None) is ResponseHandler:  # else bytes can't be counted: more stays in doubt
            make: Callable[..., ResponseHandler] = Protocol
            self._factory = functools.partial(make, loop=self._loop)

    async def connect(
        self,
        req: ClientRequest,
        traces: list[aiohttp.tracing.Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109  (aiohttp's signature)
    ) -> aiohttp.connector.Connection:
        """A connection that may carry another request, with its link in the exchange that is `UNDER_WAY`."""
        connection = await super().connect(req, traces, timeout)
        link: Link | None
        while (link := getattr(connection.protocol, "link", None)) is not None:  # it carried a request before
            try:
                if await self._peer.takes_another(link):
                    break
            except BaseException:
                connection.close()
                raise
            connection.close()
            connection = await super().connect(req, traces, timeout)
        exchange = UNDER_WAY.get()
        now_s = time.monotonic()
        if link is None:
            link = self._new_link(connection, exchange, now_s)
        else:
            link.connection = connection
            link.begin_next(now_s)
        if exchange is not None:
            exchange.link, exchange.sent_at = link, now_s
        return connection

    def _new_link(self, connection: aiohttp.connector.Connection, exchange: Exchange | None, now_s: float) -> Link:
        """The link of a connection that was just made; how long that took bounds the round trip."""
        protocol = connection.protocol
        assert protocol is not None
        link = Link(connection, protocol)
        protocol.link = link  # type: ignore[attr-defined]  # a dict of protocols would keep them alive
        if exchange is not None and exchange.opened_at is not None:
            took_s = (now_s - exchange.opened_at) / self._round_trips
            self._peer.round_trip_s = min(self._peer.round_trip_s, took_s)
        return link


def open_socket(address: AddressInfo) -> socket.socket:
    """A socket with TCP keepalive (NAT drops one that is silent during a long reasoning call) and TCP_NODELAY."""
    family, kind, protocol, _, _ = address
    opened = socket.socket(family, kind, protocol)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option in ("TCP_KEEPIDLE", "TCP_KEEPINTVL"):
        if hasattr(socket, option):
            opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), TCP_KEEPALIVE_S)
    if (exchange := UNDER_WAY.get()) is not None:
        exchange.opened_at = time.monotonic()  # the name is resolved; with several addresses the last counts
    return opened


def ssl_context_of(endpoint: Endpoint, ca: str | None = None) -> ssl.SSLContext:
    """One verifying TLS context for all connections. `ca` stands for the content of `endpoint.ca_file`.

    Raises:
        JobError: `endpoint.ca_file` can't be loaded.
    """
    plain = endpoint.full_url.startswith("http:") and (endpoint.proxy or "http:").startswith("http:")
    if plain and endpoint.ca_file is None and ca is None:
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts no one; to load the system's certificates costs 20 ms
    try:
        return ssl.create_default_context(cafile=endpoint.ca_file if ca is None else None, cadata=ca)
    except OSError as error:
        raise JobError(f"endpoint.ca_file: can't load {endpoint.ca_file}: {error}") from error
