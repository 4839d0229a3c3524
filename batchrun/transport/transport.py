"""`Transport`: one request → one response, in plain values. Two wires carry it; which one is decided here."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal, Protocol

import aiohttp
import msgspec

from batchrun.credentials import Credentials
from batchrun.job.job import Endpoint
from batchrun.records import Attempt
from batchrun.transport import internals
from batchrun.transport.connector import MAX_TAILS, Peer, ssl_context_of
from batchrun.transport.lean import lean_transport
from batchrun.transport.session import session_transport


class Transport(Protocol):
    """Sends requests to one endpoint. What goes in and comes out can be pickled, errors included."""

    async def send(self, body: bytes, client_request_id: str) -> Attempt:
        """How one exchange ended, as a value, whatever happened on the wire.

        Where a kept connection turns out to have been closed while it was idle, the request goes out once more, on a
        fresh one, within the same attempt: the server can't have read it.
        """
        ...

    def expire(self) -> int:
        """Every exchange that has taken too long is ended, and what streams left open is closed; returns how many
        exchanges. To be called about once a second.
        """
        ...


class Choice(msgspec.Struct, frozen=True):
    """Which wire carries the requests, and why not the other."""

    wire: Literal["lean", "session"]
    why: str


def choose(endpoint: Endpoint) -> Choice:
    """The lean wire, unless it can't be used or is not wanted. Call it within the event loop that will send."""
    version = f"aiohttp {aiohttp.__version__}"
    if endpoint.proxy is not None:
        return Choice("session", "endpoint.proxy is set, and aiohttp's session knows proxies")
    if endpoint.transport == "session":
        return Choice("session", "endpoint.transport asks for it")
    if (lacking := internals.lacking(asyncio.get_running_loop())) is not None:
        return Choice("session", f"{version} is another inside than the lean wire needs: {lacking}")
    return Choice("lean", f"{version} has what it needs")


@asynccontextmanager
async def opened(
    choice: Choice, url: str, endpoint: Endpoint, credentials: Credentials, *, tails: int = MAX_TAILS
) -> AsyncIterator[Transport]:
    """The chosen wire, while the block lasts. `tails` streams that have ended may keep their connection for a second.

    Raises:
        JobError: `endpoint.ca_file` can't be loaded.
    """
    tls, peer = ssl_context_of(endpoint), Peer(tails)
    if choice.wire == "lean":
        async with lean_transport(url, endpoint, credentials, tls, peer) as lean:
            yield lean
    else:
        async with session_transport(url, endpoint, credentials, tls, peer) as session:
            yield session
