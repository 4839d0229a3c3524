"""Estimates the tokens, money and time of a run, or of the rest of one. PURE; guesses are bracketed by bounds.

low         prompts of as few tokens as their bytes can hold, answers of one
expected    the mean of the answers so far; before there are any, of the job's newest run; else usual ratios
high        the upper bounds that a budget reserves: no bill can be larger, retries apart
"""

from collections.abc import Iterator, Mapping
from decimal import Decimal

from batchrun import prices
from batchrun.job.job import Job
from batchrun.job.settings import Budget
from batchrun.limits import capacity
from batchrun.limits.admission import Limit
from batchrun.limits.capacity import Size
from batchrun.money import PICO, to_usd
from batchrun.price_list import lookup
from batchrun.prices import PriceTable
from batchrun.records import Usage
from batchrun.report.cost_lines import headline_usd
from batchrun.report.summary import failures
from batchrun.report.wording import plural
from batchrun.run_summary import Estimate, Summary
from batchrun.startup.changes import Changes
from batchrun.startup.input_check import Survey
from batchrun.startup.previous_run import Means, means_of

FEWEST_TOKENS_PER_BYTE = 0.18  # long common words; prose of one language has about 0.23
USUAL_TOKENS_PER_BYTE = 0.3  # a guess, above prose of one language
USUAL_ANSWER_TOKENS = 300  # a guess, and the estimate says so: --limit 20 measures it


def estimate(
    found: Survey,
    job: Job,
    tables: Mapping[str, PriceTable | None],
    to_send: int,
    done: Summary | None,
    day_left_s: float = 0.0,
    earlier: Means | None = None,
) -> Estimate:
    """The estimate for `to_send` of the survey's rows, by what the run has done already, else by an `earlier` one.

    `day_left_s`: until the day of `limits.requests_per_day` ends.
    """
    share = to_send / found.rows if found.rows else 0.0
    mean = (None if done is None else means_of(done, "this run")) or earlier or _usual(found, job)
    prompt, completion = mean.prompt_tokens, mean.completion_tokens
    tokens = (prompt + completion) * to_send
    limits = job.total_limits
    by_limits = capacity.least_minutes(limits, to_send, Size(prompt, completion), day_left_s)
    times = [] if by_limits is None else [by_limits]
    if mean.latency_s is not None:
        times.append((mean.latency_s * to_send / limits.max_in_flight / 60, Limit.LATENCY))
    minutes, limit = max(times, key=lambda time: time[0], default=(None, Limit.LATENCY))
    tier = job.request.service_tier
    if (each := mean.cost_by(tables)) is not None:  # prices are as they were then
        expected: Decimal | None = (each * to_send).quantize(PICO)
    else:
        usual = Usage(round(prompt), round(completion), 0, round(prompt * mean.cached_share))
        expected = _cost(found, tables, share, usual, tier)
    basis = [mean.basis]
    if mean.cached_share:
        basis.append(f"{mean.cached_share:.0%} of the prompts cached")
    if mean.cost_usd is not None:
        basis.append(f"${mean.cost_usd:,.6f} a row")
    if mean.latency_s is not None:
        basis.append(f"{mean.latency_s:,.2f} s an answer")
    fewest = FEWEST_TOKENS_PER_BYTE * found.body_bytes / found.rows if found.rows else 0.0
    return Estimate(
        rows=to_send,
        prompt_tokens=round(prompt * to_send),
        completion_tokens=round(completion * to_send),
        low_usd=_cost(found, tables, share, Usage(round(fewest), 1, 0), tier),
        expected_usd=expected,
        high_usd=_bound(found, tables, to_send, job.service_tiers),
        minutes=minutes,
        limited_by=str(limit),
        basis=", ".join(basis),
        short=tuple(_short(job.budget, to_send, tokens, expected, done)),
    )


def run_in_words(summary: Summary, changes: Changes | None) -> Iterator[str]:
    """The run so far: rows kept, failed and pending, and the changes."""
    failed = failures(summary)
    kept = summary.done
    spent = headline_usd(summary, ",.4f")
    yield f"run          {kept:,} of {plural(summary.rows, 'row')} done, {spent} spent"
    if failed:
        yield f"failed       {plural(failed, 'row')}; --retry-failed sends {'it' if failed == 1 else 'them'} again"
    if changes is not None:
        yield f"changed      {changes}"


def in_words(estimated: Estimate, tables: Mapping[str, PriceTable | None], url: str = "") -> Iterator[str]:
    """The estimate as lines for people."""
    yield f"to send      {plural(estimated.rows, 'row')}"
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
            yield f"             {model}: {lookup.unknown_because(model, url)}"
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


def _usual(found: Survey, job: Job) -> Means:
    """The means of a row before the first answer."""
    tokens = USUAL_TOKENS_PER_BYTE * found.body_bytes + found.image_tokens
    images = ", 765 an image (85 of low detail)" if found.image_tokens else ""
    answer = min(job.request.max_tokens or USUAL_ANSWER_TOKENS, USUAL_ANSWER_TOKENS)
    basis = f"{USUAL_TOKENS_PER_BYTE} tokens a byte{images} and {answer} an answer; --limit 20 measures both"
    return Means(basis, tokens / found.rows if found.rows else 0.0, answer, 0.0)


def _cost(
    found: Survey, tables: Mapping[str, PriceTable | None], share: float, each: Usage, service_tier: str | None
) -> Decimal | None:
    """The cost of a share of the rows in that tier, if `each` uses so much; None where a price is unknown."""
    total = Decimal(0)
    for model, rows in found.models.items():
        if (table := tables.get(model)) is None:
            return None
        tier = None if prices.lacks_tier(table, service_tier) else service_tier
        total += to_usd(prices.cost(each, table, tier) or 0) * Decimal(rows * share)
    return total


def _bound(
    found: Survey, tables: Mapping[str, PriceTable | None], to_send: int, tiers: tuple[str | None, ...]
) -> Decimal | None:
    """The most that any `to_send` of the rows can cost: all of them, or that many of the largest."""
    whole = largest = Decimal(0)
    for model in found.models:
        fees = Decimal(0) if (table := tables.get(model)) is None else table.per_request * (found.models[model] - 1)
        all_rows = prices.upper_bound(*found.max_tokens[model], tables.get(model), *tiers)
        one = prices.upper_bound(*found.max_request[model], tables.get(model), *tiers)
        if all_rows is None or one is None:
            return None
        whole, largest = whole + all_rows + fees, max(largest, one)
    return min(whole, largest * to_send)


def _short(budget: Budget, rows: int, tokens: float, cost_usd: Decimal | None, done: Summary | None) -> Iterator[str]:
    """The caps that end the run before its last row, by what is expected and what the run has taken so far."""
    totals = done.totals if done is not None else []
    spent_usd = done.cost_usd + done.possibly_billed_usd if done is not None else Decimal(0)
    if budget.max_cost_usd is not None and cost_usd is not None and spent_usd + cost_usd > budget.max_cost_usd:
        yield f"max_cost_usd = {budget.max_cost_usd:,f} will end the run before its last row"
    for name, cap in budget.caps_usd.items():
        if name != "max_cost_usd" and cost_usd is not None and cost_usd > cap:
            yield f"{name} = {cap:,f} will end a start before its last row"
    if budget.max_tokens is not None and sum(line.total_tokens for line in totals) + tokens > budget.max_tokens:
        yield f"max_tokens = {budget.max_tokens:,} will end the run before its last row"
    if budget.max_requests is not None and sum(line.attempts for line in totals) + rows > budget.max_requests:
        yield f"max_requests = {budget.max_requests:,} will end the run before its last row"
