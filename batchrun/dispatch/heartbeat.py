"""What happens on a timer while rows are asked: never per row, so that a million rows cost what ten do.

Twice a second: progress, and a look at the deadline, at control.json and at the disk. Once a second requests that take
too long are ended; every five seconds, and at first every second, summary.json is written.
"""

import asyncio
import math
from decimal import Decimal

import msgspec

from batchrun.dispatch import live_limits
from batchrun.dispatch.hooks import Hooks
from batchrun.dispatch.live_limits import Control, Wishes
from batchrun.dispatch.run_status import RunStatus
from batchrun.dispatch.worker import Workers
from batchrun.errors import DiskError, ExitCode
from batchrun.job.job import Limits
from batchrun.limits import capacity
from batchrun.limits.admission import Stop
from batchrun.limits.deadline import Deadline
from batchrun.limits.forecast import Concern
from batchrun.limits.rates import Rates
from batchrun.records import Summary, Tuned
from batchrun.report.limit_lines import limits_in_words
from batchrun.store.rundir import RunDirectory
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
    """Beats until it is cancelled. `deadline_came`: it has ended admission for the deadline."""

    def __init__(
        self,
        directory: RunDirectory,
        status: RunStatus,
        workers: Workers,
        transport: Transport,
        deadline: Deadline | None,
        hooks: Hooks,
    ) -> None:
        self._directory = directory
        self._status = status
        self._workers = workers
        self._gate = workers.gate
        self._transport = transport
        self._deadline = deadline
        self._concern = None if deadline is None else Concern(deadline.at_s - deadline.started_s)
        self._wishes = Wishes(directory)
        self._clock = asyncio.get_running_loop().time
        self._hooks = hooks
        self.deadline_came = False

    async def beat(self) -> None:
        """Never returns."""
        beats = 0
        while True:
            slept_at_s = self._clock()
            await asyncio.sleep(BEAT_S)
            beats += 1
            self.keep_deadline()
            answered = self._take_wish()
            self._status.observe(self._clock())
            summary = self._status.summary()
            self._hooks.progress(summary)
            self.report_changes()
            self._warn(summary)
            if beats % SWEEP_EVERY == 0 and self._clock() - slept_at_s < ASLEEP_S:
                self._transport.expire()
            if not self._directory.checkpoint.exists():  # SQLite would go on in a file without a name
                self._workers.fail(DiskError(f"{self._directory.checkpoint}: is gone; nothing more is asked"))
            if answered or beats in FIRST_SUMMARIES or beats % SUMMARY_EVERY == 0:
                await asyncio.to_thread(self._status.write, summary)
            if self._workers.learned.is_due(self._gate, self._clock()):
                await asyncio.to_thread(self._workers.learned.keep, self._gate)

    def report_changes(self) -> None:
        """What has changed since the last beat is on record."""
        for line in self._status.log_changes():
            self._hooks.note(line)

    def _take_wish(self) -> bool:
        """A new control.json is obeyed, or refused with one line; True where somebody waits for the answer."""
        content = self._wishes.newest()
        if content is None:
            return False
        try:
            wish = live_limits.decode(content)
        except ValueError as error:
            self._refuse(str(error))
            return False
        try:
            self._obey(wish)
        except ValueError as error:
            self._refuse(str(error))
            self._status.tuned(Tuned(wish.id, str(error)))
            return True
        self._status.log.write("tuned", **msgspec.to_builtins(wish, builtin_types=(Decimal,)))
        self._status.tuned(Tuned(wish.id, None))
        self._hooks.note(f"limits now: {limits_in_words(self._gate.in_force)}")
        return True

    def _obey(self, wish: Control) -> None:
        """The limits hold from now on, all of them.

        Raises:
            ValueError: one can't; none is changed.
        """
        slots = self._gate.slots
        if wish.max_in_flight is not None and wish.max_in_flight > slots:
            raise ValueError(f"max_in_flight can be at most {slots}, what this process started with")
        self._gate.purse.change(cost_usd=wish.max_cost_usd, tokens=wish.max_tokens, requests=wish.max_requests)
        day = wish.requests_per_day
        daily = None if day is None else self._workers.learned.count_day(day, self._gate.in_flight, self._clock())
        self._gate.tune(Rates(**wish.rates, daily=daily), max_in_flight=wish.max_in_flight)

    def _refuse(self, why: str) -> None:
        self._status.log.write("control ignored", why=why)
        self._hooks.note(f"warning: {self._directory.control} is ignored: {why}")

    def keep_deadline(self) -> None:
        """Admission has ended if the answer to a request sent before the next beat would come after the deadline."""
        deadline, now_s = self._deadline, self._clock()
        if deadline is None or self._gate.stop is not None:
            return
        if now_s + BEAT_S > deadline.last_send_s(self._workers.slow_s):
            self._status.log.write("deadline", deadline=deadline.at, in_flight=self._gate.in_flight)
            why = f"the deadline ({deadline}) has come; run again, with a later one or none"
            self.deadline_came = True
            self._workers.close(Stop(ExitCode.STOPPED, why))
            asyncio.get_running_loop().call_at(max(deadline.at_s, now_s) + self._hooks.grace_s, self._workers.cancel)

    def warn_of_limits(self, limits: Limits) -> None:
        """Who asks for more by the deadline than the job's own limits allow has heard so, before the first request.

        Limits on tokens speak once there are answers to say how many a row takes.
        """
        if self._deadline is None or self._concern is None:
            return
        summary, left_s = self._status.summary(), self._deadline.at_s - self._clock()
        daily = self._workers.learned.daily
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
        forecast, share = self._status.forecast, summary.by_deadline
        if self._deadline is None or self._concern is None or forecast is None or share is None:
            return
        if self._gate.stop is None and self._concern.rises(share, forecast.seen_s):
            self._tell_behind("at this pace", int(share * 100), str(forecast.limit), self._deadline)

    def _tell_behind(self, pace: str, percent: int, limit: str, deadline: Deadline) -> None:
        self._status.log.write("behind", share=percent / 100, deadline=deadline.at, limited_by=limit)
        self._hooks.note(f"warning: {pace} {percent} % of the rows will be done by {deadline}; limited by {limit}")
