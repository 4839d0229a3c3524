"""The keys that a bill is grouped by, and the time zone of its days. PURE, except for the machine's own time zone."""

import os
import re
from collections.abc import Sequence
from datetime import date, datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec

from batchrun.errors import JobError
from batchrun.report.runs import FoundRun
from batchrun.run_summary import TotalsLine

KEYS = ("night", "day", "month", "job", "model", "service_tier", "status", "tag", "run")
"""`tag` means all tags of a job, `tag.team` one of them."""

OF_LINES = frozenset({"day", "month", "model", "service_tier", "status"})
"""The keys that divide a run. Grouped by the others, a run is in one group, with its whole-run figures."""

UNKNOWN = "unknown"


class DaySpan(msgspec.Struct, frozen=True):
    """From `since` to `until`, both included; None: no end. The days are those of `zone`."""

    zone: str = "UTC"
    since: date | None = None
    until: date | None = None

    def holds(self, day: str, run_began: str) -> bool:
        """True if money spent on `day` counts. If the day is unknown, the first day of the run decides."""
        if self.since is None and self.until is None:
            return True
        on = date.fromisoformat((run_began if day == UNKNOWN else day)[:10])
        return (self.since is None or on >= self.since) and not self.is_over(on.isoformat())

    def is_over(self, day: str) -> bool:
        """True if the day is after `until`."""
        return self.until is not None and date.fromisoformat(day) > self.until


def keys(by: str) -> tuple[str, ...]:
    """The group keys of a text such as `job,model`.

    Raises:
        JobError: an unknown key, or one twice.
    """
    named = tuple(by.split(","))
    if unknown := [key for key in named if key not in KEYS and not re.fullmatch(r"tag\.[A-Za-z0-9_.-]+", key)]:
        raise JobError(f"--by {unknown[0]}: expected some of {', '.join(KEYS)}, or tag.NAME")
    if twice := [key for key in named if named.count(key) > 1]:
        raise JobError(f"--by {by}: names {twice[0]} twice")
    return named


def span(zone: str, since: str | None, until: str | None) -> DaySpan:
    """The days between two dates, in the time zone of that name; `local` is the machine's.

    Raises:
        JobError: an unknown zone, an invalid date, or an empty span.
    """
    name = zone
    if zone == "local":  # the machine's, by its name: TZ, else what /etc/localtime points to
        target = os.path.realpath("/etc/localtime")
        name = os.environ.get("TZ", "").lstrip(":") or target.partition("zoneinfo/")[2] or "UTC"
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise JobError(
            f"--tz {zone}: no time zone of that name is known here; expected one like Europe/Berlin"
        ) from error
    first, last = _date("--since", since), _date("--until", until)
    if first is not None and last is not None and first > last:
        raise JobError(f"--since {since} is after --until {until}")
    return DaySpan(name, first, last)


def _date(flag: str, text: str | None) -> date | None:
    if text is None:
        return None
    try:
        if re.fullmatch(r"\d{4}-\d{2}", text):
            first = date.fromisoformat(text + "-01")
            return first if flag == "--since" else (first + timedelta(days=31)).replace(day=1) - timedelta(days=1)
        return date.fromisoformat(text)
    except ValueError as error:
        raise JobError(f"{flag} {text}: expected a date like 2026-11-01, or a month like 2026-11") from error


def night(found: FoundRun, zone: str) -> str:
    """The date of a run: the `{date}` in its directory's name, else the day of its first start.

    The whole cost of the run belongs to that night, however long it took.
    """
    place = found.place if found.place.is_dir() else None
    for name in () if place is None else (place.name, place.absolute().parent.name):
        if dated := re.match(r"(\d{4}-\d{2}-\d{2})(?:-\d+)?$", name):
            return dated[1]
    return day_of(found.account.started_at, zone)


def day_of(at: datetime, zone: str) -> str:
    """The local date of a moment."""
    return at.astimezone(ZoneInfo(zone)).date().isoformat()


def group(by: Sequence[str], found: FoundRun, line: TotalsLine, zone: str) -> tuple[str, ...]:
    """The values of the keys for one line of a run's totals; its `day` is the local one."""
    return tuple(_value(key, found, line, zone) for key in by)


def _value(key: str, found: FoundRun, line: TotalsLine, zone: str) -> str:
    account = found.account
    match key:
        case "night":
            return night(found, zone)
        case "day":
            return line.day or UNKNOWN
        case "month":
            return line.day[:7] or UNKNOWN
        case "job":
            return account.job
        case "run":
            return account.run_id
        case "model":
            return line.model
        case "service_tier":
            return line.service_tier or "none named"
        case "tag":
            return ", ".join(f"{name}={value}" for name, value in sorted(account.tags.items()))
        case "status":
            return line.status
        case _:
            return account.tags.get(key.removeprefix("tag."), "")
