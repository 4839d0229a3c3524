"""The timer of a run: progress, deadlines, control.json, summary.json. Its cost does not grow with the rows."""

import asyncio
import math
from decimal import Decimal

import msgspec

from batchrun.dispatch import live_limits
from batchrun.dispatch.hooks import Hooks
from batchrun.dispatch.live_limits import ControlFile, LimitChange
from batchrun.dispatch.run_status import RunStatus
from batchrun.dispatch.worker import Workers
from batchrun.errors import DiskError, ExitCode
from batchrun.job.settings import Limits
from batchrun.limits import capacity
from batchrun.limits.admission import Stop
from batchrun.limits.deadline import Deadline
from batchrun.limits.forecast import Concern
from batchrun.limits.gates import Gates
from batchrun.limits.rates import Rates
from batchrun.records import Notice
from batchrun.report.limit_lines import limits_in_words
from batchrun.run_summary import Summary, Tuned
from batchrun.store.rundir import RunDirectory

BEAT_S = 0.5  # progress, deadlines and `batchrun tune` are at most so late
SWEEP_EVERY = 2  # beats: once a second, requests past their deadline are ended
SUMMARY_EVERY = 10  # beats
FIRST_SUMMARIES = frozenset({1, 2, 4, 6, 8})
"""Beats at which summary.json is written as well, so that a run that has just started shows progress."""

OWN_LIMITS = (*live_limits.RATES, "requests_per_day", "max_in_flight")
"""Limits that each of several endpoints has for itself."""

ASLEEP_S = 2 * BEAT_S
"""A beat that took so long means that the process was stopped (SIGSTOP, a paused machine). Answers that came meanwhile
wait to be read, so no request is ended as too late before the next sweep."""


class Heartbeat:
    """Beats until it is cancelled. `deadline_came`: admission has ended for the deadline."""

    def __init__(
        self,
        directory: RunDirectory,
        status: RunStatus,
        workers: Workers,
        deadline: Deadline | None,
        hooks: Hooks,
    ) -> None:
        self._directory = directory
        self._status = status
        self._workers = workers
        self._gate = workers.gate
        self._deadline = deadline
        self._concern = None if deadline is None else Concern(deadline.at_s - deadline.started_s)
        self._control_file = ControlFile(directory)
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
            self.check_deadline()
            self._workers.endpoints.refresh_keys()
            replied = self._read_control()
            self._status.observe(self._clock())
            summary = self._status.summary()
            self._hooks.progress(summary)
            self.report_changes()
            if (over_time := self._gate.budget.over_time) is not None:
                over_time.tidy()
            self._warn(summary)
            self._choose_tier()
            if beats % SWEEP_EVERY == 0 and self._clock() - slept_at_s < ASLEEP_S:
                self._workers.endpoints.expire()
            if not self._directory.checkpoint.exists():  # SQLite would keep writing to the deleted file
                self._workers.fail(DiskError(f"{self._directory.checkpoint}: was deleted; nothing more is sent"))
            if replied or beats in FIRST_SUMMARIES or beats % SUMMARY_EVERY == 0:
                await asyncio.to_thread(self._status.write, summary)
            if self._workers.learned.is_due(self._gate, self._clock()):
                await asyncio.to_thread(self._workers.learned.save, self._gate)

    def _choose_tier(self) -> None:
        """Rows go to `tiers.fallback` while the deadline would be missed otherwise."""
        deadline, forecast = self._deadline, self._status.forecast
        if deadline is None or forecast is None:
            return
        left_s = deadline.last_send_s(self._workers.slow_s) - self._clock()
        if (tier := self._workers.serving.choose_tier(forecast.done_in_s, left_s)) is not None:
            self._status.log.write("service tier", service_tier=tier, done_in_s=forecast.done_in_s, left_s=left_s)

    def report_changes(self) -> None:
        """Logs what has changed since the last beat, and prints the warnings."""
        for line in self._status.log_changes():
            self._hooks.note(line)

    def _read_control(self) -> bool:
        """A new control.json takes effect, or is refused with one line; True if `tune` waits for the reply."""
        content = self._control_file.read_new()
        if content is None:
            return False
        try:
            change = live_limits.decode(content)
        except ValueError as error:
            self._refuse(str(error))
            return False
        try:
            self._change_limits(change)
        except ValueError as error:
            self._refuse(str(error))
            self._status.tuned = Tuned(change.id, str(error))
            return True
        self._status.log.write("tuned", **msgspec.to_builtins(change, builtin_types=(Decimal,)))
        self._status.tuned = Tuned(change.id, None)
        limits = self._gate.in_force
        self._hooks.note(Notice(f"limits now: {limits_in_words(limits)}", "tuned", **msgspec.structs.asdict(limits)))
        return True

    def _change_limits(self, change: LimitChange) -> None:
        """The limits take effect, all of them.

        Raises:
            ValueError: one is not possible; none is changed.
        """
        if isinstance(self._gate, Gates) and any(getattr(change, name) is not None for name in OWN_LIMITS):
            raise ValueError("with several endpoints only budgets can be changed; their limits are in the job file")
        slots = self._gate.slots
        if change.max_in_flight is not None and change.max_in_flight > slots:
            raise ValueError(f"max_in_flight can be at most {slots}, as when this process started")
        self._gate.budget.change(cost_usd=change.max_cost_usd, tokens=change.max_tokens, requests=change.max_requests)
        day = change.requests_per_day
        daily = None if day is None else self._workers.learned.count_day(day, self._gate.in_flight, self._clock())
        self._gate.tune(Rates(**change.rates, daily=daily), max_in_flight=change.max_in_flight)

    def _refuse(self, why: str) -> None:
        self._status.log.write("control ignored", why=why)
        self._hooks.note(Notice(f"warning: {self._directory.control} is ignored: {why}", "control ignored", why=why))

    def check_deadline(self) -> None:
        """Ends admission if the answer to a request sent before the next beat would come after the deadline."""
        deadline, now_s = self._deadline, self._clock()
        if deadline is None or self._gate.stop is not None:
            return
        if now_s + BEAT_S > deadline.last_send_s(self._workers.slow_s):
            self._status.log.write("deadline", deadline=deadline.at, in_flight=self._gate.in_flight)
            why = f"the deadline ({deadline}) has come; run again with a later one or none"
            self.deadline_came = True
            self._workers.close(Stop(ExitCode.STOPPED, why))
            asyncio.get_running_loop().call_at(max(deadline.at_s, now_s) + self._hooks.grace_s, self._workers.cancel)

    def warn_of_limits(self, limits: Limits) -> None:
        """Warns, before the first request, if the job's own limits allow too few rows by the deadline.

        Limits on tokens count once answers show how many tokens a row takes.
        """
        if self._deadline is None or self._concern is None:
            return
        summary, left_s = self._status.summary(), self._deadline.at_s - self._clock()
        daily = self._workers.learned.daily
        today = None if daily is None else daily.most(self._deadline.at_s)
        most = capacity.most_rows(limits, left_s, capacity.size_of(summary.totals), today)
        if most is None:
            return
        share = min(1.0, (summary.done + most.rows) / summary.rows)
        if self._concern.rises(share, float("inf")):
            bound = "about" if most.by_mean else "no more than"
            self._warn_behind(f"at {most.pace} {bound}", math.ceil(share * 100), str(most.limit), self._deadline)

    def _warn(self, summary: Summary) -> None:
        """Warns that the deadline will be missed: once, and again when it gets worse."""
        forecast, share = self._status.forecast, summary.by_deadline
        if self._deadline is None or self._concern is None or forecast is None or share is None:
            return
        if self._gate.stop is None and self._concern.rises(share, forecast.seen_s):
            self._warn_behind("at this pace", int(share * 100), str(forecast.limit), self._deadline)

    def _warn_behind(self, pace: str, percent: int, limit: str, deadline: Deadline) -> None:
        fields = {"share": percent / 100, "deadline": deadline.at, "limited_by": limit}
        self._status.log.write("behind", **fields)
        line = f"warning: {pace} {percent} % of the rows will be done by {deadline}; limited by {limit}"
        self._hooks.note(Notice(line, "behind", **fields))
