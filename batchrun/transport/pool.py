"""The lean wire's connections: made by aiohttp's connector, kept here."""

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
    """Links that wait for their next request, the one used last on top: what is too many grows old at the bottom.

    It holds no more links than there were ever requests at once, and the peer's `most_tails`.
    """

    def __init__(self, connector: Connector, request: ClientRequest, connect_timeout_s: float, peer: Peer) -> None:
        """`request` says where connections lead to. It is never sent."""
        self._connector = connector
        self._request = request
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s)
        self._peer = peer
        self._idle: deque[Link] = deque()
        self._tails: dict[Link, None] = {}  # in the order in which they came

    async def take(self, exchange: Exchange, *, fresh: bool) -> Link:
        """The link on which the exchange goes, kept or new; its connection stands.

        Raises what aiohttp raises where none can be made.
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
        """The link waits for its next request, if it can carry one."""
        if link.protocol.should_close or link.protocol.writing_paused:
            self.drop(link)
        else:
            link.free_since = time.monotonic()
            self._idle.append(link)

    def put_aside(self, link: Link, content: aiohttp.StreamReader) -> None:
        """The rest of the answer is not needed: the link is used again if its end comes before the next sweep."""
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
        """The link's connection ends now."""
        link.abort()
        link.connection.close()

    def sweep(self, idle_s: float = KEEPALIVE_S) -> None:
        """What was left open behind streams is closed, and what was idle for so long."""
        while self._tails:
            self._cut(next(iter(self._tails)))
        before = time.monotonic() - idle_s
        while self._idle and (self._idle[0].free_since or 0.0) <= before:
            self.drop(self._idle.popleft())
