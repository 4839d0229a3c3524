"""`--deadline`: the moment at which a run must have ended, converted once to a clock that never jumps. PURE."""

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import msgspec

from batchrun.errors import JobError

_DURATION = re.compile(r"(?:(?P<days>\d+(?:\.\d+)?)d)?(?:(?P<hours>\d+(?:\.\d+)?)h)?"
                       r"(?:(?P<minutes>\d+(?:\.\d+)?)m)?(?:(?P<seconds>\d+(?:\.\d+)?)s)?")  # fmt: skip
_TIME_OF_DAY = re.compile(r"\d{1,2}:\d{2}(?::\d{2})?")

LONGEST = timedelta(days=366)
"""A longer deadline is taken for a typing error."""

LEAD_SHARE = 0.5
"""At most this share of the time is reserved for requests in flight at the end, however slow the answers are."""


class Deadline(msgspec.Struct, frozen=True):
    """`at` is wall time, to show; `at_s` is the same moment on the monotonic clock, to compare."""

    at: datetime
    started_s: float
    at_s: float

    def last_send_s(self, latency_s: float) -> float:
        """The last moment to send a request that takes `latency_s`, so that it ends by the deadline."""
        return self.at_s - min(latency_s, LEAD_SHARE * (self.at_s - self.started_s))

    def __str__(self) -> str:
        return in_words(self.at, self.at - timedelta(seconds=self.at_s - self.started_s))


Local = Callable[[datetime], datetime]
"""Local time → moment. `datetime.astimezone` uses the machine's own time zone, with daylight saving time."""


def parse(text: str, now: datetime, now_s: float, local: Local = datetime.astimezone) -> Deadline:
    """Parses a deadline, given `now` (local, aware), which is `now_s` on the monotonic clock.

    Accepts a duration (`6h`, `90m`, `1h30m`), a time of day (`06:00`: the next one), or a moment (`2026-11-26T06:00`,
    local without a time zone).

    Raises:
        JobError: it is invalid, or in the past.
    """
    at = _moment(text.strip(), now, local)
    if at is None:
        raise JobError(
            f"--deadline {text}: expected a duration (6h, 90m), a time (06:00) or a moment (2026-11-26T06:00)"
        )
    ahead = at.astimezone(UTC) - now.astimezone(UTC)
    if ahead <= timedelta(0):
        raise JobError(f"--deadline {text}: is in the past; name a later one")
    if ahead > LONGEST:
        raise JobError(f"--deadline {text}: is more than a year ahead; name an earlier one")
    return Deadline(at, now_s, now_s + ahead.total_seconds())


def in_words(at: datetime, now: datetime) -> str:
    """The time, with its date unless that is today."""
    seconds = ":%S" if at.second else ""
    if at.date() == now.astimezone(at.tzinfo).date():
        return at.strftime(f"%H:%M{seconds}")
    return at.strftime("%a %H:%M" if at - now < timedelta(days=6) else "%Y-%m-%d %H:%M")


def _moment(text: str, now: datetime, local: Local) -> datetime | None:
    """None if the text is not a moment."""
    try:
        if _TIME_OF_DAY.fullmatch(text):
            hour, minute, *second = map(int, text.split(":"))
            today = now.replace(hour=hour, minute=minute, second=second[0] if second else 0, microsecond=0, tzinfo=None)
            at = local(today)
            return at if at > now else local(today + timedelta(days=1))
        if text and (duration := _DURATION.fullmatch(text)):
            ahead = timedelta(**{unit: float(number) for unit, number in duration.groupdict("0").items()})
            return (now.astimezone(UTC) + ahead).astimezone(now.tzinfo)
        at = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        return None
    return local(at) if at.tzinfo is None else at
