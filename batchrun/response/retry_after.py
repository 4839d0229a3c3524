"""How long an answer's headers ask to wait. PURE. RFC 9110, section 10.2.3."""

import email.utils
import re
from collections.abc import Mapping
from datetime import UTC


def retry_after_s(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds that the server asks to wait: `retry-after-ms`, or `Retry-After` in seconds or as an HTTP date.

    None where absent or meaningless (negative, no number, a date in the past). RFC 9110, section 10.2.3. A date is
    read against the server's own `Date` where it sends one, so a skewed clock does no harm.
    """
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        if (seconds := _number(headers.get(name))) is not None:
            return seconds * scale
    then = _date(headers.get("retry-after"))
    if then is None:
        return None
    wait_s = then - (_date(headers.get("date")) or now)
    return wait_s if wait_s > 0 else None


def _number(text: str | None) -> float | None:
    if text is None or not re.fullmatch(r"\s*\d{1,18}(\.\d{1,9})?\s*", text):
        return None
    return float(text)


def _date(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        date = email.utils.parsedate_to_datetime(text)
        # a date without a zone is UTC too, as in asctime's form, which RFC 9110 still allows
        return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
