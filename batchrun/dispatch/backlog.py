"""What is still to be sent: due retries before new rows, oldest first, so that chunks close in order.

But a row that failed, and after which no other was answered, lets a new one go first: that one shows whether the row or
the endpoint is at fault.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Iterator
from decimal import Decimal

import msgspec

from batchrun.output.chunks import OpenChunk
from batchrun.policy import NEW, History
from batchrun.records import Attempt, Correction, Request, Row, RowError, SetAside, Usage

MAX_WAITING = 4096
"""Rows that wait for a retry before new ones wait too: more would only grow memory while the endpoint is unwell."""


class Invalid(msgspec.Struct, frozen=True):
    """An answer that does not fit, what is wrong with it, and what it used and cost."""

    attempt: Attempt
    error: RowError
    usage: Usage | None
    cost_usd: Decimal | None


class Pending(msgspec.Struct, frozen=True):
    """A row still to be asked, with what it has been through. `cost_usd` None: an earlier attempt has no price.

    `successes` is the gate's count of good answers when the row was last sent, None before that. `refused`: an
    earlier start met a 403 that nobody could corroborate. `corrections` are in the request already; `invalid` is the
    answer that the last of them is about: it stands if no better one comes. `set_aside` are all answers so far.
    """

    request: Request
    chunk: OpenChunk
    history: History = NEW
    cost_usd: Decimal | None = Decimal(0)
    successes: int | None = None
    refused: bool = False
    variant: int = 0
    corrections: tuple[Correction, ...] = ()
    invalid: Invalid | None = None
    set_aside: tuple[SetAside, ...] = ()


class Backlog:
    """Hands out the pending rows. One per event loop; any number of workers may wait in `next`.

    A row handed out is `busy` until it comes back by `retry` or `hold`, or is `done`.
    """

    def __init__(
        self,
        open_next: Callable[[], OpenChunk | None],
        prepare: Callable[[Row, OpenChunk], Pending],
        clock: Callable[[], float],
        room: Callable[[], bool] = lambda: True,
        successes: Callable[[], int] = lambda: 0,
    ) -> None:
        """`open_next` blocks and runs in a thread; `clock` is the event loop's. While there is no `room` for more
        completions no row is handed out; who makes room calls `wake`. `successes` is the gate's count of good answers.
        """
        self._successes = successes
        self._open_next = open_next
        self._prepare = prepare
        self._clock = clock
        self._room = room
        self._fresh: deque[tuple[Row, OpenChunk]] = deque()
        self._batches: Iterator[tuple[list[Row], OpenChunk]] = iter(())
        self._opening: asyncio.Task[OpenChunk | None] | None = None
        self._retries: list[tuple[float, int, Pending]] = []
        self._held: list[Pending] = []
        self._busy = 0
        self._exhausted = False
        self._closed = False
        self._waiting: set[asyncio.Future[None]] = set()

    @property
    def alone(self) -> bool:
        """True while the one row that is out is the last there is: nobody else can bear witness for or against it."""
        waiting = self._fresh or self._retries or self._held
        return self._exhausted and self._busy == 1 and not waiting

    @property
    def drained(self) -> bool:
        """True when no row is left but those that are out, and those that wait for a retry or are held."""
        return self._exhausted and not self._fresh

    @property
    def has_room(self) -> bool:
        """False while rows wait for somebody to read what is settled."""
        return self._room()

    async def next(self) -> Pending | None:
        """The next row to ask; waits while there may be one. None when every row is settled, or after `close`."""
        while not self._closed:
            if not self._room():
                await self._wait(timed=False)
                continue
            if (pending := self._pop()) is not None:
                self._busy += 1
                return pending
            if not self._exhausted and len(self._retries) < MAX_WAITING:
                await self._refill()
            elif not self._busy and not self._retries:
                self.close()
            else:
                await self._wait()
        return None

    def retry(self, pending: Pending, due_s: float) -> None:
        """The row is to be asked again, not before `due_s` on the clock."""
        self._busy -= 1
        heapq.heappush(self._retries, (due_s, pending.request.row, pending))
        self._wake_all()

    def hold(self, pending: Pending) -> None:
        """The row is to be asked again only when there is no other."""
        self._busy -= 1
        self._held.append(pending)
        self._wake_all()

    def release(self, row: int) -> None:
        """A held row is being settled after all."""
        self._held = [pending for pending in self._held if pending.request.row != row]
        self._busy += 1

    def done(self) -> None:
        """A row that was out is settled."""
        self._busy -= 1
        if not self._busy or self._closed:
            self._wake_all()

    def close(self) -> None:
        """Nothing more is handed out."""
        self._closed = True
        self._wake_all()

    def wake(self) -> None:
        """Who waits looks again: there may be room."""
        self._wake_all()

    async def stop(self) -> None:
        """No thread of ours is at work any more."""
        self.close()
        if self._opening is not None:
            await asyncio.wait([self._opening])
            self._opening.exception()  # told to whoever waited for it; if nobody did, nobody misses the chunk

    def _pop(self) -> Pending | None:
        room_for_new = len(self._retries) < MAX_WAITING
        if self._retries and self._retries[0][0] <= self._clock():
            new_one_first = room_for_new and not self.drained and self._without_witness(self._retries[0][2])
            if not new_one_first:
                return heapq.heappop(self._retries)[2]
        if self._fresh and room_for_new:
            return self._prepare(*self._fresh.popleft())
        if self._held and self._exhausted and not (self._fresh or self._retries or self._busy):
            return self._held.pop()
        return None

    def _without_witness(self, pending: Pending) -> bool:
        """Whether no other row was answered since the row was last sent."""
        return pending.successes is not None and self._successes() <= pending.successes

    async def _refill(self) -> None:
        """More fresh rows, if there are: the next batch of the open chunk, or the next chunk's first.

        The chunk after the one at hand is opened ahead of need. Many workers may wait for the same opening.
        """
        batch = next(self._batches, None)
        if batch is None:
            opening = self._begin_opening()
            opened = await asyncio.shield(opening)
            if self._opening is not opening or self._closed:
                return  # another worker was first, or nobody needs the chunk now
            self._opening = None
            if opened is None:
                self._exhausted = True
                self._wake_all()
                return
            self._batches = ((rows, opened) for rows in opened.rows())
            self._begin_opening()
            return
        rows, chunk = batch
        self._fresh.extend((row, chunk) for row in rows)
        self._wake_all()

    def _begin_opening(self) -> "asyncio.Task[OpenChunk | None]":
        if self._opening is None:
            self._opening = asyncio.create_task(asyncio.to_thread(self._open_next))
        return self._opening

    async def _wait(self, *, timed: bool = True) -> None:
        """Returns when something has changed, or the next retry is due. (asyncio.wait_for would take a task each.)"""
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        self._waiting.add(waiter)
        timer = None
        if timed and self._retries:
            timer = loop.call_later(max(0.0, self._retries[0][0] - self._clock()), _wake, waiter)
        try:
            await waiter
        finally:
            self._waiting.discard(waiter)
            if timer is not None:
                timer.cancel()

    def _wake_all(self) -> None:
        for waiter in self._waiting:
            _wake(waiter)


def _wake(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
