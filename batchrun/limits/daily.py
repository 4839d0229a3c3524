"""The requests of a day, for `limits.requests_per_day`. PURE.

A day is a day of UTC. Its count survives every end of a process, as it is no count of its own: it is what the run's
account says now, less what it said when the day began.
"""

import math
from datetime import UTC, datetime, timedelta

import msgspec

ENTRY = "day"
"""The manifest's entry that a `Day` is kept in."""


_DAY_S = 86_400.0


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


def least_s(requests: int, limit: int, day_left_s: float) -> float:
    """How long so many requests take at least, at `limit` a day, from a day that ends in `day_left_s`."""
    midnights = -(-requests // limit) - 1
    return day_left_s + (midnights - 1) * _DAY_S if midnights > 0 else 0.0


class DailyCount:
    """How many of its `limit` requests a day still has: none are left until it ends at `ends_s`, then all again."""

    __slots__ = ("_made", "ends_s", "limit")

    def __init__(self, limit: int, made: int, ends_s: float) -> None:
        self.limit = limit
        self._made = made
        self.ends_s = ends_s

    def is_spent(self, now_s: float) -> bool:
        """True when no request may be made before `ends_s`."""
        while now_s >= self.ends_s:
            self.ends_s += _DAY_S
            self._made = 0
        return self._made >= self.limit

    def take(self) -> None:
        """One request is made."""
        self._made += 1

    def most(self, until_s: float) -> int:
        """How many requests may be made until then."""
        midnights = max(0, math.ceil((until_s - self.ends_s) / _DAY_S))
        return max(0, self.limit - self._made) + midnights * self.limit
