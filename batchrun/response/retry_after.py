"""How long a server wants the client to wait: Retry-After (RFC 9110, section 10.2.3), and durations in words. PURE."""

import email.utils
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

LEAST_EPOCH_S = 1.5e9
"""A larger number of seconds is no wait but a moment, in seconds since 1970 or, a thousand times as large, in ms."""

_DURATION = re.compile(
    r"(?P<number>\d+(?:\.\d+)?) ?(?P<unit>ms|milliseconds?|s|sec(?:ond)?s?|m|min(?:ute)?s?|h|hours?)"
)
_UNIT_S = {"ms": 0.001, "mi": 60.0, "m": 60.0, "s": 1.0, "h": 3600.0}


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds to wait, by the headers: `retry-after-ms`, or `Retry-After` in seconds or as an HTTP date; and what
    servers send besides: `10s`, `1m30s`, seconds or milliseconds since 1970, an ISO date.

    None where absent or meaningless (negative, no number, a moment in the past). A moment is compared with the
    server's own `Date` where it sends one, so a skewed clock does no harm.
    """
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        text = headers.get(name, "").strip()
        seconds = _number(text)
        if seconds is None and name == "retry-after" and _DURATION.match(text):
            seconds = duration_s(text)
        if seconds is not None and seconds * scale < LEAST_EPOCH_S:
            return seconds * scale

    text = headers.get("retry-after", "").strip()
    if (then := _number(text)) is not None:  # since 1970, in seconds or milliseconds
        then = then if then < LEAST_EPOCH_S * 1000 else then / 1000
    elif (then := _timestamp(datetime.fromisoformat, text)) is None:
        then = _timestamp(email.utils.parsedate_to_datetime, text)
    if then is None:
        return None
    sent = _timestamp(email.utils.parsedate_to_datetime, headers.get("date", ""))
    wait_s = then - (sent or now)
    return wait_s if wait_s > 0 else None


def duration_s(text: str) -> float | None:
    """A number of seconds, `32s`, `7m12.5s` or `8 seconds`, in seconds; None where it is none of these."""
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


def _timestamp(parse: Callable[[str], datetime], text: str) -> float | None:
    """Seconds since 1970; None where `text` is no date."""
    try:
        date = parse(text)
        # a date without a zone is UTC too, as in asctime's form, which RFC 9110 still allows
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
