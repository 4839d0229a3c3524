"""Reads the rate limit headers `x-ratelimit-{limit,remaining,reset}-{requests,tokens}`. PURE.

docs/api.md, "Limits in headers": common practice, not in the vendor's document. Implausible values are ignored: many
gateways send these headers, some of them per day, empty, or in another unit.
"""

import re
from collections.abc import Mapping

import msgspec

MAX_PER_MINUTE = 1e12
"""A larger number is a mistake or means "no limit"."""

MAX_RESET_S = 66.0
"""A limit per minute refills within about a minute: a longer reset belongs to a day or a month."""

LONGER_WINDOWS_S = (3_600.0, 86_400.0)
WINDOW_ERROR = 0.02
"""Resets are rounded to a few digits."""

_DURATION = re.compile(
    r"(?:(\d{1,6}(?:\.\d{1,9})?)d)?(?:(\d{1,6}(?:\.\d{1,9})?)h)?(?:(\d{1,6}(?:\.\d{1,9})?)m(?!s))?"
    r"(?:(\d{1,9}(?:\.\d{1,9})?)s)?(?:(\d{1,9}(?:\.\d{1,9})?)ms)?(?:\d{1,9}(?:\.\d{1,9})?[uµ]s)?"
)
_UNITS_S = (86_400.0, 3_600.0, 60.0, 1.0, 0.001)
_NUMBER = re.compile(r"\d{1,15}(?:\.\d{1,9})?")


class StatedLimit(msgspec.Struct, frozen=True):
    """One limit as the server states it: per minute, what is left now, and the time until it is full again."""

    per_minute: float
    remaining: float | None = None
    reset_s: float | None = None


def read_limit(headers: Mapping[str, str], what: str) -> StatedLimit | None:
    """The limit on `what`, "requests" or "tokens"; None without a plausible one per minute."""
    text = headers.get(f"x-ratelimit-limit-{what}")
    if text is None:
        return None
    per_minute = _number(text)
    if per_minute is None or not 0 < per_minute <= MAX_PER_MINUTE:
        return None
    remaining = _number(headers.get(f"x-ratelimit-remaining-{what}"))
    if remaining is not None and remaining > per_minute:
        remaining = None
    reset_s = duration_s(headers.get(f"x-ratelimit-reset-{what}"))
    if reset_s is not None and reset_s > MAX_RESET_S:
        return None
    if reset_s is not None and remaining is not None and remaining < per_minute:
        # what was used comes back as slowly as a limit per hour or day does (Groq: `14400`, `14399`, `6s`)
        window_s = reset_s * per_minute / (per_minute - remaining)
        if any(abs(window_s - longer_s) <= WINDOW_ERROR * longer_s for longer_s in LONGER_WINDOWS_S):
            return None
    return StatedLimit(per_minute, remaining, reset_s)


def duration_s(text: str | None) -> float | None:
    """Seconds in `1s`, `6m0s`, `250ms`, `1h2m3.5s`, `1d`, or a plain number of seconds; None for anything else."""
    if text is None or not (text := text.strip()):
        return None
    if (seconds := _number(text)) is not None:
        return seconds
    found = _DURATION.fullmatch(text)
    if found is None:
        return None
    return sum(float(part) * unit for part, unit in zip(found.groups(), _UNITS_S, strict=True) if part)


def _number(text: str | None) -> float | None:
    return None if text is None or not _NUMBER.fullmatch(text.strip()) else float(text)
