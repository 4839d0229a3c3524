"""What is still to be sent: due retries before new rows, oldest first, so that chunks close in order.

But a row that failed, and after which no other was answered, lets a new one go first: that one shows whether the row or
the endpoint is at fault. Where new rows fail one after another, rows are **mixed**: a retry, a new row from further on,
the next new row. Whatever is at fault, one of the three then shows it: a retry where each row fails at first, a row
from further on where the next thousand are bad, none where the endpoint is down.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Iterator
from decimal import Decimal
from enum import Enum

import msgspec

from batchrun.attempt_caps import NEW, History
from batchrun.limits.waiters import Waiters
from batchrun.records import Attempt, Correction, Request, Row, RowError, SetAside, Usage, Verdict
from batchrun.store.chunks import OpenChunk

FAILED_FIRST = 3
"""So many new rows, one after another, that fail at their first attempt: from then on rows are mixed."""

MOST_DOUBTED = 8
"""While rows are mixed and one kind is answered, so many of the others may be out, or have failed since the last
answer: enough to keep going, few enough that an outage that begins just then sees few requests."""

SOON_S = 5.0
"""A retry that is due so soon is waited for, where retries are what is answered."""

FIRST_REACH, MOST_REACH = 1_000, 16_000
"""How far on a row is looked for, in rows: four times as far with each one that fails, and no further than memory and
disk bear."""

PLACES = (1.0, 0.5, 0.75, 0.25, 0.875, 0.625, 0.375, 0.125)
"""Where in that reach: the last row first, since bad rows stand side by side. A place that was answered is kept."""

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
    earlier start met a 403 that nobody could corroborate, or a 429 with a long wait. `waits_long`: it was asked to wait
    longer than `retry.max_wait_s`, and others were answered meanwhile. `corrections` are in the request already;
    `invalid` is the answer that the last of them is about: it stands if no better one comes. `set_aside` are all the
    answers so far.
    """

    request: Request
    chunk: OpenChunk
    history: History = NEW
    cost_usd: Decimal | None = Decimal(0)
    successes: int | None = None
    refused: bool = False
    waits_long: bool = False
    variant: int = 0
    corrections: tuple[Correction, ...] = ()
    invalid: Invalid | None = None
    set_aside: tuple[SetAside, ...] = ()


class Kind(Enum):
    """Where a row was taken from while rows are mixed."""

    RETRY = 0
    FURTHER_ON = 1
    NEXT = 2


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
        self._returned: list[tuple[int, Pending]] = []
        self._failed_first = 0  # new rows in a row, of those taken in order, that failed
        self._out: dict[int, Kind] = {}  # rows that are out and were taken while rows were mixed
        self._turn = 0
        self._answered: Kind | None = None  # the kind that was answered last, until it fails
        self._doubted = 0  # rows of the other kinds that are out, or have failed since the last answer
        self._last_failed = -1  # the last row, of those taken in order, that failed at first
        self._place = 0
        self._reach = FIRST_REACH
        self._held: list[Pending] = []
        self._busy = 0
        self._exhausted = False
        self._closed = False
        self.left_to_wait = 0  # rows that were left when all others had ended: each waits for longer than allowed
        self._waiters = Waiters()

    @property
    def alone(self) -> bool:
        """True while the one row that is out is the last there is: nobody else can bear witness for or against it."""
        waiting = self.untried or self._retries or self._held
        return self._exhausted and self._busy == 1 and not waiting

    @property
    def untried(self) -> int:
        """New rows at hand, not handed out yet. Once the input is exhausted there are no others."""
        return len(self._fresh) + len(self._returned)

    @property
    def waiting(self) -> int:
        """Rows that wait for a retry."""
        return len(self._retries)

    @property
    def exhausted(self) -> bool:
        """True once every row of the input is at hand, or was."""
        return self._exhausted

    @property
    def drained(self) -> bool:
        """True when no row is left but those that are out, and those that wait for a retry or are held."""
        return self._exhausted and not self.untried

    @property
    def has_room(self) -> bool:
        """False while rows wait for somebody to read what is settled."""
        return self._room()

    async def next(self, *, probes: bool = False) -> Pending | None:
        """The next row to send; waits while there may be one. None when every row is settled, or after `close`.

        `probes`: it is to show whether the endpoint is well, so rows are mixed.
        """
        while not self._closed:
            if not self._room():
                await self._wait(timed=False)
                continue
            if (self._is_mixing or probes) and len(self._fresh) < self._reach and not self._exhausted:
                await self._refill()
                continue
            if (pending := self._pop(probes=probes)) is not None:
                self._busy += 1
                return pending
            if not self._exhausted and len(self._retries) < MAX_WAITING:
                await self._refill()
            elif not self._busy and self._all_wait_long:
                self.left_to_wait = len(self._retries)
                self.close()
            else:
                await self._wait()
        return None

    def retry(self, pending: Pending, due_s: float) -> None:
        """The row is to be asked again, not before `due_s` on the clock."""
        self._busy -= 1
        heapq.heappush(self._retries, (due_s, pending.request.row, pending))
        self._waiters.wake()

    def put_back(self, pending: Pending) -> None:
        """The row was not sent: it is handed out again as if it had not been."""
        self._busy -= 1
        kind = self._out.pop(pending.request.row, None)
        if kind is not None and kind is not self._answered:
            self._doubted = max(0, self._doubted - 1)
        if pending.successes is None:
            heapq.heappush(self._returned, (pending.request.row, pending))
        else:
            heapq.heappush(self._retries, (self._clock(), pending.request.row, pending))
        self._waiters.wake()

    def is_doubted(self, row: int) -> bool:
        """True for a row that is out of which no more is known than that others like it fail, while another kind of row
        is answered: its failure says nothing of the endpoint.
        """
        kind = self._out.get(row)
        return kind is not None and self._answered not in (None, kind)

    def ended(self, pending: Pending, verdict: Verdict) -> None:
        """An attempt of the row has ended so."""
        row = pending.request.row
        kind, is_new = self._out.pop(row, None), pending.successes is None
        if verdict in (Verdict.OK, Verdict.ROW):
            self._answered = self._answered if kind is None else kind
            self._doubted = sum(each is not self._answered for each in self._out.values())
            if is_new and kind is not Kind.FURTHER_ON and row > self._last_failed:
                self._failed_first = self._place = 0
                self._reach = FIRST_REACH
        elif verdict in (Verdict.FREE, Verdict.MAYBE, Verdict.SLOW):
            if kind is self._answered:
                self._answered, self._doubted = None, 0
            if kind is Kind.FURTHER_ON:
                self._place += 1
                self._reach = min(MOST_REACH, 4 * self._reach)
            elif is_new:
                self._failed_first += 1
                self._last_failed = max(self._last_failed, row)

    def hold(self, pending: Pending) -> None:
        """The row is to be asked again only when there is no other."""
        self._busy -= 1
        self._held.append(pending)
        self._waiters.wake()

    def release(self, row: int) -> None:
        """A held row is being settled after all."""
        self._held = [pending for pending in self._held if pending.request.row != row]
        self._busy += 1

    def done(self) -> None:
        """A row that was out is settled."""
        self._busy -= 1
        if not self._busy or self._closed:
            self._waiters.wake()

    def close(self) -> None:
        """Nothing more is handed out."""
        self._closed = True
        self._waiters.wake()

    def wake(self) -> None:
        """Who waits looks again: there may be room."""
        self._waiters.wake()

    async def stop(self) -> None:
        """No thread of ours is at work any more."""
        self.close()
        if self._opening is not None:
            await asyncio.wait([self._opening])
            self._opening.exception()  # told to whoever waited for it; if nobody did, nobody misses the chunk

    @property
    def _is_mixing(self) -> bool:
        return self._failed_first >= FAILED_FIRST

    def _pop(self, *, probes: bool) -> Pending | None:
        if self._is_mixing or probes:
            pending = self._pop_mixed()
        else:
            due = self._is_due and not (self._may_be_new and self._without_witness(self._retries[0][2]))
            pending = self._due() if due else self._next_new()
        if pending is None and self._held and self.drained and not self._busy and self._all_wait_long:
            return self._held.pop()
        return pending

    def _pop_mixed(self) -> Pending | None:
        """A row of the kind that is answered, but a few of the others between two answers; in turn where none is.

        None where the kind that is answered is worth waiting for.
        """
        if self._answered is None:
            return self._in_turn()
        if self._doubted < MOST_DOUBTED and (pending := self._in_turn(but=self._answered)) is not None:
            self._doubted += 1
            return pending
        if (pending := self._of(self._answered)) is not None:
            return pending
        comes_soon = self._answered is Kind.RETRY and self._retries and self._retries[0][0] <= self._clock() + SOON_S
        return None if self._busy or comes_soon else self._in_turn()

    def _in_turn(self, but: Kind | None = None) -> Pending | None:
        for _ in Kind:
            kind = Kind(self._turn % len(Kind))
            self._turn += 1
            if kind is not but and (pending := self._of(kind)) is not None:
                return pending
        return None

    def _of(self, kind: Kind) -> Pending | None:
        take = {Kind.RETRY: self._least_tried, Kind.FURTHER_ON: self._further_on, Kind.NEXT: self._next_new}[kind]
        if (pending := take()) is not None:
            self._out[pending.request.row] = kind
        return pending

    @property
    def _all_wait_long(self) -> bool:
        """True where no row waits for a retry, but such as were asked to wait for longer than allowed."""
        return all(pending.waits_long for _, _, pending in self._retries)

    @property
    def _is_due(self) -> bool:
        return bool(self._retries) and self._retries[0][0] <= self._clock()

    @property
    def _may_be_new(self) -> bool:
        return len(self._retries) < MAX_WAITING and not self.drained

    def _due(self) -> Pending | None:
        return heapq.heappop(self._retries)[2] if self._is_due else None

    def _least_tried(self) -> Pending | None:
        """The due retry that has failed least: each row has its turn before one has its next."""
        if not self._is_due:
            return None
        now_s = self._clock()
        least = min((each for each in self._retries if each[0] <= now_s), key=lambda each: each[2].history.attempts)
        self._retries.remove(least)
        heapq.heapify(self._retries)
        return least[2]

    def _next_new(self) -> Pending | None:
        """Rows that were handed out and put back come first: they are the oldest."""
        if not self._may_be_new:
            return None
        if self._returned and (not self._fresh or self._returned[0][0] < self._fresh[0][0].row):
            return heapq.heappop(self._returned)[1]
        return self._prepare(*self._fresh.popleft()) if self._fresh else None

    def _further_on(self) -> Pending | None:
        if not self._fresh or not self._may_be_new:
            return None
        index = int(PLACES[self._place % len(PLACES)] * (len(self._fresh) - 1))
        row, chunk = self._fresh[index]
        del self._fresh[index]
        return self._prepare(row, chunk)

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
                self._waiters.wake()
                return
            self._batches = ((rows, opened) for rows in opened.rows())
            self._begin_opening()
            return
        rows, chunk = batch
        self._fresh.extend((row, chunk) for row in rows)
        self._waiters.wake()

    def _begin_opening(self) -> "asyncio.Task[OpenChunk | None]":
        if self._opening is None:
            self._opening = asyncio.create_task(asyncio.to_thread(self._open_next))
        return self._opening

    async def _wait(self, *, timed: bool = True) -> None:
        """Returns when something has changed, or the next retry is due."""
        due = timed and bool(self._retries)
        await self._waiters.wait(self._retries[0][0] - self._clock() if due else None)
