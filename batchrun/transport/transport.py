"""`Transport`: one request → one response, in plain values; and the choice between its two implementations."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Literal, NamedTuple, Protocol

import aiohttp
import msgspec

from batchrun.credentials import Credentials
from batchrun.job.settings import Endpoint
from batchrun.records import Attempt
from batchrun.transport import internals
from batchrun.transport.connector import MAX_TAILS, Peer, ssl_context_of
from batchrun.transport.lean import lean_transport
from batchrun.transport.session import session_transport


class Transport(Protocol):
    """Sends requests to one endpoint. Arguments, results and errors can be pickled."""

    async def send(self, body: bytes, client_request_id: str) -> Attempt:
        """Sends one request and returns how the exchange ended, as a value for every kind of failure.

        If a kept connection had been closed while idle, the request is sent once more on a new one, within the same
        attempt: the server can't have read it.
        """
        ...

    def expire(self) -> int:
        """Ends every exchange that exceeded a timeout and closes what streams left open; returns the number of
        exchanges ended. To be called about once a second.
        """
        ...


class Choice(msgspec.Struct, frozen=True):
    """Which transport is used, and why."""

    wire: Literal["lean", "session", "ray"]
    why: str


class Wanted(NamedTuple):
    """What a run needs: a transport to each endpoint, in their order.

    At most `in_flight` requests are sent at once, and so many `tails` of ended streams may keep their connection for a
    second. `log` writes an event to run.log.
    """

    endpoints: Sequence[Endpoint]
    credentials: Credentials
    in_flight: int
    tails: int
    log: Callable[..., None]


class Opened(NamedTuple):
    """An open transport, and why it is of its kind."""

    transport: Transport
    choice: Choice


def choose(endpoint: Endpoint) -> Choice:
    """The lean transport if possible and wanted. Call it within the event loop that will send."""
    version = f"aiohttp {aiohttp.__version__}"
    if endpoint.proxy is not None:
        return Choice("session", "endpoint.proxy is set, and only aiohttp's session supports proxies")
    if endpoint.transport == "session":
        return Choice("session", "endpoint.transport is set")
    if (lacking := internals.lacking(asyncio.get_running_loop())) is not None:
        return Choice("session", f"{version} does not fit the lean transport: {lacking}")
    return Choice("lean", f"{version} fits")


@asynccontextmanager
async def opened_here(wanted: Wanted) -> AsyncIterator[list[Opened]]:
    """Opens transports in this process.

    Raises:
        JobError: `endpoint.ca_file` can't be loaded.
    """
    transports = []
    async with AsyncExitStack() as stack:
        for endpoint, credentials in zip(wanted.endpoints, wanted.credentials.members, strict=True):
            choice = choose(endpoint)
            transport = opened(choice, endpoint.full_url, endpoint, credentials, tails=wanted.tails)
            transports.append(Opened(await stack.enter_async_context(transport), choice))
        yield transports


@asynccontextmanager
async def opened(
    choice: Choice,
    url: str,
    endpoint: Endpoint,
    credentials: Credentials,
    *,
    tails: int = MAX_TAILS,
    ca: str | None = None,
) -> AsyncIterator[Transport]:
    """Opens the chosen transport. `tails` ended streams may keep their connection for a second. `ca` is the content of
    `endpoint.ca_file`, where that file can't be read.

    Raises:
        JobError: `endpoint.ca_file` can't be loaded.
    """
    tls, peer = ssl_context_of(endpoint, ca), Peer(tails)
    if choice.wire == "lean":
        async with lean_transport(url, endpoint, credentials, tls, peer) as lean:
            yield lean
    else:
        async with session_transport(url, endpoint, credentials, tls, peer) as session:
            yield session
