"""Reads the wait that a server wants: Retry-After (RFC 9110, section 10.2.3), and durations in words. PURE."""

import email.utils
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime

LEAST_EPOCH_S = 1.5e9
"""A larger number of seconds is not a wait but a time: seconds since 1970 or, if a thousand times as large, ms."""

MOST_RESET_S = 86_400.0  # the longest known limits are per day

RESETS = (
    ("x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"),
    ("x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"),
    ("anthropic-ratelimit-requests-remaining", "anthropic-ratelimit-requests-reset"),
    ("anthropic-ratelimit-tokens-remaining", "anthropic-ratelimit-tokens-reset"),
    ("anthropic-ratelimit-input-tokens-remaining", "anthropic-ratelimit-input-tokens-reset"),
    ("anthropic-ratelimit-output-tokens-remaining", "anthropic-ratelimit-output-tokens-reset"),
    ("x-ratelimit-remaining", "x-ratelimit-reset-after"),
    ("x-ratelimit-remaining", "x-ratelimit-reset"),
    ("x-rate-limit-remaining", "x-rate-limit-reset"),
    ("ratelimit-remaining", "ratelimit-reset"),
)
"""The rest of a limit, and its reset (docs/servers.md has who sends which)."""

_DURATION = re.compile(
    r"(?P<number>\d+(?:\.\d+)?) ?(?P<unit>ms|milliseconds?|s|sec(?:ond)?s?|m|min(?:ute)?s?|h|hours?)"
)
_UNIT_S = {"ms": 0.001, "mi": 60.0, "m": 60.0, "s": 1.0, "h": 3600.0}


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that the server asks to wait: `retry-after-ms`, `x-ms-retry-after-ms`, or `Retry-After` in seconds or as
    an HTTP date; and what servers send besides: `10s`, `1m30s`, seconds or milliseconds since 1970, an ISO date.

    None where absent or meaningless (negative, no number, a moment in the past). A moment is compared with the
    server's own `Date` where it sends one, so a skewed clock does no harm.
    """
    for name, scale in (("retry-after-ms", 0.001), ("x-ms-retry-after-ms", 0.001), ("retry-after", 1.0)):
        text = headers.get(name, "").strip()
        seconds = _number(text)
        if seconds is None and name == "retry-after" and _DURATION.match(text):
            seconds = duration_s(text)
        if seconds is not None and seconds * scale < LEAST_EPOCH_S:
            return seconds * scale

    then = _moment(headers.get("retry-after", "").strip())
    if then is None:
        return None
    wait_s = then - (_timestamp(email.utils.parsedate_to_datetime, headers.get("date", "")) or now)
    return wait_s if wait_s > 0 else None


def reset_s(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds until the limit behind a 429 resets, by its rate limit headers; None where they don't say.

    The latest reset of the limits that are used up; without a `remaining` no one knows which one it is, and the
    earliest counts. A reset that is more than a day away is ignored: no limit lasts longer, and some units are unknown.
    """
    used_up, unknown = [], []
    now = _timestamp(email.utils.parsedate_to_datetime, headers.get("date", "")) or now
    for remaining, reset in _stated(headers):
        seconds = _reset_in_s(reset, now)
        if seconds is None or not 0 < seconds <= MOST_RESET_S:
            continue
        if (left := _number(remaining)) is None:
            unknown.append(seconds)
        elif left < 1:
            used_up.append(seconds)
    return max(used_up) if used_up else min(unknown, default=None)


def _stated(headers: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The rest and the reset of each limit, as texts."""
    for remaining, reset in RESETS:
        if text := headers.get(reset, "").strip():
            yield headers.get(remaining, "").strip(), text
    # draft-ietf-httpapi-ratelimit-headers: `"default";r=0;t=30` since its version 8, `remaining=0, reset=30` in its 7th
    stated = headers.get("ratelimit", "")[:500]
    if "reset=" in stated:
        yield _parameter(stated, "remaining"), _parameter(stated, "reset")
    else:
        for policy in stated.split(","):
            yield _parameter(policy, "r"), _parameter(policy, "t")


def _parameter(text: str, name: str) -> str:
    found = re.search(rf"(?:^|[;,\s]){name}=(\d{{1,15}})", text)
    return found[1] if found else ""


def _reset_in_s(text: str, now: float) -> float | None:
    """From seconds, `6m0s`, a moment in seconds or milliseconds since 1970, an ISO date or an HTTP date."""
    number = _number(text)
    if number is None and _DURATION.match(text):
        return duration_s(text)
    if number is not None and number < LEAST_EPOCH_S:
        return number
    then = _moment(text)
    return None if then is None else then - now


def duration_s(text: str) -> float | None:
    """A number of seconds, `32s`, `7m12.5s` or `8 seconds`, in seconds; None for any other text."""
    if len(text) > 60:
        return None
    if (seconds := _number(text)) is not None:
        return seconds
    total, found = 0.0, False
    for part in _DURATION.finditer(text.lower()):
        unit = part["unit"]
        scale = _UNIT_S["ms"] if unit.startswith(("ms", "milli")) else _UNIT_S[unit[0]]
        total, found = total + float(part["number"][:12]) * scale, True
    return total if found else None


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d{1,18}(\.\d{1,9})?", text) else None


def _moment(text: str) -> float | None:
    """Seconds since 1970, from such a number (or milliseconds), an ISO date or an HTTP date."""
    if (number := _number(text)) is not None:
        return number if number < LEAST_EPOCH_S * 1000 else number / 1000
    if (then := _timestamp(datetime.fromisoformat, text)) is not None:
        return then
    return _timestamp(email.utils.parsedate_to_datetime, text)


def _timestamp(parse: Callable[[str], datetime], text: str) -> float | None:
    """Seconds since 1970; None where `text` is not a date."""
    try:
        date = parse(text)
        # a date without a zone is UTC too, as in asctime's form, which RFC 9110 still allows
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
