"""What one start learns for the next: token sizes of requests, limits of the endpoint, the number of requests today.

It is stored in the checkpoint's manifest once a minute, at the end, and when a learned limit changes.
"""

import contextlib
from datetime import UTC, datetime

from batchrun.errors import BatchrunError
from batchrun.job.settings import Limits
from batchrun.limits import daily, overruns, token_estimates
from batchrun.limits.admission import Found
from batchrun.limits.daily import DailyCount, Day
from batchrun.limits.gates import AnyGate
from batchrun.limits.token_estimates import Estimates, TokenEstimates
from batchrun.store.checkpoint import Checkpoint

SAVE_EVERY_S = 60.0
"""Saving costs an fsync, and what was learned in the last minute is soon learned again."""

BIG_CHANGE = 0.25
"""A limit that differs so much from the saved one is saved at once: else a start that is killed early saves none."""


class LearnedLimits:
    """`known` is what earlier starts learned, `estimates` continues from there. `daily` is None without a limit."""

    def __init__(self, checkpoint: Checkpoint, limits: Limits, now_s: float, variant: int = 0) -> None:
        """If the job limits requests a day, today's date is stored. `variant`: the variant of the job now in use."""
        self._checkpoint = checkpoint
        self._saved_s = now_s
        entries = checkpoint.manifest_entries()
        self.known = token_estimates.decode(entries.get(token_estimates.ENTRY))
        self.estimates = Estimates(self.known.sizes)
        self.overruns = overruns.decode(entries.get(overruns.ENTRY), variant)
        self._found = Found(self.known.requests_per_minute, self.known.tokens_per_minute)
        self._day: Day | None = None
        self.daily: DailyCount | None = None
        if limits.requests_per_day is not None:
            sent, now = checkpoint.totals.requests(), datetime.now(UTC)
            self._day = daily.today(entries.get(daily.ENTRY), now, sent)
            checkpoint.write_manifest({daily.ENTRY: daily.encode(self._day)})
            self.daily = DailyCount(
                limits.requests_per_day, sent - self._day.requests_before, now_s + daily.left_s(now)
            )

    def count_day(self, limit: int, in_flight: int, now_s: float) -> DailyCount:
        """A count of today's requests with this limit; requests of all starts today are in it."""
        now, totals = datetime.now(UTC), self._checkpoint.totals
        if self._day is None:
            date = now.date().isoformat()
            sent = sum(line.attempts for line in totals.booked.values() if line.day == date)
            self._day = Day(date, totals.requests() - sent)
        sent = totals.requests() + in_flight - self._day.requests_before
        self.daily = DailyCount(limit, sent, now_s + daily.left_s(now))
        return self.daily

    def is_due(self, gate: AnyGate, now_s: float) -> bool:
        """True, once, when a minute has passed, a new day has started, or a limit has changed much."""
        day = self._day
        if day is not None:
            sent = self._checkpoint.totals.requests() + gate.in_flight  # these count for the day that has ended
            self._day = daily.today(daily.encode(day), datetime.now(UTC), sent)
        changed = _differs(self._found.requests_per_minute, gate.found.requests_per_minute)
        changed |= _differs(self._found.tokens_per_minute, gate.found.tokens_per_minute)
        if now_s - self._saved_s < SAVE_EVERY_S and self._day == day and not changed:
            return False
        self._saved_s, self._found = now_s, gate.found
        return True

    def save(self, gate: AnyGate) -> None:
        """Stores it for the next start in this run directory. Waits for the disk: call it in a thread."""
        known = TokenEstimates(
            self.known.sizes | self.estimates.sizes(),
            gate.found.requests_per_minute,
            gate.found.tokens_per_minute,
            gate.allowed_in_flight if gate.successes else self.known.in_flight,
        )
        entries = {token_estimates.ENTRY: token_estimates.encode(known)}
        if self._day is not None:
            entries[daily.ENTRY] = daily.encode(self._day)
        with contextlib.suppress(BatchrunError):  # a failing disk ends the run at the next commit
            self._checkpoint.write_manifest(entries)


def _differs(saved: float | None, found: float | None) -> bool:
    if saved is None or found is None:
        return saved is not found
    return abs(found - saved) > BIG_CHANGE * saved
