"""Which row is sent next: due retries before new rows, oldest first, so that chunks close in order.

A row that failed lets a new row go first as long as no other row was answered since: the new one shows whether the row
or the endpoint is at fault. After several new rows have failed one after another, the backlog **mixes**: it hands out,
in turn, a retry, a new row from further ahead, and the next new row. A retry succeeds if every row fails at first, a
row from further ahead if only the next thousand are bad, none if the endpoint is down.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Iterator
from enum import Enum

import msgspec

from batchrun.attempt_caps import NEW, History
from batchrun.limits.waiters import Waiters
from batchrun.records import OK, Attempt, Correction, Request, Row, RowError, SetAside, Usage, Verdict
from batchrun.store.open_chunk import OpenChunk

FAILED_FIRST = 3
"""After so many new rows have failed one after another at their first attempt, the backlog mixes."""

MOST_DOUBTED = 8
"""While the backlog mixes and one kind of row is answered, so many rows of the other kinds may be in flight or have
failed since the last answer: enough to notice a change, and few requests if an outage begins."""

SOON_S = 5.0
"""If retries are the kind that is answered, a retry that is due within this time is worth waiting for."""

FIRST_REACH, MOST_REACH = 1_000, 16_000
"""How many rows ahead the backlog looks: four times as far after each row ahead that fails, bounded by memory and
disk."""

PLACES = (1.0, 0.5, 0.75, 0.25, 0.875, 0.625, 0.375, 0.125)
"""Where in that reach a row is taken: the last one first, since bad rows are often neighbours. The place stays the same
while its rows are answered."""

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


class Kind(Enum):
    """Where the backlog took a row from while it mixes."""

    RETRY = 0
    AHEAD = 1
    NEXT = 2


class Backlog:
    """Hands out the pending rows. One per event loop; any number of workers may wait in `next`.

    A row handed out is busy until `retry`, `put_back`, `hold` or `done` is called for it.
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
        self._has_room = has_room
        self._fresh: deque[tuple[Row, OpenChunk]] = deque()
        self._batches: Iterator[tuple[list[Row], OpenChunk]] = iter(())
        self._opening: asyncio.Task[OpenChunk | None] | None = None
        self._retries: list[tuple[float, int, Pending]] = []
        self._returned: list[tuple[int, Pending]] = []
        self._failed_first = 0  # new rows, taken in order, that failed one after another
        self._mixed: dict[int, Kind] = {}  # busy rows that were taken while the backlog mixed
        self._turn = 0
        self._answered: Kind | None = None  # the kind that was answered last, until it fails
        self._doubted = 0  # rows of the other kinds that are busy, or have failed since the last answer
        self._last_failed = -1  # the last row, of those taken in order, whose first attempt failed
        self._place = 0
        self._reach = FIRST_REACH
        self._held: list[Pending] = []
        self._busy = 0
        self._exhausted = False
        self._closed = False
        self.left_to_wait = 0  # rows left when all others had ended: each has a longer wait than allowed
        self._waiters = Waiters()

    @property
    def alone(self) -> bool:
        """True if one row is busy and no other is left, so that no other row can confirm its failure."""
        return self._exhausted and self._busy == 1 == self.left

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
    def exhausted(self) -> bool:
        """True once every row of the input was read."""
        return self._exhausted

    @property
    def drained(self) -> bool:
        """True if every row left is busy, waits for a retry or is held."""
        return self._exhausted and not self.untried

    @property
    def has_room(self) -> bool:
        """False while sending waits for a reader of the settled rows."""
        return self._has_room()

    def next_at_once(self) -> Pending | None:
        """The next row to send, if it is known without a wait and the backlog does not mix; else ask `next`."""
        if self._closed or self._failed_first >= FAILED_FIRST or not self._has_room():
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
            if not self._has_room():
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
        """The row will be sent again, not before `due_s` on the clock."""
        self._busy -= 1
        heapq.heappush(self._retries, (due_s, pending.request.row, pending))
        self._waiters.wake()

    def put_back(self, pending: Pending) -> None:
        """The row was not sent; it will be handed out again."""
        self._busy -= 1
        kind = self._mixed.pop(pending.request.row, None)
        if kind is not None and kind is not self._answered:
            self._doubted = max(0, self._doubted - 1)
        if pending.successes is None:
            heapq.heappush(self._returned, (pending.request.row, pending))
        else:
            heapq.heappush(self._retries, (self._clock(), pending.request.row, pending))
        self._waiters.wake()

    def is_doubted(self, row: int) -> bool:
        """True for a busy row of a kind that fails while another kind is answered: its failure is no evidence about the
        endpoint.
        """
        kind, answered = self._mixed.get(row), self._answered
        if kind is None or (self.drained and answered is not Kind.RETRY):  # no row of that kind is left
            return False
        return answered not in (None, kind)

    def ended(self, pending: Pending, verdict: Verdict) -> None:
        """An attempt of the row has ended with this verdict."""
        row, is_new = pending.request.row, pending.successes is None
        if verdict is OK and not self._mixed:  # nearly all attempts
            self._doubted = 0
            if is_new and row > self._last_failed:
                self._failed_first = self._place = 0
                self._reach = FIRST_REACH
            return
        kind = self._mixed.pop(row, None)
        if verdict is OK or verdict is Verdict.ROW:
            if kind is not None:
                self._answered = kind
            busy: list[Kind | None] = [*self._mixed.values()]
            self._doubted = len(busy) - busy.count(self._answered) if busy else 0
            if is_new and row > self._last_failed and (kind is None or kind is not Kind.AHEAD):
                self._failed_first = self._place = 0
                self._reach = FIRST_REACH
        elif verdict in (Verdict.FREE, Verdict.MAYBE, Verdict.SLOW):
            if kind is self._answered:
                self._answered, self._doubted = None, 0
            if kind is Kind.AHEAD:
                self._place += 1
                self._reach = min(MOST_REACH, 4 * self._reach)
            elif is_new:
                self._failed_first += 1
                self._last_failed = max(self._last_failed, row)
        self._waiters.wake()  # the kind of this row may be sent now, or no longer

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

    @property
    def _is_mixing(self) -> bool:
        return self._failed_first >= FAILED_FIRST

    def _pop(self, *, probes: bool) -> Pending | None:
        if self._failed_first >= FAILED_FIRST or probes:
            pending = self._pop_mixed()
        elif not self._retries:
            pending = self._next_new()
        else:
            due = self._is_due and not (self._may_be_new and self._is_unconfirmed(self._retries[0][2]))
            pending = self._due() if due else self._next_new()
        if pending is None and self._held and self.drained and not self._busy and self._all_wait_long:
            return self._held.pop()
        return pending

    def _pop_mixed(self) -> Pending | None:
        """A row of the kind that is answered, and a few of the others between two answers; each kind in turn if none is
        answered. None if it is better to wait for the kind that is answered.
        """
        if self._answered is None:
            return self._pop_in_turn()
        if self._doubted < MOST_DOUBTED and (pending := self._pop_in_turn(skip=self._answered)) is not None:
            self._doubted += 1
            return pending
        if (pending := self._pop_kind(self._answered)) is not None:
            return pending
        comes_soon = self._answered is Kind.RETRY and self._retries and self._retries[0][0] <= self._clock() + SOON_S
        return None if self._busy or comes_soon else self._pop_in_turn()

    def _pop_in_turn(self, skip: Kind | None = None) -> Pending | None:
        for _ in Kind:
            kind = Kind(self._turn % len(Kind))
            self._turn += 1
            if kind is not skip and (pending := self._pop_kind(kind)) is not None:
                return pending
        return None

    def _pop_kind(self, kind: Kind) -> Pending | None:
        pop = {Kind.RETRY: self._least_tried, Kind.AHEAD: self._ahead, Kind.NEXT: self._next_new}[kind]
        if (pending := pop()) is not None:
            self._mixed[pending.request.row] = kind
        return pending

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

    def _due(self) -> Pending | None:
        return heapq.heappop(self._retries)[2] if self._is_due else None

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
        index = int(PLACES[self._place % len(PLACES)] * (len(self._fresh) - 1))
        row, chunk = self._fresh[index]
        del self._fresh[index]
        return self._prepare(row, chunk)

    def _is_unconfirmed(self, pending: Pending) -> bool:
        """Whether no other row was answered since the row was last sent."""
        return pending.successes is not None and self._successes() <= pending.successes

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
                self._exhausted = True
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
