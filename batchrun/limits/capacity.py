"""What the job's own limits allow: how long rows take at least, and how many can be done by a moment. PURE.

Both are bounds: the gate's bursts count, retries and limits that are only learned on the way don't. A limit on tokens
holds for rows of the mean size, so its bound is as good as that mean.
"""

from collections.abc import Iterable, Iterator

import msgspec

from batchrun.job.job import Limits
from batchrun.limits import daily
from batchrun.limits.adaptive_rate import MAX_BURST_S
from batchrun.limits.admission import Limit
from batchrun.records import TotalsLine

MOST_BURST_S = MAX_BURST_S
"""So many seconds of a limit may go at once, where the server's headers show that it has more."""

ONE = 1
"""The request that goes when a bucket holds less than it takes: it leaves a debt, but it goes."""


class Size(msgspec.Struct, frozen=True):
    """Mean tokens of a row, and how many answers say so; zeros where nothing is known, which no limit holds back."""

    prompt_tokens: float = 0.0
    completion_tokens: float = 0.0
    answers: int = 0


class Allowance(msgspec.Struct, frozen=True):
    """How many rows a limit lets be done; `pace` is the limit in words. `by_mean`: rows of other sizes may be more."""

    limit: Limit
    rows: float
    pace: str
    by_mean: bool = False


def size_of(totals: Iterable[TotalsLine]) -> Size:
    """The mean of the answers so far."""
    lines = [line for line in totals if line.prompt_tokens]
    answers = sum(line.rows - line.reused for line in lines)
    if not answers:
        return Size()
    prompt, completion = (sum(getattr(line, name) for line in lines) for name in ("prompt_tokens", "completion_tokens"))
    return Size(prompt / answers, completion / answers, answers)


def least_minutes(limits: Limits, rows: int, size: Size, day_left_s: float) -> tuple[float, Limit] | None:
    """How long so many rows take at least, and the limit that makes it so; None where no limit does."""
    times = [(max(0.0, (rows - ONE) / pace.rows - MOST_BURST_S / 60), pace.limit) for pace in _a_minute(limits, size)]
    if limits.requests_per_day is not None:
        days = daily.least_s(rows, limits.requests_per_day, day_left_s) / 60
        times += [(days, Limit.REQUESTS_PER_DAY)] if days else []
    return max(times, key=lambda time: time[0], default=None)


def most_rows(limits: Limits, within_s: float, size: Size, day_requests: int | None) -> Allowance | None:
    """How many rows can be done within that time, `day_requests` by what the days allow; None where no limit is set."""
    time_s = within_s + MOST_BURST_S
    allowed = [msgspec.structs.replace(pace, rows=pace.rows / 60 * time_s + ONE) for pace in _a_minute(limits, size)]
    if limits.requests_per_day is not None and day_requests is not None:
        words = f"{limits.requests_per_day:,} requests a day"
        allowed.append(Allowance(Limit.REQUESTS_PER_DAY, day_requests, words))
    return min(allowed, key=lambda allowance: allowance.rows, default=None)


def _a_minute(limits: Limits, size: Size) -> Iterator[Allowance]:
    """What each limit allows in a minute, but for that of a day."""
    prompt, completion = size.prompt_tokens, size.completion_tokens
    table = (
        (Limit.REQUESTS, limits.requests_per_minute, 1.0, 1.0, "requests a minute"),
        (Limit.REQUESTS_PER_SECOND, limits.requests_per_second, 60.0, 1.0, "requests a second"),
        (Limit.TOKENS, limits.tokens_per_minute, 1.0, prompt + completion, "tokens a minute"),
        (Limit.INPUT_TOKENS, limits.input_tokens_per_minute, 1.0, prompt, "input tokens a minute"),
        (Limit.OUTPUT_TOKENS, limits.output_tokens_per_minute, 1.0, completion, "output tokens a minute"),
    )
    for limit, told, times_a_minute, of_a_row, words in table:
        if told is not None and of_a_row:
            yield Allowance(limit, told * times_a_minute / of_a_row, f"{told:,g} {words}", "tokens" in words)
