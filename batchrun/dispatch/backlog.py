"""Which row is sent next: due retries before new rows, oldest first, so that chunks close in order.

A row that failed lets a new row go first as long as no other row was answered since: the new one shows whether the row
or the endpoint is at fault. After several new rows have failed one after another, `mixing` chooses.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Iterator

import msgspec

from batchrun.attempt_caps import NEW, History
from batchrun.dispatch.mixing import Kind, Mixing
from batchrun.limits.waiters import Waiters
from batchrun.records import Attempt, Correction, Request, Row, RowError, SetAside, Usage, Verdict
from batchrun.store.open_chunk import OpenChunk

SOON_S = 5.0
"""If retries are the kind that is answered, a retry that is due within this time is worth waiting for."""

MAX_WAITING = 4096
"""With so many rows waiting for a retry no new row is sent: more would only fill memory while the endpoint fails."""


class Invalid(msgspec.Struct, frozen=True):
    """An invalid answer with its error, usage, cost and service tier."""

    attempt: Attempt
    error: RowError
    usage: Usage | None
    cost_pico_usd: int | None
    service_tier: str | None = None


class Pending(msgspec.Struct, frozen=True):
    """A row to send, with its history. `cost_pico_usd` None: an earlier attempt has no price.

    `successes` is the gate's count of good answers when the row was last sent, None before the first attempt.
    `refused`: an earlier start got a 403 that no other row confirmed, or a 429 with a long wait. `waits_long`: a
    Retry-After was longer than `retry.max_wait_s`, and others were answered meanwhile. `corrections` are in the request
    already; `invalid` is the answer that the last of them is about, which is kept if no better one comes. `set_aside`
    are all the unwanted answers so far.
    """

    request: Request
    chunk: OpenChunk
    history: History = NEW
    cost_pico_usd: int | None = 0
    successes: int | None = None
    refused: bool = False
    waits_long: bool = False
    variant: int = 0
    corrections: tuple[Correction, ...] = ()
    invalid: Invalid | None = None
    set_aside: tuple[SetAside, ...] = ()


class Backlog:
    """Hands out the pending rows. One per event loop; any number of workers may wait in `next`.

    A row handed out is busy until `retry`, `put_back`, `hold` or `done` is called for it. `exhausted`: every row of the
    input was read.
    """

    def __init__(
        self,
        open_next: Callable[[], OpenChunk | None],
        prepare: Callable[[Row, OpenChunk], Pending],
        clock: Callable[[], float],
        has_room: Callable[[], bool] = lambda: True,
        successes: Callable[[], int] = lambda: 0,
    ) -> None:
        """`open_next` blocks and runs in a thread; `clock` is the event loop's. Rows are handed out only while
        `has_room` is true; call `wake` when it becomes true. `successes` is the gate's count of good answers.
        """
        self._successes = successes
        self._open_next = open_next
        self._prepare = prepare
        self._clock = clock
        self.has_room = has_room
        self._fresh: deque[tuple[Row, OpenChunk]] = deque()  # new rows, in order; their requests are not made yet
        self._batches: Iterator[tuple[list[Row], OpenChunk]] = iter(())  # the rest of the open chunk
        self._opening: asyncio.Task[OpenChunk | None] | None = None
        self._retries: list[tuple[float, int, Pending]] = []  # a heap: when it is due, the row's number, the row
        self._returned: list[tuple[int, Pending]] = []  # a heap of new rows that were handed out and not sent
        self._mixing = Mixing()
        self._held: list[Pending] = []  # sent again when no other row is left
        self._busy = 0  # rows that are handed out
        self.exhausted = False
        self._closed = False
        self.left_to_wait = 0  # rows left when all others had ended: each has a longer wait than allowed
        self._waiters = Waiters()

    @property
    def alone(self) -> bool:
        """True if one row is busy and no other is left, so that no other row can confirm its failure."""
        return self.exhausted and self._busy == 1 == self.left

    @property
    def left(self) -> int:
        """Rows that were read and are not settled. Once the input is exhausted there are no others."""
        return self._busy + self.untried + len(self._retries) + len(self._held)

    @property
    def untried(self) -> int:
        """New rows in memory that were not handed out yet. Once the input is exhausted there are no others."""
        return len(self._fresh) + len(self._returned)

    @property
    def waiting(self) -> int:
        """Rows that wait for a retry."""
        return len(self._retries)

    @property
    def drained(self) -> bool:
        """True if every row left is busy, waits for a retry or is held."""
        return self.exhausted and not self.untried

    def next_at_once(self) -> Pending | None:
        """The next row to send, if it is known without a wait and the backlog does not mix; else ask `next`."""
        if self._closed or self._mixing.is_on or not self.has_room():
            return None
        if self._fresh and not self._retries and not self._returned:
            self._busy += 1
            return self._prepare(*self._fresh.popleft())
        if (pending := self._pop(probes=False)) is not None:
            self._busy += 1
        return pending

    async def next(self, *, probes: bool = False) -> Pending | None:
        """The next row to send; waits while there may be one. None when every row is settled, or after `close`.

        `probes`: the row will show whether the endpoint is well, so the backlog mixes.
        """
        while not self._closed:
            if not self.has_room():
                await self._wait(timed=False)
                continue
            if (self._mixing.is_on or probes) and len(self._fresh) < self._mixing.reach and not self.exhausted:
                await self._refill()
                continue
            if (pending := self._pop(probes=probes)) is not None:
                self._busy += 1
                return pending
            if not self.exhausted and len(self._retries) < MAX_WAITING:
                await self._refill()
            elif not self._busy and self._all_wait_long:
                self.left_to_wait = len(self._retries)
                self.close()
            else:
                await self._wait()
        return None

    def retry(self, pending: Pending, due_s: float) -> None:
        """The row will be sent again, not before `due_s` on the clock."""
        self._busy -= 1
        heapq.heappush(self._retries, (due_s, pending.request.row, pending))
        self._waiters.wake()

    def put_back(self, pending: Pending) -> None:
        """The row was not sent; it will be handed out again."""
        self._busy -= 1
        self._mixing.put_back(pending.request.row)
        if pending.successes is None:
            heapq.heappush(self._returned, (pending.request.row, pending))
        else:
            heapq.heappush(self._retries, (self._clock(), pending.request.row, pending))
        self._waiters.wake()

    def is_doubted(self, row: int) -> bool:
        """True for a busy row of a kind that fails while another kind is answered: its failure is no evidence about the
        endpoint.
        """
        if self.drained and self._mixing.answered is not Kind.RETRY:
            return False  # no row of the kind that is answered is left
        return self._mixing.is_doubted(row)

    def ended(self, pending: Pending, verdict: Verdict) -> None:
        """An attempt of the row has ended with this verdict."""
        if self._mixing.ended(pending.request.row, verdict, is_new=pending.successes is None):
            self._waiters.wake()

    def hold(self, pending: Pending) -> None:
        """The row will be sent again only when no other is left."""
        self._busy -= 1
        self._held.append(pending)
        self._waiters.wake()

    def release(self, row: int) -> None:
        """A held row is busy again."""
        self._held = [pending for pending in self._held if pending.request.row != row]
        self._busy += 1

    def done(self, rows: int = 1) -> None:
        """So many busy rows are settled."""
        self._busy -= rows
        if not self._busy or self._closed:
            self._waiters.wake()

    def close(self) -> None:
        """No more rows are handed out."""
        self._closed = True
        self._waiters.wake()

    def wake(self) -> None:
        """Waiting workers check again whether there is room."""
        self._waiters.wake()

    async def stop(self) -> None:
        """Closes, and waits for the thread that opens a chunk."""
        self.close()
        if self._opening is not None:
            await asyncio.wait([self._opening])
            self._opening.exception()  # retrieved so asyncio logs nothing: a worker that awaited it has raised it

    def _pop(self, *, probes: bool) -> Pending | None:
        if self._mixing.is_on or probes:
            pending = self._pop_mixed()
        elif not self._retries:
            pending = self._next_new()
        else:
            # a new row first, as long as no other row was answered since the oldest retry was sent
            last = self._retries[0][2].successes
            unconfirmed = last is not None and self._successes() <= last
            is_first = self._is_due and not (unconfirmed and self._may_be_new)
            pending = heapq.heappop(self._retries)[2] if is_first else self._next_new()
        if pending is None and self._held and self.drained and not self._busy and self._all_wait_long:
            return self._held.pop()
        return pending

    def _pop_mixed(self) -> Pending | None:
        """A row of the first kind that has one; None if it is better to wait for the kind that is answered."""
        comes_soon = (
            self._mixing.answered is Kind.RETRY
            and bool(self._retries)
            and self._retries[0][0] <= self._clock() + SOON_S
        )
        pops = {Kind.RETRY: self._least_tried, Kind.AHEAD: self._ahead, Kind.NEXT: self._next_new}
        for kind in self._mixing.kinds(may_wait=self._busy > 0 or comes_soon):
            if (pending := pops[kind]()) is not None:
                self._mixing.taken(pending.request.row, kind)
                return pending
        return None

    @property
    def _all_wait_long(self) -> bool:
        """True if every row that waits for a retry has a longer wait than allowed."""
        return all(pending.waits_long for _, _, pending in self._retries)

    @property
    def _is_due(self) -> bool:
        return bool(self._retries) and self._retries[0][0] <= self._clock()

    @property
    def _may_be_new(self) -> bool:
        return len(self._retries) < MAX_WAITING and not self.drained

    def _least_tried(self) -> Pending | None:
        """The due retry with the fewest attempts, so that every row has its turn before one has its next."""
        if not self._is_due:
            return None
        now_s = self._clock()
        least = min((each for each in self._retries if each[0] <= now_s), key=lambda each: each[2].history.attempts)
        self._retries.remove(least)
        heapq.heapify(self._retries)
        return least[2]

    def _next_new(self) -> Pending | None:
        """Rows that were put back come first: they are the oldest."""
        if len(self._retries) >= MAX_WAITING:
            return None
        if self._returned and (not self._fresh or self._returned[0][0] < self._fresh[0][0].row):
            return heapq.heappop(self._returned)[1]
        return self._prepare(*self._fresh.popleft()) if self._fresh else None

    def _ahead(self) -> Pending | None:
        if not self._fresh or not self._may_be_new:
            return None
        index = self._mixing.index(len(self._fresh))
        row, chunk = self._fresh[index]
        del self._fresh[index]
        return self._prepare(row, chunk)

    async def _refill(self) -> None:
        """Reads more new rows: the next batch of the open chunk, or the next chunk; opens the one after it ahead."""
        batch = next(self._batches, None)
        if batch is None:
            opening = self._start_opening()
            opened = await asyncio.shield(opening)  # many workers may wait for the same chunk
            if self._opening is not opening or self._closed:
                return  # another worker was first, or the chunk is not needed any more
            self._opening = None
            if opened is None:
                self.exhausted = True
                self._waiters.wake()
                return
            self._batches = ((rows, opened) for rows in opened.rows())
            self._start_opening()
            return
        rows, chunk = batch
        self._fresh.extend((row, chunk) for row in rows)
        self._waiters.wake()

    def _start_opening(self) -> "asyncio.Task[OpenChunk | None]":
        if self._opening is None:
            self._opening = asyncio.create_task(asyncio.to_thread(self._open_next))
        return self._opening

    async def _wait(self, *, timed: bool = True) -> None:
        """Returns when something has changed, or the next retry is due. One that is due already waits for a change."""
        comes = timed and self._retries and not self._is_due
        await self._waiters.wait(self._retries[0][0] - self._clock() if comes else None)
