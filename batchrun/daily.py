"""The requests of a day, for `limits.requests_per_day`. PURE.

A day is a day of UTC. Its count survives every end of a process, as it is no count of its own: it is what the run's
account says now, less what it said when the day began.
"""

from datetime import UTC, datetime, timedelta

import msgspec

ENTRY = "day"
"""The manifest's entry that a `Day` is kept in."""


class Day(msgspec.Struct, frozen=True):
    """A day, as `2026-11-25`, and how many requests the run had made before it began."""

    date: str
    requests_before: int


def today(entry: str | None, now: datetime, requests: int) -> Day:
    """The day that it is now: the one on record, or a new one, which begins with so many requests made."""
    date = now.astimezone(UTC).date().isoformat()
    if entry is not None:
        day = msgspec.json.decode(entry, type=Day)
        if day.date == date:
            return day
    return Day(date, requests)


def encode(day: Day) -> str:
    """The manifest's entry."""
    return msgspec.json.encode(day).decode()


def left_s(now: datetime) -> float:
    """Seconds until the day ends."""
    now = now.astimezone(UTC)
    midnight = datetime.combine(now.date() + timedelta(days=1), datetime.min.time(), UTC)
    return (midnight - now).total_seconds()


class DailyCount:
    """How many requests a day still has: none are left until it ends at `ends_s`, then all again."""

    __slots__ = ("_limit", "_made", "ends_s")

    def __init__(self, limit: int, made: int, ends_s: float) -> None:
        self._limit = limit
        self._made = made
        self.ends_s = ends_s

    def is_spent(self, now_s: float) -> bool:
        """True when no request may be made before `ends_s`."""
        while now_s >= self.ends_s:
            self.ends_s += 86_400.0
            self._made = 0
        return self._made >= self._limit

    def take(self) -> None:
        """One request is made."""
        self._made += 1
