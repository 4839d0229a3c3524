"""Which connection a request goes on, and what the end of that connection can mean.

A server may close a connection that it keeps open for us at any moment. If it does so while our request is on its way,
we see the same as when it has read, served and billed the request and then dropped the connection. Three rules keep the
two apart:

- A connection whose end can be seen before the write is not used.
- A server that closes each connection behind its answer is found out before anything is at stake: until one connection
  has carried a second request, one at a time is tried, after it was idle for `SETTLING_S`.
- What ends without a byte after the write is taken for closed while idle only if it had been idle for `STALE_IDLE_S`
  and ended within two round trips. Everything else is in doubt. (Measured: a server that billed and reset after 50 ms
  was taken for one that had closed an idle connection; 21 of 27 such doubts had no name.)
"""

import asyncio
import contextvars
import select
import socket
import ssl
import time
import weakref
from dataclasses import dataclass

import aiohttp
from aiohttp.client_reqrep import ClientRequest

KEEPALIVE_S = 30.0
TCP_KEEPALIVE_S = 60  # below the 350 s and more after which common NAT gateways forget an idle flow

STALE_IDLE_S = 1.0
"""No server closes a connection for idleness sooner."""

STALE_ROUND_TRIPS = 2
"""The answer of a closed socket, or of a NAT that forgot the flow, takes one; the second is for a busy event loop."""

TLS_ROUND_TRIPS = 3
"""How many round trips it takes at most until a TLS connection stands: TCP's handshake one, TLS 1.2's two."""

SETTLING_S = 0.05
"""A server that closes a connection behind its answer has done so by then, and its FIN has arrived."""

UNKEPT_S = 60.0
"""How long a server that closes connections gets a fresh one for each request before one is tried again."""

DROPPED_IN_A_ROW = 2
"""So many reused connections that end without a byte, none answered between, put keep-alive in question again."""

AddressInfo = tuple[int | socket.AddressFamily, int | socket.SocketKind, int, str, tuple[object, ...]]


@dataclass(slots=True)
class Link:
    """One connection. `idle_s` is how long it was unused before the exchange at hand; None: it is its first.

    `free_since` is when its last exchange ended, on the monotonic clock; None while that is not known.
    """

    look: "select.poll"
    idle_s: float | None = None
    free_since: float | None = None

    @property
    def reused(self) -> bool:
        return self.idle_s is not None

    def was_stale(self, ended_after_s: float, round_trip_s: float) -> bool:
        """Whether its end, so long after the write and without a byte, means that it was closed while idle."""
        idle = self.idle_s is not None and self.idle_s >= STALE_IDLE_S
        return idle and ended_after_s <= STALE_ROUND_TRIPS * round_trip_s


class KeepAlive:
    """What a server has shown of keeping connections open. PURE."""

    def __init__(self) -> None:
        self.proven = False
        self._dropped = 0
        self._trial: Link | None = None
        self._not_before_s = 0.0

    def may_try(self, now_s: float) -> bool:
        """True where a connection may be used again to see whether the server keeps it open."""
        return self._trial is None and now_s >= self._not_before_s

    def try_(self, link: Link) -> None:
        """The connection is the one on trial."""
        self._trial = link

    def close(self, link: Link, now_s: float) -> None:
        """The server has closed the connection while nothing was at stake."""
        if self._trial is link:
            self._trial = None
            self._not_before_s = now_s + UNKEPT_S

    def end(self, link: Link, now_s: float, *, answered: bool | None) -> None:
        """An exchange has ended: with an answer, without a byte, or (None) in a way that says nothing of the server."""
        on_trial, self._trial = self._trial is link, None if self._trial is link else self._trial
        if not link.reused or answered is None:
            return
        if answered:
            self.proven, self._dropped = True, 0
            return
        self._dropped += 1
        if on_trial or self._dropped >= DROPPED_IN_A_ROW:
            self.proven, self._dropped = False, 0
            self._not_before_s = now_s + UNKEPT_S


@dataclass(slots=True)
class Route:
    """How one request finds its connection: what the connector leaves for the exchange that asked for it."""

    opened_at: float | None = None
    ready_at: float | None = None
    link: Link | None = None


ROUTE: contextvars.ContextVar[Route | None] = contextvars.ContextVar("route", default=None)


class Connector(aiohttp.TCPConnector):
    """A connector that knows its connections. `round_trip_s` is the least that was measured: infinite before that."""

    def __init__(self, *, ssl_context: ssl.SSLContext, tls: bool, force_close: bool) -> None:
        super().__init__(
            ssl=ssl_context,
            limit=0,  # the gate is the limit; a second one would queue where nobody counts
            force_close=force_close,
            keepalive_timeout=None if force_close else KEEPALIVE_S,
            socket_factory=open_socket,
        )
        self.round_trip_s = float("inf")
        self.keep_alive = KeepAlive()
        self._round_trips = TLS_ROUND_TRIPS if tls else 1
        self._links: weakref.WeakKeyDictionary[object, Link] = weakref.WeakKeyDictionary()

    async def connect(
        self,
        req: ClientRequest,
        traces: list[aiohttp.tracing.Trace],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109  (aiohttp's signature)
    ) -> aiohttp.connector.Connection:
        connection = await super().connect(req, traces, timeout)
        while (link := self._links.get(connection.protocol)) is not None:
            try:
                usable = await self._usable(connection, link)
            except BaseException:
                connection.close()
                self.keep_alive.close(link, time.monotonic())
                raise
            if usable:
                break
            connection.close()
            connection = await super().connect(req, traces, timeout)
        now_s = time.monotonic()
        route = ROUTE.get()
        if link is None:
            link = self._links[connection.protocol] = Link(_look_at(connection))
            if route is not None and route.opened_at is not None:
                self.round_trip_s = min(self.round_trip_s, (now_s - route.opened_at) / self._round_trips)
        else:
            link.idle_s = 0.0 if link.free_since is None else now_s - link.free_since
        link.free_since = None
        if route is not None:
            route.link, route.ready_at = link, now_s
        return connection

    async def _usable(self, connection: aiohttp.connector.Connection, link: Link) -> bool:
        """Whether a request may go on a connection that has carried one before."""
        if _is_over(connection, link.look):
            return False
        keep_alive, now_s = self.keep_alive, time.monotonic()
        if keep_alive.proven:
            return True
        if not keep_alive.may_try(now_s):
            return False
        keep_alive.try_(link)
        if (left_s := (link.free_since or now_s) + SETTLING_S - now_s) > 0:
            await asyncio.sleep(left_s)
            if _is_over(connection, link.look):
                keep_alive.close(link, time.monotonic())
                return False
        return True


def open_socket(address: AddressInfo) -> socket.socket:
    """A socket with TCP keepalive, and without Nagle's delay."""
    family, kind, protocol, _, _ = address
    opened = socket.socket(family, kind, protocol)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option in ("TCP_KEEPIDLE", "TCP_KEEPINTVL"):
        if hasattr(socket, option):
            opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), TCP_KEEPALIVE_S)
    if (route := ROUTE.get()) is not None:
        route.opened_at = time.monotonic()  # the name is resolved; of several addresses the last counts
    return opened


def _look_at(connection: aiohttp.connector.Connection) -> "select.poll":
    """What tells whether anything can be read from the connection; kept for as long as it lives."""
    look = select.poll()
    if connection.transport is not None:
        look.register(connection.transport.get_extra_info("socket").fileno(), select.POLLIN)
    return look


def _is_over(connection: aiohttp.connector.Connection, look: "select.poll") -> bool:
    """True when the server has closed an idle connection and the event loop has not come to see it yet: nothing is
    due on one, so whatever can be read is its end. Then nothing was sent, and nothing depends on time.
    """
    return connection.transport is None or bool(look.poll(0))
