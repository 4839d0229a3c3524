"""A budget of days and months in the event loop: what this start may spend beside other runs.

A request must fit into the lease that this process holds. If it does not, a thread draws more from the budget file and
then wakes the gate.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from datetime import datetime, timedelta
from decimal import ROUND_FLOOR, Decimal
from pathlib import Path
from zoneinfo import ZoneInfo

from batchrun.errors import BatchrunError
from batchrun.job.job import Job
from batchrun.money import in_words, to_pico, to_usd
from batchrun.run_summary import BudgetUse
from batchrun.store.budget_file import BudgetFile, Caps, Drawn, Use
from batchrun.store.budget_lease import Lease, Period, Spending

POLL_S = 0.25
"""Time until a refused draw is repeated: other processes may give money back."""

IDLE_S = 5.0
"""A lease unused for this long is given back: the run may be waiting for an outage to end."""


class SharedBudget:
    """This start's share of one budget. `open` it in a thread, `listen`, and `close` it. One per event loop."""

    def __init__(self, file: BudgetFile, name: str, zone: ZoneInfo, now: Callable[[], datetime] | None = None) -> None:
        self._file = file
        self._name = name
        self._now = now or (lambda: datetime.now(zone))
        self._now_s = time.time if now is None else lambda: now().timestamp()
        self._lease: Lease | None = None
        self._earlier: list[Lease] = []  # of periods that are over, until their last request has ended
        self._ends_s = 0.0  # Unix time at which the lease's day is over
        self._uses: tuple[Use, ...] = ()
        self._drawn_at = Spending()  # what this process had spent of its lease when `_uses` were read
        self._task: asyncio.Task[None] | None = None
        self._next_s = 0.0
        self._taken_s = 0.0
        self._used_up_for: int | None = None
        self._wake: Callable[[], None] = lambda: None
        self._fail: Callable[[BaseException], None] = lambda error: None

    @classmethod
    def open(cls, job: Job, directory: Path) -> "SharedBudget | None":
        """The job's budget; None if it has no cap for a day or month.

        Raises:
            CheckpointError, DiskError: it can't be opened.
        """
        budget = job.budget
        if budget.per_day_usd is None and budget.per_month_usd is None:
            return None
        name, caps = name_of(job), Caps(_cap(budget.per_day_usd), _cap(budget.per_month_usd))
        return cls(BudgetFile(Path(budget.state), name, caps, directory), name, ZoneInfo(budget.time_zone))

    def listen(self, wake: Callable[[], None], fail: Callable[[BaseException], None]) -> None:
        """From now on `wake` is called after each draw, and `fail` if the file can't be used any more."""
        self._wake, self._fail = wake, fail

    # ── for the gate ──────────────────────────────────────────────────────────────────────────────────────────────────

    def fits(self, bound_pico_usd: int) -> bool:
        """Whether the lease covers the amount now. If not, draws more and wakes the gate afterwards."""
        lease = self._lease
        if lease is not None and lease.covers(bound_pico_usd) and self._now_s() < self._ends_s:
            return True
        loop = asyncio.get_running_loop()
        if self._task is not None:
            return False
        if loop.time() < self._next_s:
            loop.call_at(self._next_s, self._wake)
        else:
            self._task = loop.create_task(self._work(self._draw(bound_pico_usd)))
        return False

    def reserve(self, bound_pico_usd: int) -> Lease:
        """Reserves the amount in the lease, which is returned: settle the reservation there."""
        assert self._lease is not None, "reserve() without fits()"
        self._lease.reserve(bound_pico_usd)
        self._used_up_for = None
        self._taken_s = asyncio.get_running_loop().time()
        return self._lease

    def is_used_up(self, bound_pico_usd: int) -> bool:
        """Whether the amount won't fit even if other processes give back all that they hold."""
        return self._used_up_for is not None and bound_pico_usd >= self._used_up_for

    def refusal(self, bound_pico_usd: int) -> str:
        """Which cap is reached, how much of it is used, and when it opens again."""
        short = [use for use in self._uses if use.left < bound_pico_usd]
        return "; ".join(self._in_words(use, bound_pico_usd) for use in short or self._uses)

    # ── for the heartbeat and the summary ─────────────────────────────────────────────────────────────────────────────

    def tidy(self) -> None:
        """Ends leases of past days, and gives back an unused one."""
        loop = asyncio.get_running_loop()
        if self._task is None:
            lease = self._lease
            is_unused = lease is not None and lease.is_idle and lease.left_pico_usd > 0
            if any(each.is_idle for each in self._earlier) or (is_unused and loop.time() - self._taken_s > IDLE_S):
                self._task = loop.create_task(self._work(self._end_idle()))

    def uses(self) -> list[BudgetUse]:
        """How much of each cap is used; other processes' spending is as of the last draw."""
        found = []
        for use in self._uses:
            spent, doubt = use.spent, use.in_doubt
            if (lease := self._lease) is not None and use.period in (lease.period.day, lease.period.month):
                own, own_doubt = lease.since(self._drawn_at)
                spent, doubt = spent + own, doubt + own_doubt
            setting = "per_day_usd" if _is_day(use.period) else "per_month_usd"
            opens = opens_at(use.period, self._now())
            amounts = to_usd(use.cap), to_usd(spent), to_usd(doubt)
            found.append(BudgetUse(self._name, setting, use.period, *amounts, opens))
        return found

    async def close(self) -> None:
        """Books what was spent, and what is in flight as in doubt. Never raises: a lease that can't be ended counts as
        a dead process's lease, which the next process books.
        """
        if self._task is not None:
            await asyncio.wait([self._task])
        await asyncio.to_thread(self._end_all)

    def _end_all(self) -> None:
        try:
            for lease in (*self._earlier, *([self._lease] if self._lease is not None else [])):
                self._file.end(lease)
        except BatchrunError:
            pass
        finally:
            self._file.close()

    async def _work(self, work: Coroutine[object, object, None]) -> None:
        try:
            await work
        except BatchrunError as error:
            self._fail(error)
        finally:
            self._task = None
            self._wake()

    async def _draw(self, bound_pico_usd: int) -> None:
        lease = self._lease
        if lease is None or self._now_s() >= self._ends_s:
            lease = await self._begin_period()
        before = lease.spending
        drawn: Drawn = await asyncio.to_thread(self._file.draw, lease, bound_pico_usd - lease.left_pico_usd)
        lease.granted += drawn.granted
        self._uses, self._drawn_at = drawn.uses, lease.booked
        if drawn.granted:
            self._used_up_for = None
            return
        self._next_s = asyncio.get_running_loop().time() + POLL_S
        if lease.spending is not before:
            return  # a request ended meanwhile, so the lease may cover the next one, or the next draw need less
        if lease.is_idle:  # two runs that each hold too little for a request would wait for each other
            self._used_up_for = None if drawn.can_come else bound_pico_usd
            await self._give_back(lease)

    async def _begin_period(self) -> Lease:
        """A new lease for the present day."""
        if self._lease is not None:
            self._earlier.append(self._lease)
            self._lease = None
        now = self._now()
        day = now.date().isoformat()
        lease = await asyncio.to_thread(self._file.lease, Period(day, day[:7]))
        self._lease, self._ends_s = lease, opens_at(day, now).timestamp()
        return lease

    async def _end_idle(self) -> None:
        for lease in [each for each in self._earlier if each.is_idle]:
            self._earlier.remove(lease)
            await asyncio.to_thread(self._file.end, lease)
        if self._lease is not None and self._lease.is_idle:
            await self._give_back(self._lease)

    async def _give_back(self, lease: Lease) -> None:
        lease.shrink()
        await asyncio.to_thread(self._file.give_back, lease)

    def _in_words(self, use: Use, bound_pico_usd: int) -> str:
        doubt = f", {in_words(use.in_doubt)} of it possibly billed" if use.in_doubt else ""
        setting = "per_day_usd" if _is_day(use.period) else "per_month_usd"
        return (
            f"{in_words(use.spent + use.in_doubt)} of {in_words(use.cap)} spent in {use.period} by {self._name}"
            f"{doubt}, and the next request may cost {in_words(bound_pico_usd)}; it opens again at "
            f"{opens_at(use.period, self._now()):%Y-%m-%d %H:%M %Z}, or raise budget.{setting}"
        )


def _cap(usd: Decimal | None) -> int | None:
    return None if usd is None else to_pico(usd, ROUND_FLOOR)


def name_of(job: Job) -> str:
    """The budget's name. A rehearsal with the built-in simulator costs nothing, so it has a separate budget."""
    name = job.budget.name or job.name
    return f"{name} (simulator)" if job.simulated else name


def opens_at(period: str, now: datetime) -> datetime:
    """When the next day or month begins, in the time zone of `now`."""
    first = datetime.fromisoformat(period if _is_day(period) else f"{period}-01").replace(tzinfo=now.tzinfo)
    if _is_day(period):
        return first + timedelta(days=1)  # the next date at midnight, however long the day is
    return first.replace(year=first.year + first.month // 12, month=first.month % 12 + 1)


def _is_day(period: str) -> bool:
    return len(period) == len("2026-11-28")
