"""`summary.json`, from the first second to the last, and the same in words a person reads in five seconds. PURE."""

from collections.abc import Collection, Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import msgspec

from batchrun.checkpoint.facts import Facts
from batchrun.checkpoint.spent import Spent
from batchrun.errors import CheckpointError, InputError
from batchrun.gate.admission import Binding, Limit
from batchrun.gate.deadline import Deadline
from batchrun.gate.forecast import Forecast
from batchrun.prices import PICO, PriceTable
from batchrun.records import FAILURES, Estimate, InForce, Status, Summary, Tuned
from batchrun.rundir import RunDirectory

VERSION = 3
"""The schema of summary.json; docs/output.md describes it. A field that goes or changes its meaning raises this."""


class Moment(msgspec.Struct, frozen=True):
    """Where the run stands besides its account. Times are wall time, but for `now_s`, which is `now` on the machine's
    clock; `elapsed_s` and `sent` are this invocation's.
    """

    state: str
    invocation: int
    started_at: datetime
    now: datetime
    elapsed_s: float
    sent: int
    limited_by: str
    pid: int
    host: str
    exit_code: int | None = None
    reason: str | None = None
    complete: bool = False
    forecast: Forecast | None = None
    deadline: Deadline | None = None
    now_s: float = 0.0
    limits: InForce | None = None
    tuned: Tuned | None = None

    @property
    def eta(self) -> datetime | None:
        """When every row will be settled; None where nobody can say."""
        if self.forecast is None or self.forecast.done_in_s is None:
            return None
        return self.now + timedelta(seconds=round(self.forecast.done_in_s))

    def by_deadline(self, settled: int, rows: int) -> float | None:
        """The share of the rows that will be settled by the deadline."""
        if self.forecast is None or self.deadline is None:
            return None
        return round(self.forecast.share_by(self.deadline.at_s - self.now_s, settled, rows), 4)


def read(directory: RunDirectory) -> Summary:
    """The summary of the run in the directory.

    Raises:
        InputError: there is no run.
        CheckpointError: damaged, or of another version.
    """
    if directory.read_summary() is None:
        raise InputError(f"{directory.path}: no run here (no summary.json)")
    try:
        summary = msgspec.json.decode(directory.summary.read_bytes(), type=Summary)
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{directory.summary}: damaged, or of another version of batchrun: {error}") from error
    if summary.version != VERSION:
        raise CheckpointError(f"{directory.summary}: of another version of batchrun (schema {summary.version})")
    return summary


_ACCOUNT = (
    *("job", "run_id", "begun_at", "rows", "rejected", "by_status", "pending", "totals", "cost_usd", "wasted_usd"),
    *("unpriced", "without_usage", "possibly_billed", "possibly_billed_count", "possibly_billed_usd", "models"),
    *("price", "estimate", "invocation"),
)
"""What a summary says of the run, whichever start says it."""


def starting(
    job: str, moment: Moment, directory: RunDirectory, earlier: Summary | None, spent: Spent | None
) -> Summary:
    """The summary of a start that has not read its input yet, and may be refused: the run's account is what it was.

    `earlier` is what the last start left, `spent` the account once the checkpoint is open.
    """
    if earlier is None:
        return _summary(job, "", moment.started_at, 0, 0, {}, Spent(), moment, directory, None)
    account = spent or Spent()
    now = _summary(
        earlier.job,
        earlier.run_id,
        earlier.begun_at,
        earlier.rows,
        earlier.rejected,
        {},
        account,
        moment,
        directory,
        None,
    )
    kept = _ACCOUNT if spent is None else ("price", "estimate")
    return msgspec.structs.replace(now, **{name: getattr(earlier, name) for name in kept})


def summarise(
    facts: Facts, rows: int, tables: dict[str, PriceTable | None], spent: Spent, moment: Moment, directory: RunDirectory
) -> Summary:
    """What is known of the run now: everything in it is durable."""
    rejected = len(facts.rejected)
    estimate = None if facts.estimate is None else scaled(facts.estimate, rows)
    return _summary(facts.job, facts.run_id, facts.begun_at, rows, rejected, tables, spent, moment, directory, estimate)


def scaled(estimate: Estimate, rows: int) -> Estimate:
    """The estimate for that many of its rows."""
    if rows == estimate.rows or not estimate.rows:
        return estimate
    share = Decimal(rows) / estimate.rows
    usd = {name: getattr(estimate, name) for name in ("low_usd", "expected_usd", "high_usd")}
    return msgspec.structs.replace(
        estimate,
        rows=rows,
        prompt_tokens=round(estimate.prompt_tokens * share),
        completion_tokens=round(estimate.completion_tokens * share),
        minutes=None if estimate.minutes is None else estimate.minutes * float(share),
        **{name: None if known is None else (known * share).quantize(PICO) for name, known in usd.items()},
    )


def _summary(
    job: str,
    run_id: str,
    begun_at: datetime,
    rows: int,
    rejected: int,
    tables: dict[str, PriceTable | None],
    spent: Spent,
    moment: Moment,
    directory: RunDirectory,
    estimate: Estimate | None,
) -> Summary:
    settled = spent.settled()
    lines = spent.lines()
    mine = [line for line in spent.totals.values() if line.invocation == moment.invocation]
    minutes = max(moment.elapsed_s, 1e-9) / 60
    names = [table.describe() for table in tables.values() if table is not None]
    return Summary(
        version=VERSION,
        job=job,
        run_id=run_id,
        state=moment.state,
        exit_code=moment.exit_code,
        reason=moment.reason,
        complete=moment.complete,
        rows=rows,
        rows_in_output=settled if moment.complete else 0,
        rejected=rejected,
        by_status={str(status): n for status in Status if (n := spent.standing.get(status, 0))},
        pending=rows - settled,
        totals=lines,
        cost_usd=spent.cost_usd(),
        wasted_usd=spent.wasted_usd(),
        unpriced=sum(line.unpriced for line in lines),
        without_usage=sum(line.without_usage for line in lines),
        possibly_billed=list(spent.possibly_billed),
        possibly_billed_count=spent.possibly_billed_count,
        possibly_billed_usd=spent.possibly_billed_usd,
        models=spent.answered_as,
        price="; ".join(names) or None,
        estimate=estimate,
        invocation=moment.invocation,
        begun_at=begun_at,
        started_at=moment.started_at,
        updated_at=moment.now,
        elapsed_s=round(moment.elapsed_s, 3),
        rows_per_minute=round(sum(line.rows for line in mine) / minutes, 1),
        requests_per_minute=round(moment.sent / minutes, 1),
        tokens_per_minute=round(sum(line.total_tokens for line in mine) / minutes, 1),
        tokens_per_second=0.0 if moment.forecast is None else round(moment.forecast.tokens_per_s, 1),
        limited_by=moment.limited_by,
        limits=moment.limits,
        tuned=moment.tuned,
        eta=moment.eta,
        deadline=None if moment.deadline is None else moment.deadline.at.astimezone(UTC),
        by_deadline=moment.by_deadline(settled, rows),
        pid=moment.pid,
        host=moment.host,
        files=files(directory) if moment.complete else {},
    )


def files(directory: RunDirectory) -> dict[str, str]:
    """Where a complete run's files are."""
    result = directory.completions if directory.completions.exists() else directory.completions_folder
    return {"completions": str(result), "usage": str(directory.usage)}


def failures(summary: Summary, failing: Collection[Status] = FAILURES) -> int:
    """Rows that count against `max_failures`."""
    return sum(summary.by_status.get(str(status), 0) for status in failing)


def limiting_factor(binding: Binding, wall_offset_s: float) -> str:
    """The binding limit in the progress line's words; `wall_offset_s` makes wall time of the gate's clock."""
    if binding.limit is Limit.COOLING and binding.until_s is not None:
        until = datetime.fromtimestamp(binding.until_s + wall_offset_s).astimezone()
        return f"{binding.limit} ({binding.because}) till {until:%H:%M:%S}"
    return str(binding.limit)


def limits_in_words(limits: InForce) -> str:
    """The limits that hold now."""
    told: tuple[tuple[float | Decimal | None, str], ...] = (
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
    return ", ".join(form.format(_rounded(limit)) for limit, form in told if limit is not None)


def _rounded(limit: float | Decimal) -> float | Decimal:
    """A rate in whole numbers, but for one so low that they would say little of it."""
    if not isinstance(limit, float):
        return limit
    return round(limit) if limit >= 10 or limit.is_integer() else round(limit, 3)


def in_words(
    summary: Summary,
    *,
    requests_per_minute: float | None,
    max_failures: int,
    failing: Collection[Status] = FAILURES,
) -> Iterator[str]:
    """The closing lines: rows by status, tokens, cost, rate against the limit, files, and what to do next."""
    for label, text in (*_closing(summary, requests_per_minute), *_next_steps(summary, max_failures, failing)):
        yield f"{label:<13}{text}"


def _closing(summary: Summary, requests_per_minute: float | None) -> Iterator[tuple[str, str]]:
    done = summary.rows - summary.pending
    counts = ", ".join(f"{n:,} {status}" for status, n in summary.by_status.items()) or "none"
    aside = f"; {plural(summary.rejected, 'input record')} set aside in rejects.jsonl" if summary.rejected else ""
    yield "rows", f"{done:,} of {summary.rows:,} done: {counts}{aside}"
    prompt, cached, completion, reasoning = (
        sum(getattr(line, name) for line in summary.totals)
        for name in ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens")
    )
    yield "tokens", f"{prompt:,} in ({cached:,} cached), {completion:,} out ({reasoning:,} reasoning)"
    cost, *doubts = _cost(summary)
    yield "cost", cost
    for line in (*doubts, *(summary.price or "").split("; ")):
        if line:
            yield "", line
    if (estimated := estimate_in_words(summary)) is not None:
        yield "estimate", estimated
    limit = f" of {requests_per_minute:,.0f} allowed" if requests_per_minute else ""
    requests = f"{summary.requests_per_minute:,.0f} requests/min{limit}"
    yield "rate", f"{requests}, {summary.tokens_per_minute:,.0f} tokens/min, {summary.elapsed_s:,.1f} s"
    for name, rows in summary.models.items():
        if all(line.model != name for line in summary.totals):
            yield "note", f"{rows:,} answers name the model {name}"
    yield from summary.files.items()


def known_cost(cost_usd: Decimal, unpriced: int) -> Decimal | None:
    """A sum of what had a price; None where nothing had one: what nobody knows is not free."""
    return None if unpriced and not cost_usd else cost_usd


def cost_in_words(summary: Summary) -> str:
    """The bill in one line, with what it does not cover."""
    return "; ".join(_cost(summary))


def estimate_in_words(summary: Summary) -> str | None:
    """What the run was estimated to cost before its first request, beside what the same rows did cost."""
    if (estimate := summary.estimate) is None:
        return None
    done, rows = summary.rows - summary.pending, plural(estimate.rows, "row")
    if estimate.expected_usd is None:
        return f"{estimate.prompt_tokens:,} tokens in and {estimate.completion_tokens:,} out for {rows}"
    said = f"${estimate.expected_usd:,.6f} for {rows}"
    expected_usd = scaled(estimate, done).expected_usd or Decimal(0)
    if not done or not expected_usd or summary.unpriced or summary.without_usage:
        return said  # beside a cost that is known in part there is nothing to compare
    beside = f", ${expected_usd:,.6f} for the {done:,} done" if summary.pending else ""
    off = (summary.cost_usd / expected_usd - 1) * 100
    return f"{said}{beside}; the cost is {abs(off):.0f} % {'above' if off >= 0 else 'below'} that"


def _cost(summary: Summary) -> list[str]:
    """The bill, and each thing that it does not cover."""
    cost_usd = known_cost(summary.cost_usd, summary.unpriced)
    parts = ["unknown" if cost_usd is None else f"${cost_usd:,.6f}"]
    if summary.wasted_usd:
        parts.append(f"${summary.wasted_usd:,.6f} of it for answers that are not in the output")
    if summary.possibly_billed_count:
        parts.append(
            f"possibly billed beyond that: {plural(summary.possibly_billed_count, 'attempt')} without a known end, "
            f"at most ${summary.possibly_billed_usd:,.6f}"
        )
    if summary.unpriced:
        parts.append(f"no known price for {plural(summary.unpriced, 'attempt')}, which no sum holds")
    if summary.without_usage:
        parts.append(f"{plural(summary.without_usage, 'answer')} came without usage")
    return parts


def _next_steps(summary: Summary, max_failures: int, failing: Collection[Status]) -> Iterator[tuple[str, str]]:
    failed = failures(summary, failing)
    if summary.complete and failed:
        verdict = "more than" if failed > max_failures else "within"
        allowed = f"{verdict} output.max_failures = {max_failures:,}"
        yield "failed", f"{plural(failed, 'row')}, {allowed}: see the column `error`; --retry-failed asks them again"
    if not summary.complete:
        yield "stopped", summary.reason or "before the end"
        yield "next", f"{summary.pending:,} rows are left; the same command goes on where this stopped"


def plural(count: int, noun: str) -> str:
    """ "1 file", "2 files"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
