"""What a run, or the rest of one, will take: tokens, money, time. PURE; guesses are bracketed by bounds.

low         prompts of as few tokens as their bytes can hold, answers of one
expected    the mean of the answers so far; before there are any, usual ratios
high        the upper bounds that a budget reserves: no bill can be larger, retries apart
"""

from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal

import msgspec

from batchrun import prices
from batchrun.gate import capacity
from batchrun.gate.admission import Limit
from batchrun.gate.capacity import Size
from batchrun.job.job import Budget, Job
from batchrun.plan.check import Survey
from batchrun.prices import PriceTable
from batchrun.records import Summary, Usage
from batchrun.report.summary import failures, headline_usd, plural

FEWEST_TOKENS_PER_BYTE = 0.18  # long common words; prose of one language has about 0.23
USUAL_TOKENS_PER_BYTE = 0.3
USUAL_ANSWER_TOKENS = 300


class Estimate(msgspec.Struct, frozen=True):
    """`rows` to ask, and what they take; USD are None where a price is unknown. `basis`: what `expected` rests on;
    `short`: the caps of the budget that are less than that, in words.
    """

    rows: int
    prompt_tokens: int
    completion_tokens: int
    low_usd: Decimal | None
    expected_usd: Decimal | None
    high_usd: Decimal | None
    minutes: float | None
    limited_by: str
    basis: str
    short: tuple[str, ...] = ()


def estimate(
    found: Survey,
    job: Job,
    tables: Mapping[str, PriceTable | None],
    to_ask: int,
    done: Summary | None,
    day_left_s: float = 0.0,
) -> Estimate:
    """The estimate for `to_ask` of the survey's rows, learning from what the run has done already.

    `day_left_s`: until the day of `limits.requests_per_day` ends.
    """
    share = to_ask / found.rows if found.rows else 0.0
    prompt, completion, basis = _means(found, job, done)
    tokens = (prompt + completion) * to_ask
    time = capacity.least_minutes(job.limits, to_ask, Size(prompt, completion), day_left_s)
    expected = _cost(
        found, tables, share, lambda model: (prompt * found.models[model], completion * found.models[model])
    )
    low = _cost(
        found, tables, share, lambda model: (FEWEST_TOKENS_PER_BYTE * _bytes(found, model), found.models[model])
    )
    high = _bound(found, tables, to_ask, prices.tier_of_job(job.request.extra))
    return Estimate(
        rows=to_ask,
        prompt_tokens=round(prompt * to_ask),
        completion_tokens=round(completion * to_ask),
        low_usd=low,
        expected_usd=expected,
        high_usd=high,
        minutes=None if time is None else time[0],
        limited_by=str(Limit.LATENCY if time is None else time[1]),
        basis=basis,
        short=tuple(_short(job.budget, to_ask, tokens, expected, done)),
    )


def run_in_words(summary: Summary, drift: str | None) -> Iterator[str]:
    """What a run has so far: rows kept, failed and pending, and what changed."""
    failed = failures(summary)
    kept = summary.rows - summary.pending
    spent = headline_usd(summary, ",.4f")
    yield f"run          {kept:,} of {plural(summary.rows, 'row')} done, {spent} spent"
    if failed:
        yield f"failed       {plural(failed, 'row')}; --retry-failed asks {'it' if failed == 1 else 'them'} again"
    if drift is not None:
        yield f"changed      {drift}"


def in_words(estimated: Estimate, tables: Mapping[str, PriceTable | None], url: str = "") -> Iterator[str]:
    """The estimate as lines for people."""
    yield f"to ask       {plural(estimated.rows, 'row')}"
    yield (
        f"tokens       about {estimated.prompt_tokens:,} in, {estimated.completion_tokens:,} out ({estimated.basis})"
    )
    if estimated.expected_usd is None:
        yield 'cost         unknown: give the price in [pricing."MODEL"]'
    else:
        bounds = f"at least ${estimated.low_usd:,.4f}, at most ${estimated.high_usd:,.4f} without retries"
        yield f"cost         about ${estimated.expected_usd:,.4f}; {bounds}"
    for model, table in tables.items():
        if table is None:
            from batchrun import price_list  # here, because it takes 170 ms

            yield f"             {model}: {price_list.unknown_because(model, url)}"
        else:
            yield from (f"             {part}" for part in table.describe().split("; "))
    yield from (f"budget       {line}" for line in estimated.short)
    if estimated.minutes is None:
        yield "time         as fast as the endpoint answers: no limit of the job holds that many rows back"
    else:
        yield f"time         at least {duration(estimated.minutes)}, limited by {estimated.limited_by}"


def duration(minutes: float) -> str:
    """A time as people say it: never "0.0 min"."""
    seconds = 60 * minutes
    if seconds < 1:
        return "less than a second"
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes:,.1f} min" if minutes < 600 else f"{minutes / 60:,.1f} h"


def _bytes(found: Survey, model: str) -> float:
    return found.body_bytes * found.models[model] / found.rows


def _means(found: Survey, job: Job, done: Summary | None) -> tuple[float, float, str]:
    """(prompt tokens, completion tokens, basis) of one row."""
    size = Size() if done is None else capacity.size_of(done.totals)
    if size.answers:
        return (
            size.prompt_tokens,
            size.completion_tokens,
            "the one answer so far" if size.answers == 1 else f"the mean of {size.answers:,} answers",
        )
    tokens = USUAL_TOKENS_PER_BYTE * found.body_bytes + found.image_tokens
    prompt = tokens / found.rows if found.rows else 0.0
    images = ", 765 an image (85 of low detail)" if found.image_tokens else ""
    answer = min(job.request.max_tokens or USUAL_ANSWER_TOKENS, USUAL_ANSWER_TOKENS)
    return (
        prompt,
        answer,
        f"{USUAL_TOKENS_PER_BYTE} tokens a byte{images} and {answer} an answer; a pilot tells better: --limit 20",
    )


def _cost(
    found: Survey,
    tables: Mapping[str, PriceTable | None],
    share: float,
    tokens: Callable[[str], tuple[float, float]],
) -> Decimal | None:
    total = Decimal(0)
    for model, rows in found.models.items():
        table = tables.get(model)
        if table is None:
            return None
        prompt, completion = tokens(model)
        each = Usage(round(prompt / rows), round(completion / rows), 0)
        total += (prices.cost(each, table) or 0) * Decimal(rows * share)
    return total


def _bound(found: Survey, tables: Mapping[str, PriceTable | None], to_ask: int, tier: str | None) -> Decimal | None:
    """What any `to_ask` of the rows can cost at most: all of them, or that many of the largest."""
    whole = largest = Decimal(0)
    for model in found.models:
        fees = Decimal(0) if (table := tables.get(model)) is None else table.per_request * (found.models[model] - 1)
        all_of_them = prices.upper_bound(*found.max_tokens[model], tables.get(model), tier)
        one = prices.upper_bound(*found.max_request[model], tables.get(model), tier)
        if all_of_them is None or one is None:
            return None
        whole, largest = whole + all_of_them + fees, max(largest, one)
    return min(whole, largest * to_ask)


def _short(budget: Budget, rows: int, tokens: float, cost_usd: Decimal | None, done: Summary | None) -> Iterator[str]:
    """The caps that end the run before its last row, by what is expected and what the run has taken so far."""
    totals = done.totals if done is not None else []
    took_usd = done.cost_usd + done.possibly_billed_usd if done is not None else Decimal(0)
    if budget.max_cost_usd is not None and cost_usd is not None and took_usd + cost_usd > budget.max_cost_usd:
        yield f"max_cost_usd = {budget.max_cost_usd:,f} will end the run before its last row"
    if budget.max_tokens is not None and sum(line.total_tokens for line in totals) + tokens > budget.max_tokens:
        yield f"max_tokens = {budget.max_tokens:,} will end the run before its last row"
    if budget.max_requests is not None and sum(line.attempts for line in totals) + rows > budget.max_requests:
        yield f"max_requests = {budget.max_requests:,} will end the run before its last row"
