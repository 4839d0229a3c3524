"""The part that runs in an actor: the transports of the run, and the answers that the driver has not confirmed yet.

Nothing is decided here: no retry, no rate, no verdict. Both calls that carry requests and answers may be repeated after
a lost connection without sending anything twice, and without losing an answer.
"""

import asyncio
import contextlib
import os
import socket
from collections.abc import Iterable

import msgspec

from batchrun import __version__, open_files
from batchrun.credentials import Credentials
from batchrun.errors import JobError
from batchrun.job.settings import Endpoint
from batchrun.open_files import OpenFiles
from batchrun.ray_engine import orphans
from batchrun.records import Attempt
from batchrun.transport.transport import Choice, Transport, choose, opened

POLL_S = 2.0
"""How long a call for answers waits for the first one: an actor answers at least this often."""

REPLY_BYTES = 64_000
"""The most bytes in one reply, unless one answer alone is larger. Ray sends results below 100 KB directly; larger ones
pass through the object store of the actor's node, and are lost with it."""

SWEEP_S = 1.0  # as often as the driver calls `Transport.expire` where it sends itself

Parcel = tuple[int, int, bytes, str]
"""A request under way to an actor: its number, the endpoint's place in the job, the body, and our id of the attempt."""

Answered = tuple[int, Attempt | Exception]
"""The number of a request with its attempt; an exception is a bug."""


class Setup(msgspec.Struct, frozen=True):
    """An actor's settings for sending. `authorities` has the contents of the endpoints' `ca_file`, which its
    machine may not have.
    """

    version: str
    endpoints: tuple[Endpoint, ...]
    authorities: tuple[str | None, ...]
    in_flight: int
    tails: int
    is_local: bool = False  # the cluster ends with the driver


class Ready(msgspec.Struct, frozen=True):
    """An actor that can send: where it is, how many requests it can have in flight, and its wires."""

    pid: int
    host: str
    room: int
    choices: tuple[Choice, ...]


class Sender:
    """The class of the actors. Ray calls its methods in one event loop."""

    def __init__(self) -> None:
        self._opened = contextlib.AsyncExitStack()
        self._transports: list[Transport] = []
        self._credentials: Credentials | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._taken = 0
        self._finished: dict[int, Attempt | Exception] = {}
        self._news = asyncio.Event()
        self._parent = os.getppid()

    async def open(self, setup: Setup, credentials: Credentials) -> Ready:
        """Opens the transports. The key comes as an argument of a call, which Ray neither stores nor logs.

        Raises:
            JobError: batchrun is another one here, or a `ca_file` can't be loaded.
        """
        host = socket.gethostname()
        if setup.version != __version__:
            raise JobError(f"{host} has batchrun {__version__}, and this is {setup.version}; install the same on all")
        open_files.allow(setup.in_flight + setup.tails)
        room = OpenFiles().connections(setup.in_flight + setup.tails)
        tails = max(0, min(setup.tails, room - setup.in_flight))
        self._credentials = credentials
        if setup.is_local:
            orphans.end_children_with(self._parent)
        choices = []
        places = zip(setup.endpoints, credentials.members, setup.authorities, strict=True)
        for endpoint, own, authorities in places:
            choice = choose(endpoint)
            transport = opened(choice, endpoint.full_url, endpoint, own, tails=tails, ca=authorities)
            self._transports.append(await self._opened.enter_async_context(transport))
            choices.append(choice)
        self._start(self._sweep())
        return Ready(os.getpid(), host, min(room, setup.in_flight), tuple(choices))

    async def submit(self, number: int, credentials: Credentials | None, *batches: list[Parcel]) -> None:
        """Sends these requests. A call whose number was used before is a repetition, and does nothing.

        `credentials` are there if a key was replaced since the last call.
        """
        if credentials is not None and self._credentials is not None:
            self._credentials.update(credentials)
        if number <= self._taken:
            return
        self._taken = number
        for batch in batches:
            for parcel in batch:
                self._start(self._send(parcel))

    async def finished(self, received: Iterable[int]) -> list[Answered]:
        """The attempts that have ended, as soon as there is one. Each is in every reply until it is `received`."""
        for number in received:
            self._finished.pop(number, None)
        if not self._finished:
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), POLL_S)
        reply: list[Answered] = []
        size = 0
        for number, attempt in self._finished.items():
            size += len(attempt.body) + 1_000 if isinstance(attempt, Attempt) else 0
            if reply and size > REPLY_BYTES:
                break
            reply.append((number, attempt))
        return reply

    def _start(self, work: "asyncio._CoroutineLike[None]") -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(self, parcel: Parcel) -> None:
        number, endpoint, body, client_request_id = parcel
        try:
            self._finished[number] = await self._transports[endpoint].send(body, client_request_id)
        except Exception as bug:  # a transport raises nothing
            self._finished[number] = bug
        self._news.set()

    async def _sweep(self) -> None:
        """Ends exchanges that take too long."""
        clock = asyncio.get_running_loop().time
        while True:
            slept_at_s = clock()
            await asyncio.sleep(SWEEP_S)
            if os.getppid() != self._parent:
                os._exit(1)  # without its raylet no one reaches this process, and Ray would end it after a minute
            # else this process was stopped meanwhile, and answers wait to be read
            if clock() - slept_at_s < 2 * SWEEP_S:
                for transport in self._transports:
                    transport.expire()
