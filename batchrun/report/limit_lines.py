"""What limits a run's speed, in words: its limits, waits and retries. PURE."""

from datetime import datetime
from decimal import Decimal

from batchrun.limits.admission import Binding, Limit
from batchrun.report.wording import plural, rounded
from batchrun.run_summary import InForce, Retrying


def limits_in_words(limits: InForce) -> str:
    """The limits in force."""
    forms: tuple[tuple[float | Decimal | None, str], ...] = (
        (limits.requests_per_second, "{:,} requests/s"),
        (limits.requests_per_minute, "{:,} requests/min"),
        (limits.requests_per_day, "{:,} requests/day"),
        (limits.tokens_per_minute, "{:,} tokens/min"),
        (limits.input_tokens_per_minute, "{:,} input tokens/min"),
        (limits.output_tokens_per_minute, "{:,} output tokens/min"),
        (limits.max_in_flight, "{:,} in flight"),
        (limits.max_cost_usd, "${:,f} in all"),
        (limits.max_tokens, "{:,} tokens in all"),
        (limits.max_requests, "{:,} requests in all"),
    )
    return ", ".join(form.format(rounded(limit)) for limit, form in forms if limit is not None)


def limiting_factor(binding: Binding, wall_offset_s: float) -> str:
    """The limit that holds the run back; `wall_offset_s` + the gate's clock is wall time."""
    if binding.limit is Limit.COOLING and binding.until_s is not None:
        until = datetime.fromtimestamp(binding.until_s + wall_offset_s).astimezone()
        return f"{binding.limit} ({binding.because}) till {until:%H:%M:%S}"
    return str(binding.limit)


def waiting_to_retry(retrying: Retrying) -> str:
    """The limiting factor of a run in which only retries are left."""
    status, _, kind = next(iter(retrying.reasons)).partition(" ")
    reason = status if status.isdigit() else f"{status} {kind}".rstrip()
    till = "" if retrying.next_at is None else f" till {retrying.next_at.astimezone():%H:%M:%S}"
    return f"retries ({reason}){till}"


def retrying_in_words(retrying: Retrying) -> str:
    """The rows that are retried, how often they were sent, and why."""
    more = "…" if retrying.rows > len(retrying.first) else ""
    rows = f"{plural(retrying.rows, 'row')} ({', '.join(map(str, retrying.first))}{more})"
    reasons = ", ".join(f"{reason} ({count:,})" for reason, count in retrying.reasons.items())
    times = "once" if retrying.attempts == 1 else f"up to {retrying.attempts:,} times"
    return f"{rows}, sent {times} so far: {reasons}"
