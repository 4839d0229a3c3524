"""Requests per UTC day, for `limits.requests_per_day`. PURE.

The count survives a crash because it is derived: the run's total now, minus its total when the day began.
"""

import math
from datetime import UTC, datetime, timedelta

import msgspec

ENTRY = "day"
"""The manifest's entry that a `Day` is kept in."""


_DAY_S = 86_400.0


class Day(msgspec.Struct, frozen=True):
    """A UTC date, like `2026-11-25`, and the run's total of requests when it began."""

    date: str
    requests_before: int


def today(entry: str | None, now: datetime, requests: int) -> Day:
    """The stored day if it is still today, or a new one that begins with so many requests made."""
    date = now.astimezone(UTC).date().isoformat()
    if entry is not None:
        day = msgspec.json.decode(entry, type=Day)
        if day.date == date:
            return day
    return Day(date, requests)


def encode(day: Day) -> str:
    """The manifest entry."""
    return msgspec.json.encode(day).decode()


def left_s(now: datetime) -> float:
    """Seconds until the day ends."""
    now = now.astimezone(UTC)
    midnight = datetime.combine(now.date() + timedelta(days=1), datetime.min.time(), UTC)
    return (midnight - now).total_seconds()


def least_s(requests: int, limit: int, day_left_s: float) -> float:
    """The least time for so many requests at `limit` a day, if the present day ends in `day_left_s`."""
    midnights = -(-requests // limit) - 1
    return day_left_s + (midnights - 1) * _DAY_S if midnights > 0 else 0.0


class DailyCount:
    """Counts a day's requests up to `limit`; the count restarts at `ends_s`, and a day later each time."""

    __slots__ = ("_made", "ends_s", "limit")

    def __init__(self, limit: int, made: int, ends_s: float) -> None:
        self.limit = limit
        self._made = made
        self.ends_s = ends_s

    def is_spent(self, now_s: float) -> bool:
        """True if no request may be sent before `ends_s`."""
        while now_s >= self.ends_s:
            self.ends_s += _DAY_S
            self._made = 0
        return self._made >= self.limit

    def take(self) -> None:
        """Counts one request."""
        self._made += 1

    def most(self, until_s: float) -> int:
        """How many requests may be sent until then."""
        midnights = max(0, math.ceil((until_s - self.ends_s) / _DAY_S))
        return max(0, self.limit - self._made) + midnights * self.limit
