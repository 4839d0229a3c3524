"""What a run knows from one start to the next: sizes of requests, limits that were found, the requests of a day.

It is kept in the checkpoint's manifest, once a minute, at the end, and as soon as a limit is found or proves another: a
convenience, but for the day.
"""

import contextlib
from datetime import UTC, datetime

from batchrun.errors import BatchrunError
from batchrun.job.job import Limits
from batchrun.limits import daily, overruns, token_estimates
from batchrun.limits.admission import Found
from batchrun.limits.daily import DailyCount, Day
from batchrun.limits.gate import Gate
from batchrun.limits.token_estimates import Estimates, TokenEstimates
from batchrun.store.checkpoint import Checkpoint

KEEP_EVERY_S = 60.0
"""Each time costs the disk an fsync, and what was learned in the last minute is soon learned again."""

NEWS = 0.25
"""A limit that is off by so much from what was kept is kept at once: else a start that is killed young leaves none."""


class LearnedLimits:
    """`known` is what earlier starts have learned, `estimates` goes on from there. `daily` is None without a limit."""

    def __init__(self, checkpoint: Checkpoint, limits: Limits, now_s: float, variant: int = 0) -> None:
        """The day that it is now is on record, where the job limits its requests. `variant`: how rows are asked now."""
        self._checkpoint = checkpoint
        self._kept_s = now_s
        manifest = checkpoint.manifest()
        self.known = token_estimates.decode(manifest.get(token_estimates.ENTRY))
        self.estimates = Estimates(self.known.sizes)
        self.overruns = overruns.decode(manifest.get(overruns.ENTRY), variant)
        self._found = Found(self.known.requests_per_minute, self.known.tokens_per_minute)
        self._day: Day | None = None
        self.daily: DailyCount | None = None
        if limits.requests_per_day is not None:
            made, now = checkpoint.spent.requests(), datetime.now(UTC)
            self._day = daily.today(manifest.get(daily.ENTRY), now, made)
            checkpoint.write_manifest({daily.ENTRY: daily.encode(self._day)})
            self.daily = DailyCount(
                limits.requests_per_day, made - self._day.requests_before, now_s + daily.left_s(now)
            )

    def count_day(self, limit: int, in_flight: int, now_s: float) -> DailyCount:
        """The day's requests are limited from now on; those that all starts made since it began are counted."""
        now, spent = datetime.now(UTC), self._checkpoint.spent
        if self._day is None:
            date = now.date().isoformat()
            made = sum(line.attempts for line in spent.totals.values() if line.day == date)
            self._day = Day(date, spent.requests() - made)
        made = spent.requests() + in_flight - self._day.requests_before
        self.daily = DailyCount(limit, made, now_s + daily.left_s(now))
        return self.daily

    def is_due(self, gate: Gate, now_s: float) -> bool:
        """True, once, when a minute has passed, a new day has begun, or a limit is news."""
        day = self._day
        if day is not None:
            made = self._checkpoint.spent.requests() + gate.in_flight  # what is out belongs to the day that has ended
            self._day = daily.today(daily.encode(day), datetime.now(UTC), made)
        news = _is_news(self._found.requests_per_minute, gate.found.requests_per_minute)
        news |= _is_news(self._found.tokens_per_minute, gate.found.tokens_per_minute)
        if now_s - self._kept_s < KEEP_EVERY_S and self._day == day and not news:
            return False
        self._kept_s, self._found = now_s, gate.found
        return True

    def keep(self, gate: Gate) -> None:
        """The next start in this run directory begins where this one is. For a thread: it waits for the disk."""
        known = TokenEstimates(
            self.known.sizes | self.estimates.sizes(),
            gate.found.requests_per_minute,
            gate.found.tokens_per_minute,
            gate.allowed_in_flight if gate.successes else self.known.in_flight,
        )
        entries = {token_estimates.ENTRY: token_estimates.encode(known)}
        if self._day is not None:
            entries[daily.ENTRY] = daily.encode(self._day)
        with contextlib.suppress(BatchrunError):  # a disk that fails is told of by what needs it
            self._checkpoint.write_manifest(entries)


def _is_news(kept: float | None, found: float | None) -> bool:
    if kept is None or found is None:
        return kept is not found
    return abs(found - kept) > NEWS * kept
