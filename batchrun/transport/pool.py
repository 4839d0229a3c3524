"""The lean transport's connection pool. aiohttp's connector opens them."""

import time
from collections import deque
from functools import partial

import aiohttp
from aiohttp.client_reqrep import ClientRequest

from batchrun.transport.connector import KEEPALIVE_S, UNDER_WAY, Connector, Peer
from batchrun.transport.exchange import Exchange
from batchrun.transport.internals import start_parsing
from batchrun.transport.link import Link


class Pool:
    """A stack of idle links: the last used is used next, so surplus ones age at the bottom.

    It holds at most as many links as there were requests at once, plus the peer's `most_tails`.
    """

    def __init__(self, connector: Connector, request: ClientRequest, connect_timeout_s: float, peer: Peer) -> None:
        """`request` names the target of connections. It is never sent."""
        self._connector = connector
        self._request = request
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s)
        self._peer = peer
        self._idle: deque[Link] = deque()
        self._tails: dict[Link, None] = {}  # oldest first

    def acquire_kept(self, exchange: Exchange) -> Link | None:
        """A kept link for the exchange, at once; None if there is none, or the server is not known to keep them."""
        while self._idle and self._peer.keep_alive.proven:
            link = self._idle.pop()
            if not link.is_over():
                link.begin_next(exchange.started)
                exchange.link = link
                return link
            self.drop(link)
        return None

    async def acquire(self, exchange: Exchange, *, fresh: bool) -> Link:
        """A kept or new link, connected, for the exchange.

        Raises what aiohttp raises if it can't connect.
        """
        while self._idle and not fresh:
            link = self._idle.pop()
            try:
                usable = await self._peer.takes_another(link)
            except BaseException:
                self.drop(link)
                raise
            if usable:
                link.begin_next(time.monotonic())
                exchange.link = link
                return link
            self.drop(link)
        return await self._open(exchange)

    async def _open(self, exchange: Exchange) -> Link:
        """A new connection. The connector puts its link into the exchange."""
        UNDER_WAY.set(exchange)
        try:
            await self._connector.connect(self._request, [], self._timeout)
        except TimeoutError as error:
            raise aiohttp.ConnectionTimeoutError("no connection in time") from error
        finally:
            UNDER_WAY.set(None)
        link = exchange.link
        assert link is not None
        start_parsing(link.protocol)
        return link

    def give_back(self, link: Link) -> None:
        """Keeps the link for its next request, if it can carry one."""
        if link.protocol.should_close or link.protocol.writing_paused:
            self.drop(link)
        else:
            link.rest(time.monotonic())
            self._idle.append(link)

    def put_aside(self, link: Link, content: aiohttp.StreamReader) -> None:
        """Ignores the rest of the response; the link is reused if that ends before the next sweep."""
        while len(self._tails) >= self._peer.most_tails and self._tails:
            self._cut(next(iter(self._tails)))
        if not self._peer.most_tails:
            self.drop(link)
            return
        self._tails[link] = None
        content.on_eof(partial(self._tail_has_ended, link))

    def _tail_has_ended(self, link: Link) -> None:
        if link in self._tails:
            del self._tails[link]
            self.give_back(link)

    def _cut(self, link: Link) -> None:
        del self._tails[link]
        self.drop(link)

    def drop(self, link: Link) -> None:
        """Ends the link's connection now."""
        link.abort()
        link.connection.close()

    def sweep(self, idle_s: float = KEEPALIVE_S) -> None:
        """Closes connections that streams left open, and those idle for `idle_s`."""
        while self._tails:
            self._cut(next(iter(self._tails)))
        before = time.monotonic() - idle_s
        while self._idle and (self._idle[0].free_since or 0.0) <= before:
            self.drop(self._idle.popleft())
