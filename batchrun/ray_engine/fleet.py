"""The actors as the driver sees them: how many there are, which requests each has, and what the loss of one means.

A request is in one of three places. While it waits here, it has not been sent, even if actors die. After the call
that hands it to an actor, it may have been sent: if that actor is lost, it may have been billed. When its
attempt has arrived here, the actor no longer matters.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from batchrun.credentials import Credentials
from batchrun.errors import APIConnectionError, ExitCode, RunStoppedError
from batchrun.job.settings import Engine
from batchrun.policy import Fault
from batchrun.ray_engine import failures
from batchrun.ray_engine.sender import Answered, Parcel, Ready, Sender, Setup
from batchrun.records import Attempt

PIECE_BYTES = 64_000
"""The most bytes of bodies in one argument of a call, unless one body alone has more. Ray sends arguments below 100 KB
with the call; larger ones pass through the object store, which may spill them to disk."""

OPTIONS = {"max_restarts": 0, "max_task_retries": 0}
"""Ray starts no actor again and repeats no call by itself: a request is sent again only if the run's policy says so."""

CALL_BYTES = 4_000_000
"""The most bytes of bodies in one call: Ray sends 10 MB of arguments with it."""

MOST_CALLS_PER_S = 1_000
"""How often the driver calls actors, in all. A call costs it about 0.5 ms of CPU, of any size (measured:
docs/ray.md), so what comes sooner waits for the next one: 2 ms with one actor, 32 ms with 16."""

SILENT_S = 60.0
"""An actor is lost that has answered no call for so long. Each answers every `sender.POLL_S` seconds."""

REPEAT_S = 1.0
"""When a call is repeated whose connection was lost."""

UNSENT_S = 30.0
"""Requests that wait this long without any actor fail as not sent, which the gate treats as an outage."""

SURPLUS_S = 60.0
"""An actor that has not been needed for so long is ended, down to `engine.actors`."""

CLOSE_S = 5.0  # a call to an actor on a node that is gone may not return


class Actor:
    """One actor. `ready` is None until it can send. `heard_at`, its last answer to a call, is on the loop's clock.

    `leaving`: it gets no more requests, because it is not needed.
    """

    def __init__(self, handle: Any, now: float) -> None:
        self.handle = handle
        self.ready: Ready | None = None
        self.in_flight: set[int] = set()
        self.calls = 0
        self.handing_over = self.leaving = False
        self.key_version = 0
        self.heard_at = now

    @property
    def room(self) -> int:
        """The further requests it can have in flight; 0 while a call hands over some, and if it is leaving."""
        if self.ready is None or self.handing_over or self.leaving:
            return 0
        return self.ready.room - len(self.in_flight)

    def __str__(self) -> str:
        return "a Ray actor" if self.ready is None else f"the Ray actor {self.ready.pid} on {self.ready.host}"


class Fleet:
    """The actors of a run. Make it, `start` it and close it within the event loop."""

    def __init__(
        self,
        engine: Engine,
        setup: Setup,
        credentials: Credentials,
        require_reachable: Callable[[Ready], None],
        report: Callable[..., None],
    ) -> None:
        """`require_reachable` raises a JobError if an actor can't reach an endpoint; `report` gets (event, line, fields
        of run.log).
        """
        self._engine = engine
        self._setup = setup
        self._credentials = credentials
        self._require_reachable = require_reachable
        self._report = report
        self._loop = asyncio.get_running_loop()
        self._class = ray.remote(Sender).options(num_cpus=engine.cpus_per_actor, **OPTIONS)
        self._actors: list[Actor] = []
        self._unsent: deque[tuple[float, Parcel]] = deque()
        self._replies: dict[int, asyncio.Future[Attempt]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_number = 0
        self._deals_soon = False
        self._no_actor_since: float | None = None
        self._surplus_since: float | None = None
        self._closing = False
        self._last_failure: str | None = None
        self._cut_off: RunStoppedError | None = None
        self._first: asyncio.Future[Ready] = self._loop.create_future()

    # ── the life of the fleet ─────────────────────────────────────────────────────────────────────────────────────────

    async def start(self) -> Ready:
        """Starts the actors; returns the first that can send.

        Raises:
            JobError: an actor can't work as it is set up.
            RunStoppedError: none could start in time; nothing was sent.
        """
        for _ in range(self._engine.actors):
            self._start_one()
        try:
            async with asyncio.timeout(self._engine.start_timeout_s):
                return await asyncio.shield(self._first)
        except TimeoutError:
            if self._last_failure is not None:
                why = f"no Ray actor could start: {self._last_failure}; run the same command again"
                raise RunStoppedError(why, ExitCode.PAUSED) from None
            free, all_cpus = ray.available_resources().get("CPU", 0), ray.cluster_resources().get("CPU", 0)
            raise RunStoppedError(
                f"no Ray actor could start within {self._engine.start_timeout_s:g} s: each needs "
                f"{self._engine.cpus_per_actor:g} CPU (engine.cpus_per_actor), and {free:g} of the cluster's "
                f"{all_cpus:g} are free; run the same command again when there are more",
                ExitCode.PAUSED,
            ) from None

    async def close(self) -> None:
        """Ends all actors; what they have in flight is abandoned."""
        self._closing = True
        for actor in tuple(self._actors):
            self._end(actor)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_S)

    def tend(self) -> None:
        """To be called about once a second: gives up silent actors, starts and ends some, fails what waits too long.

        Raises:
            RunStoppedError: this process can't have an actor any more.
        """
        if self._cut_off is not None:
            raise self._cut_off
        now = self._loop.time()
        for actor in tuple(self._actors):
            if actor.ready is not None and now - actor.heard_at > SILENT_S:
                self._lost(actor, f"it has not answered for {SILENT_S:g} s")
        # an actor for every `requests_per_actor` in flight, within the bounds
        most, busy = self._engine.max_actors or self._engine.actors, len(self._replies)
        wanted = min(most, max(self._engine.actors, math.ceil(busy / self._engine.requests_per_actor)))
        if len(self._actors) < wanted:
            self._start_one()  # one a second: so that actors that die at once don't cause a busy loop
        self._end_surplus(wanted, now)
        if any(actor.ready is not None for actor in self._actors):
            self._no_actor_since = None
        elif self._no_actor_since is None:
            self._no_actor_since = now
        elif now - self._no_actor_since > UNSENT_S:
            self._fail_unsent(f"no Ray actor has been there for {UNSENT_S:g} s")

    def _end_surplus(self, wanted: int, now: float) -> None:
        """Ends actors that have not been needed for a while, so that Ray can give their nodes back."""
        if len(self._actors) <= wanted:
            self._surplus_since = None
        elif self._surplus_since is None:
            self._surplus_since = now
        is_over = self._surplus_since is not None and now - self._surplus_since > SURPLUS_S
        for place, actor in enumerate(sorted(self._actors, key=lambda actor: actor.ready is None)):
            # no more requests for it: few requests, dealt evenly, would keep each actor busy for ever
            actor.leaving = is_over and place >= wanted
            if actor.leaving and not actor.in_flight and not actor.handing_over:
                self._end(actor)
                self._report("actor ended", None, actor=str(actor), why="not needed")

    def _start_one(self) -> None:
        if self._closing:
            return
        actor = Actor(self._class.remote(), self._loop.time())
        self._actors.append(actor)
        self._run(self._open(actor))

    async def _open(self, actor: Actor) -> None:
        """The actor starts to send as soon as Ray has found a place for it."""
        actor.key_version = self._version
        try:
            ready: Ready = await actor.handle.open.remote(self._setup, self._credentials)
            self._require_reachable(ready)
        except Exception as error:
            self._end(actor)
            if self._closing:
                return
            self._note_cut_off(error)
            self._last_failure = why = failures.in_words(error)
            if self._first.done():
                self._report("actor failed", f"warning: a Ray actor could not start: {why}", why=why)
                return
            # before the first actor works, an error that all would have ends the start; a node that dies does not
            self._report("actor failed", None, why=why)
            if (known := self._cut_off or failures.as_ours(error, why)) is not None:
                self._first.set_exception(known)
            else:
                self._loop.call_later(REPEAT_S, self._start_one)
            return
        if actor not in self._actors:
            return
        actor.ready, actor.heard_at = ready, self._loop.time()
        self._report("actor", None, actor=str(actor), room=ready.room, wires=[choice.wire for choice in ready.choices])
        if not self._first.done():
            self._first.set_result(ready)
        self._deal_soon()
        await self._collect(actor)

    def _end(self, actor: Actor) -> None:
        if actor in self._actors:
            self._actors.remove(actor)
        ray.kill(actor.handle, no_restart=True)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def _pause_s(self) -> float:
        """Seconds from one call in each direction until an actor gets the next."""
        return 2 * len(self._actors) / MOST_CALLS_PER_S

    @property
    def _version(self) -> int:
        """A number that grows when a key is replaced."""
        return sum(each.version for each in self._credentials.members)

    # ── the way of a request ──────────────────────────────────────────────────────────────────────────────────────────

    async def send(self, endpoint: int, body: bytes, client_request_id: str) -> Attempt:
        """As `Transport.send`, to the endpoint at this place."""
        if self._cut_off is not None:
            return _not_sent(time.time(), str(self._cut_off))
        self._last_number = number = self._last_number + 1
        reply: asyncio.Future[Attempt] = self._loop.create_future()
        self._replies[number] = reply
        self._unsent.append((time.time(), (number, endpoint, body, client_request_id)))
        self._deal_soon()
        try:
            return await reply
        finally:
            del self._replies[number]

    def _deal_soon(self) -> None:
        if not self._deals_soon:
            self._deals_soon = True
            self._loop.call_soon(self._deal)  # requests that were admitted in one turn of the loop travel together

    def _deal(self) -> None:
        """Hands waiting requests over, so that all actors have equally many in flight."""
        self._deals_soon = False
        free = [actor for actor in self._actors if actor.room > 0]
        if not free or not self._unsent or self._closing:
            return
        free.sort(key=lambda actor: len(actor.in_flight))
        level = math.ceil((len(self._unsent) + sum(len(actor.in_flight) for actor in free)) / len(free))
        for actor in free:
            if batch := self._next(min(actor.room, level - len(actor.in_flight))):
                actor.in_flight.update(parcel[0] for parcel in batch)
                actor.handing_over = True
                self._run(self._hand_over(actor, batch))

    def _next(self, most: int) -> list[Parcel]:
        """The next requests, except those whose caller has gone."""
        batch: list[Parcel] = []
        size = 0
        while self._unsent and len(batch) < most and size < CALL_BYTES:
            _, parcel = self._unsent.popleft()
            if parcel[0] in self._replies:
                batch.append(parcel)
                size += len(parcel[2])
        return batch

    async def _hand_over(self, actor: Actor, batch: list[Parcel]) -> None:
        """Calls the actor until it confirms; it knows a repeated call by its number."""
        actor.calls += 1
        version = self._version
        credentials = self._credentials if version != actor.key_version else None
        while actor in self._actors:
            next_s = self._loop.time() + self._pause_s
            try:
                await actor.handle.submit.remote(actor.calls, credentials, *_pieces(batch))
            except Exception as error:
                if not await self._is_repeated(actor, error):
                    return
            else:
                actor.key_version = version
                await asyncio.sleep(next_s - self._loop.time())
                actor.handing_over = False
                self._deal_soon()
                return

    async def _collect(self, actor: Actor) -> None:
        """Collects the actor's attempts until it ends."""
        received: list[int] = []
        while actor in self._actors:
            next_s = self._loop.time() + self._pause_s
            try:
                reply: list[Answered] = await actor.handle.finished.remote(received)
            except Exception as error:
                if not await self._is_repeated(actor, error):
                    return
                continue
            actor.heard_at = self._loop.time()
            received = [number for number, _ in reply]
            for number, attempt in reply:
                if number in actor.in_flight:
                    actor.in_flight.discard(number)
                    self._answer(number, attempt)
            if reply:
                self._deal_soon()
                await asyncio.sleep(next_s - self._loop.time())

    async def _is_repeated(self, actor: Actor, error: Exception) -> bool:
        """Whether a call that failed is repeated: not if the actor has died, or the call itself raised."""
        if self._closing:
            return False
        if isinstance(error, RayError) and not isinstance(error, ActorDiedError | RayTaskError):
            self._report("call repeated", None, actor=str(actor), why=failures.in_words(error))
            await asyncio.sleep(REPEAT_S)
            return actor in self._actors
        self._lost(actor, failures.in_words(error))
        self._note_cut_off(error)
        return False

    def _note_cut_off(self, error: Exception) -> None:
        """If the node of this process has died, its actors are gone, and it can have no others: `tend` ends the run."""
        if "owner has died" in str(error) and not self._closing and self._cut_off is None:
            why = "the Ray node that this process is on has died, and all actors with it; run the same command again"
            self._cut_off = RunStoppedError(why, ExitCode.PAUSED)
            self._fail_unsent(why)

    def _answer(self, number: int, attempt: Attempt | Exception) -> None:
        reply = self._replies.get(number)
        if reply is None or reply.done():
            return
        if isinstance(attempt, Attempt):
            reply.set_result(attempt)
        else:
            reply.set_exception(attempt)

    def _lost(self, actor: Actor, why: str) -> None:
        """The actor's requests may have been sent: no more is known. Its process is ended if it still works."""
        if actor not in self._actors:
            return
        self._end(actor)
        many = len(actor.in_flight)
        line = f"warning: {actor} was lost ({why}); requests in flight there, possibly billed: {many}"
        self._report("actor lost", line, actor=str(actor), why=why, in_flight=many)
        for number in actor.in_flight:
            error = APIConnectionError(f"{actor} was lost: {why}", kind=Fault.SENDER_LOST, sent=True)
            self._answer(number, Attempt(time.time(), 0.0, None, {}, b"", error))
        actor.in_flight.clear()
        self._deal_soon()

    def _fail_unsent(self, why: str) -> None:
        """Requests that no actor has taken were certainly not sent."""
        while self._unsent:
            queued_at, (number, *_) = self._unsent.popleft()
            self._answer(number, _not_sent(queued_at, why))


def _not_sent(queued_at: float, why: str) -> Attempt:
    error = APIConnectionError(why, kind=Fault.CONNECT, sent=False)
    return Attempt(queued_at, max(0.0, time.time() - queued_at), None, {}, b"", error)


def _pieces(batch: list[Parcel]) -> Iterator[list[Parcel]]:
    """The batch in lists that are small enough to be sent with the call; a large body gets its own list."""
    piece: list[Parcel] = []
    size = 0
    for parcel in batch:
        if piece and size + len(parcel[2]) > PIECE_BYTES:
            yield piece
            piece, size = [], 0
        piece.append(parcel)
        size += len(parcel[2]) + 100  # its number, its endpoint's place and our id
    yield piece
