"""Bounds from the job's own limits: how long rows take at least, how many can be done by a moment. PURE.

Bursts are included; retries and limits learned while running are not. A token limit is applied to rows of mean size.
"""

from collections.abc import Iterable, Iterator

import msgspec

from batchrun.job.settings import Limits
from batchrun.limits import daily
from batchrun.limits.adaptive_rate import MAX_BURST_S
from batchrun.limits.admission import Limit
from batchrun.run_summary import TotalsLine


class Size(msgspec.Struct, frozen=True):
    """Mean tokens of a row, from so many answers; zeros if unknown, and then no token limit applies."""

    prompt_tokens: float = 0.0
    completion_tokens: float = 0.0
    answers: int = 0


class Allowance(msgspec.Struct, frozen=True):
    """How many rows a limit allows; `pace` is the limit in words. `by_mean`: computed from the mean row size."""

    limit: Limit
    rows: float
    pace: str
    by_mean: bool = False


def size_of(totals: Iterable[TotalsLine]) -> Size:
    """The mean over the answers so far."""
    lines = [line for line in totals if line.prompt_tokens]
    answers = sum(line.rows - line.reused for line in lines)
    if not answers:
        return Size()
    prompt, completion = (sum(getattr(line, name) for line in lines) for name in ("prompt_tokens", "completion_tokens"))
    return Size(prompt / answers, completion / answers, answers)


def least_minutes(limits: Limits, rows: int, size: Size, day_left_s: float) -> tuple[float, Limit] | None:
    """The least time that so many rows take, and the limit responsible; None if no limit applies."""
    # the first row waits for nothing: one that needs more than a full bucket is sent, too, and leaves a debt
    times = [(max(0.0, (rows - 1) / pace.rows - MAX_BURST_S / 60), pace.limit) for pace in _a_minute(limits, size)]
    if limits.requests_per_day is not None:
        days = daily.least_s(rows, limits.requests_per_day, day_left_s) / 60
        times += [(days, Limit.REQUESTS_PER_DAY)] if days else []
    return max(times, key=lambda time: time[0], default=None)


def most_rows(limits: Limits, within_s: float, size: Size, day_requests: int | None) -> Allowance | None:
    """How many rows can be done in that time, with `day_requests` allowed by the daily limit; None without limits."""
    time_s = within_s + MAX_BURST_S
    allowed = [msgspec.structs.replace(pace, rows=pace.rows / 60 * time_s + 1) for pace in _a_minute(limits, size)]
    if limits.requests_per_day is not None and day_requests is not None:
        words = f"{limits.requests_per_day:,} requests a day"
        allowed.append(Allowance(Limit.REQUESTS_PER_DAY, day_requests, words))
    return min(allowed, key=lambda allowance: allowance.rows, default=None)


def _a_minute(limits: Limits, size: Size) -> Iterator[Allowance]:
    """What each limit allows per minute, except the daily one."""
    prompt, completion = size.prompt_tokens, size.completion_tokens
    table = (
        (Limit.REQUESTS, limits.requests_per_minute, 1.0, 1.0, "requests a minute"),
        (Limit.REQUESTS_PER_SECOND, limits.requests_per_second, 60.0, 1.0, "requests a second"),
        (Limit.TOKENS, limits.tokens_per_minute, 1.0, prompt + completion, "tokens a minute"),
        (Limit.INPUT_TOKENS, limits.input_tokens_per_minute, 1.0, prompt, "input tokens a minute"),
        (Limit.OUTPUT_TOKENS, limits.output_tokens_per_minute, 1.0, completion, "output tokens a minute"),
    )
    for limit, configured, times_a_minute, of_a_row, words in table:
        if configured is not None and of_a_row:
            rows = configured * times_a_minute / of_a_row
            yield Allowance(limit, rows, f"{configured:,g} {words}", "tokens" in words)
