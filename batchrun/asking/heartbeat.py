"""What happens on a timer while rows are asked: never per row, so that a million rows cost what ten do.

Twice a second: progress, and a look at the deadline, at control.json and at the disk. Once a second requests that take
too long are ended; every five seconds, and at first every second, summary.json is written.
"""

import asyncio
import math
from collections.abc import Callable
from decimal import Decimal

import msgspec

from batchrun.asking import control
from batchrun.asking.chronicle import Chronicle
from batchrun.asking.control import Control, Wishes
from batchrun.asking.memory import Memory
from batchrun.asking.pipeline import Pipeline
from batchrun.errors import DiskError, ExitCode
from batchrun.gate import capacity
from batchrun.gate.admission import Stop
from batchrun.gate.daily import DailyCount
from batchrun.gate.deadline import Deadline
from batchrun.gate.forecast import Concern
from batchrun.gate.gate import Gate
from batchrun.gate.purse import Purse
from batchrun.gate.rates import Rates
from batchrun.job.job import Limits
from batchrun.records import Summary, Tuned
from batchrun.report.summary import limits_in_words
from batchrun.rundir import RunDirectory
from batchrun.transport.transport import Transport

BEAT_S = 0.5
SWEEP_EVERY = 2  # beats: attempts' own deadlines are looked at once a second
SUMMARY_EVERY = 10
FIRST_SUMMARIES = frozenset({1, 2, 4, 6, 8})
"""Beats at which summary.json is written before the first ten are over: whoever looks at a run that has just started
should see it work."""

ASLEEP_S = 2 * BEAT_S
"""A beat that took so long was a stopped process (SIGSTOP, a paused machine). Answers that came meanwhile wait to be
read, so nothing is called late before the next sweep."""


class Heartbeat:
    """Beats until it is cancelled. `stop_by` ends admission, and what is in flight at the moment that it is given."""

    def __init__(
        self,
        directory: RunDirectory,
        chronicle: Chronicle,
        gate: Gate,
        pipeline: Pipeline,
        transport: Transport,
        deadline: Deadline | None,
        *,
        purse: Purse | None,
        slots: int,
        memory: Memory,
        clock: Callable[[], float],
        progress: Callable[[Summary], None],
        note: Callable[[str], None],
        each: Callable[[], None],
        fail: Callable[[BaseException], None],
        stop_by: Callable[[Stop, float], None],
    ) -> None:
        self._directory = directory
        self._chronicle = chronicle
        self._gate = gate
        self._pipeline = pipeline
        self._transport = transport
        self._deadline = deadline
        self._concern = None if deadline is None else Concern(deadline.at_s - deadline.started_s)
        self._purse = purse or Purse()
        self._slots = slots
        self._wishes = Wishes(directory)
        self._memory = memory
        self._clock = clock
        self._progress = progress
        self._note = note
        self._each = each
        self._fail = fail
        self._stop_by = stop_by

    async def beat(self) -> None:
        """Never returns."""
        beats = 0
        while True:
            slept_at_s = self._clock()
            await asyncio.sleep(BEAT_S)
            beats += 1
            self.keep_deadline()
            answered = self._take_wish()
            self._chronicle.observe(self._clock())
            summary = self._chronicle.summary()
            self._progress(summary)
            self._each()
            self._warn(summary)
            if beats % SWEEP_EVERY == 0 and self._clock() - slept_at_s < ASLEEP_S:
                self._transport.expire()
            if not self._directory.checkpoint.exists():  # SQLite would go on in a file without a name
                self._fail(DiskError(f"{self._directory.checkpoint}: is gone; nothing more is asked"))
            if answered or beats in FIRST_SUMMARIES or beats % SUMMARY_EVERY == 0:
                await asyncio.to_thread(self._chronicle.write, summary)
            if self._memory.is_due(self._gate, self._clock()):
                await asyncio.to_thread(self._memory.keep, self._gate)

    def _take_wish(self) -> bool:
        """A new control.json is obeyed, or refused with one line; True where somebody waits for the answer."""
        content = self._wishes.newest()
        if content is None:
            return False
        try:
            wish = control.decode(content)
        except ValueError as error:
            self._refuse(str(error))
            return False
        try:
            self._obey(wish)
        except ValueError as error:
            self._refuse(str(error))
            self._chronicle.tuned = Tuned(wish.id, str(error))
            return True
        self._chronicle.log.write("tuned", **msgspec.to_builtins(wish, builtin_types=(Decimal,)))
        self._chronicle.tuned = Tuned(wish.id, None)
        self._note(f"limits now: {limits_in_words(self._gate.in_force)}")
        return True

    def _obey(self, wish: Control) -> None:
        """The limits hold from now on, all of them.

        Raises:
            ValueError: one can't; none is changed.
        """
        if wish.max_in_flight is not None and wish.max_in_flight > self._slots:
            raise ValueError(f"max_in_flight can be at most {self._slots}, what this process started with")
        self._purse.change(cost_usd=wish.max_cost_usd, tokens=wish.max_tokens, requests=wish.max_requests)
        day = wish.requests_per_day
        daily = None if day is None else self._memory.count_day(day, self._gate.in_flight, self._clock())
        self._gate.tune(Rates(**wish.rates, daily=daily), max_in_flight=wish.max_in_flight)

    def _refuse(self, why: str) -> None:
        self._chronicle.log.write("control ignored", why=why)
        self._note(f"warning: {self._directory.control} is ignored: {why}")

    def keep_deadline(self) -> None:
        """Admission has ended if the answer to a request sent before the next beat would come after the deadline."""
        deadline, now_s = self._deadline, self._clock()
        if deadline is None or self._gate.stop is not None:
            return
        if now_s + BEAT_S > deadline.last_send_s(self._pipeline.slow_s):
            self._chronicle.log.write("deadline", deadline=deadline.at, in_flight=self._gate.in_flight)
            why = f"the deadline ({deadline}) has come; run again, with a later one or none"
            self._stop_by(Stop(ExitCode.STOPPED, why), max(deadline.at_s, now_s))

    def warn_of_limits(self, limits: Limits, daily: DailyCount | None) -> None:
        """Who asks for more by the deadline than the job's own limits allow has heard so, before the first request.

        Limits on tokens speak once there are answers to say how many a row takes.
        """
        if self._deadline is None or self._concern is None:
            return
        summary, left_s = self._chronicle.summary(), self._deadline.at_s - self._clock()
        today = None if daily is None else daily.most(self._deadline.at_s)
        most = capacity.most_rows(limits, left_s, capacity.size_of(summary.totals), today)
        if most is None:
            return
        share = min(1.0, (summary.rows - summary.pending + most.rows) / summary.rows)
        if self._concern.rises(share, float("inf")):
            bound = "about" if most.by_mean else "no more than"
            self._tell_behind(f"at {most.pace} {bound}", math.ceil(share * 100), str(most.limit), self._deadline)

    def _warn(self, summary: Summary) -> None:
        """Who should know that the deadline will not be met has been told: once, and again when it gets worse."""
        forecast, share = self._chronicle.forecast, summary.by_deadline
        if self._deadline is None or self._concern is None or forecast is None or share is None:
            return
        if self._gate.stop is None and self._concern.rises(share, forecast.seen_s):
            self._tell_behind("at this pace", int(share * 100), str(forecast.limit), self._deadline)

    def _tell_behind(self, pace: str, percent: int, limit: str, deadline: Deadline) -> None:
        self._chronicle.log.write("behind", share=percent / 100, deadline=deadline.at, limited_by=limit)
        self._note(f"warning: {pace} {percent} % of the rows will be done by {deadline}; limited by {limit}")
