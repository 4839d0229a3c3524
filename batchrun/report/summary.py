"""`summary.json`, from the first second to the last, and the same in words a person reads in five seconds. PURE."""

import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import msgspec

from batchrun.errors import CheckpointError, InputError
from batchrun.limits.admission import Binding, Limit
from batchrun.limits.deadline import Deadline
from batchrun.limits.forecast import Forecast
from batchrun.prices import PICO, PriceTable
from batchrun.records import FAILURES, Estimate, InForce, PossiblyBilled, Retrying, Status, Summary, Tuned
from batchrun.report.cures import Cure, cure_of
from batchrun.report.cures import command as commands
from batchrun.response.finish_reasons import Meaning, meaning_of
from batchrun.store.manifest import Manifest
from batchrun.store.rundir import RunDirectory
from batchrun.store.totals import LOST, Totals

VERSION = 3
"""The schema of summary.json; docs/output.md describes it. A field that goes or changes its meaning raises this."""

FIRST_S = 5.0
"""Before so much of a start was seen, nothing is said of its end: few requests are in flight yet, and answers to the
first ones come all at once."""

RATE_S = 60.0
"""A start that took less has no rate per minute that is worth the name: see `_rate`."""


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
    unknown_finish_reasons: tuple[str, ...] = ()
    unpriced_tiers: tuple[str, ...] = ()
    example_error: str | None = None
    command: str | None = None
    retrying: Retrying | None = None
    tags: dict[str, str] = {}

    @property
    def eta(self) -> datetime | None:
        """When every row will be settled; None where nobody can say."""
        if self.forecast is None or self.forecast.done_in_s is None or self.forecast.seen_s < FIRST_S:
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
    try:
        summary = msgspec.json.decode(directory.summary.read_bytes(), type=Summary)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{directory.path}: no run here (no summary.json)") from error
    except OSError as error:
        raise InputError(f"{directory.summary}: can't be read: {error.strerror}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{directory.summary}: damaged, or of another version of batchrun ({error}); the same command as before "
            "writes it again, and batchrun verify looks at the rest"
        ) from error
    if summary.version != VERSION:
        raise CheckpointError(f"{directory.summary}: of another version of batchrun (schema {summary.version})")
    return summary


_ACCOUNT = (
    *("job", "run_id", "begun_at", "rows", "rejected", "by_status", "pending", "totals", "cost_usd", "wasted_usd"),
    *("unpriced", "without_usage", "possibly_billed", "possibly_billed_count", "possibly_billed_usd", "models"),
    *("unknown_finish_reasons", "unpriced_tiers", "example_error", "price", "estimate", "invocation"),
    *("reused", "duplicates", "saved_usd"),
)
"""What a summary says of the run, whichever start says it."""

_KEPT = ("unknown_finish_reasons", "unpriced_tiers", "example_error", "price", "estimate")
"""The part of it that the checkpoint does not know."""


def starting(
    job: str, moment: Moment, directory: RunDirectory, earlier: Summary | None, spent: Totals | None
) -> Summary:
    """The summary of a start that has not read its input yet, and may be refused: the run's account is what it was.

    `earlier` is what the last start left, `spent` the account once the checkpoint is open.
    """
    if earlier is None:
        return _summary(job, "", moment.started_at, 0, 0, {}, Totals(), moment, directory, None)
    account = spent or Totals()
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
    kept = _ACCOUNT if spent is None else _KEPT
    return msgspec.structs.replace(now, **{name: getattr(earlier, name) for name in kept})


def summarise(
    facts: Manifest,
    rows: int,
    tables: dict[str, PriceTable | None],
    spent: Totals,
    moment: Moment,
    directory: RunDirectory,
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
    spent: Totals,
    moment: Moment,
    directory: RunDirectory,
    estimate: Estimate | None,
) -> Summary:
    settled = spent.settled()
    lines = spent.lines()
    mine = [line for line in spent.totals.values() if line.invocation == moment.invocation]
    minutes = max(moment.elapsed_s, 1e-9) / 60
    names = prices_in_words(tables)
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
        unknown_finish_reasons=list(moment.unknown_finish_reasons),
        unpriced_tiers=list(moment.unpriced_tiers),
        example_error=moment.example_error,
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
        command=moment.command,
        files=files(directory) if moment.complete else files_so_far(directory, moment.started_at),
        retrying=moment.retrying,
        tags=moment.tags,
        reused=sum(line.reused for line in lines),
        duplicates=sum(line.duplicates for line in lines),
        saved_usd=sum((line.saved_usd for line in lines), Decimal(0)),
    )


def files(directory: RunDirectory) -> dict[str, str]:
    """Where a complete run's files are."""
    result = directory.completions if directory.completions.exists() else directory.completions_folder
    return {"completions": str(result), "usage": str(directory.usage)}


def files_so_far(directory: RunDirectory, since: datetime) -> dict[str, str]:
    """What this start, begun at `since`, left to read of a run that is not complete."""
    there = {"partial": directory.partial, "usage": directory.usage}
    return {name: str(path) for name, path in there.items() if path.exists() and _written_at(path) >= since}


def _written_at(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)


def failures(summary: Summary, failing: Collection[Status] = FAILURES) -> int:
    """Rows that count against `max_failures`."""
    return sum(summary.by_status.get(str(status), 0) for status in failing)


def limiting_factor(binding: Binding, wall_offset_s: float) -> str:
    """The binding limit in the progress line's words; `wall_offset_s` makes wall time of the gate's clock."""
    if binding.limit is Limit.COOLING and binding.until_s is not None:
        until = datetime.fromtimestamp(binding.until_s + wall_offset_s).astimezone()
        return f"{binding.limit} ({binding.because}) till {until:%H:%M:%S}"
    return str(binding.limit)


def retrying_in_words(retrying: Retrying) -> str:
    """Which rows are retried, how often they were sent, and for what."""
    more = "…" if retrying.rows > len(retrying.first) else ""
    rows = f"{plural(retrying.rows, 'row')} ({', '.join(map(str, retrying.first))}{more})"
    reasons = ", ".join(f"{reason} ({count:,})" for reason, count in retrying.reasons.items())
    times = "once" if retrying.attempts == 1 else f"up to {retrying.attempts:,} times"
    return f"{rows}, sent {times} so far: {reasons}"


def waiting_to_retry(retrying: Retrying) -> str:
    """What a run waits for in which nothing is left but retries, in the progress line's words."""
    status, _, kind = next(iter(retrying.reasons)).partition(" ")
    reason = status if status.isdigit() else f"{status} {kind}".rstrip()
    till = "" if retrying.next_at is None else f" till {retrying.next_at.astimezone():%H:%M:%S}"
    return f"retries ({reason}){till}"


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
    command: Sequence[str] = (),
    settings: Collection[str] | None = None,
) -> Iterator[str]:
    """The closing lines: rows by status, tokens, cost, rate against the limit, files, and what to do next.

    `command` is the command line that was run, where there was one: the next one is made of it. `settings` are the
    paths that the job sets in `[request]`: what the rows bring themselves, no setting cures.
    """
    next_steps = _next_steps(summary, max_failures, failing, command, settings)
    for label, text in (*_closing(summary, requests_per_minute), *next_steps):
        yield f"{label:<13}{text}"


def reused_in_words(summary: Summary) -> str:
    """The rows that took their answer without a request, and what it cost when it was paid for."""
    copies = f", {summary.duplicates:,} of them equal to an earlier row" if summary.duplicates else ""
    saved = f"; ${summary.saved_usd:,.6f} saved" if summary.saved_usd else ""
    return f"{plural(summary.reused, 'row')} without a request{copies}{saved}"


def _closing(summary: Summary, requests_per_minute: float | None) -> Iterator[tuple[str, str]]:
    done = summary.rows - summary.pending
    counts = ", ".join(f"{n:,} {status}" for status, n in summary.by_status.items()) or "none"
    aside = f"; {plural(summary.rejected, 'input record')} set aside in rejects.jsonl" if summary.rejected else ""
    yield "rows", f"{done:,} of {summary.rows:,} done: {counts}{aside}"
    if summary.reused:
        yield "reused", reused_in_words(summary)
    prompt, cached, completion, reasoning = (
        sum(getattr(line, name) for line in summary.totals)
        for name in ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens")
    )
    of_them = f" ({cached:,} cached)" if cached else ""  # no answer may have said anything about a cache
    thought = f" ({reasoning:,} reasoning)" if reasoning else ""
    yield "tokens", f"{prompt:,} in{of_them}, {completion:,} out{thought}"
    cost, *doubts = _cost(summary)
    yield "cost", cost
    for line in (*doubts, *(summary.price or "").split("; ")):
        if line:
            yield "", line
    if (estimated := estimate_in_words(summary)) is not None:
        yield "estimate", estimated
    yield "rate", _rate(summary, requests_per_minute)
    for name, rows in summary.models.items():
        if all(line.model != name for line in summary.totals):
            yield "note", f"{plural(rows, 'answer')} {'names' if rows == 1 else 'name'} the model {name}"
    for reason in summary.unknown_finish_reasons:
        yield "note", unknown_reason(reason)
    yield from summary.files.items()


def unknown_reason(reason: str) -> str:
    """What a finish_reason that batchrun does not know means for the answers that ended so."""
    said = f"answers ended with the finish_reason {reason!r}, which batchrun does not know"
    match meaning_of(reason):
        case Meaning.OTHER:
            return f"{said}: finish.other decides on them"
        case Meaning.FAILURE:
            return f"{said} and takes for a failure by its words: they are retried"
        case meaning:
            return f"{said} and takes for {meaning.value} by its words: finish.{meaning.value} decides on them"


def unpriced_tier(tier: str) -> str:
    """What a service tier without a known price means for the answers that came from it, and what to do."""
    return (
        f"answers came from the service tier {tier!r}, of which no price is known, though the model's is: "
        'cost_usd is null for them; a price in [pricing."MODEL"] is for every tier'
    )


def _rate(summary: Summary, requests_per_minute: float | None) -> str:
    """What this start sent, against the limit; as a rate only where it sent for long enough to have one.

    Over a few seconds the burst that a limit allows would read as the limit broken: 348 requests in 10 s are 2,087 a
    minute, and within 1,500 a minute if the first of them went at once.
    """
    allowed = f"{_rounded(float(requests_per_minute)):,}" if requests_per_minute else ""
    if summary.elapsed_s < RATE_S:
        sent = plural(round(summary.requests_per_minute * summary.elapsed_s / 60), "request")
        tokens = plural(round(summary.tokens_per_minute * summary.elapsed_s / 60), "token")
        limit = f" ({allowed} requests/min allowed)" if allowed else ""
        return f"{sent}, {tokens} in {summary.elapsed_s:,.1f} s{limit}"
    limit = f" of {allowed} allowed" if allowed else ""
    if requests_per_minute and summary.requests_per_minute > requests_per_minute:
        changed = summary.tuned is not None and summary.tuned.refused is None
        limit = f" ({allowed} allowed" + (", changed meanwhile)" if changed else " after the first burst)")
    requests = f"{summary.requests_per_minute:,.0f} requests/min{limit}"
    return f"{requests}, {summary.tokens_per_minute:,.0f} tokens/min, {summary.elapsed_s:,.1f} s"


def pace(summary: Summary) -> str:
    """How fast this start settles rows; as a rate only where it worked for long enough to have one."""
    if summary.elapsed_s >= RATE_S:
        return f"{summary.rows_per_minute:,.0f} rows/min"
    rows = sum(line.rows for line in summary.totals if line.invocation == summary.invocation)
    return f"{plural(rows, 'row')} in {summary.elapsed_s:,.0f} s"


def prices_in_words(tables: Mapping[str, PriceTable | None]) -> list[str]:
    """The price of each model."""
    return [f"{model}: no known price" if table is None else table.describe() for model, table in tables.items()]


def known_cost(cost_usd: Decimal, unknown: int) -> Decimal | None:
    """A sum of what had a price; None where nothing had one: what nobody knows is not free.

    `unknown` counts the attempts whose price, or whose usage, is unknown.
    """
    return None if unknown and not cost_usd else cost_usd


def headline_usd(summary: Summary, form: str = ",.6f") -> str:
    """The bill so far as every line shows it."""
    cost_usd = known_cost(summary.cost_usd, summary.unpriced + summary.without_usage)
    return "unknown" if cost_usd is None else f"${cost_usd:{form}}"


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
    parts = [headline_usd(summary)]
    if summary.wasted_usd:
        parts.append(f"${summary.wasted_usd:,.6f} of it for answers that are not in the output")
    if summary.possibly_billed_count:
        parts.append(
            f"possibly billed beyond that: {plural(summary.possibly_billed_count, 'attempt')} without a known end, "
            f"{_at_most(summary)}"
        )
    if lost := sum(line.attempts for line in summary.totals if line.status == LOST):
        parts.append(lost_in_words(lost))
    if reported := sum((line.reported_cost_usd for line in summary.totals), Decimal(0)):
        parts.append(f"${reported:,.6f} by what the server itself states")
    if summary.unpriced:
        tiers = f" (none for the service tier {', '.join(summary.unpriced_tiers)})" if summary.unpriced_tiers else ""
        parts.append(f"no known price for {plural(summary.unpriced, 'attempt')}{tiers}, which no sum holds")
    if summary.without_usage:
        parts.append(f"{plural(summary.without_usage, 'answer')} came without usage")
    return parts


def _at_most(summary: Summary) -> str:
    return at_most(summary.possibly_billed_usd, summary.possibly_billed)


def at_most(possibly_billed_usd: Decimal, doubts: Iterable[PossiblyBilled]) -> str:
    """The bound of what may have been billed; attempts at an unknown price have none."""
    if all(doubt.upper_bound_usd is not None for doubt in doubts):
        return f"at most ${possibly_billed_usd:,.6f}"
    if not possibly_billed_usd:
        return "at a price that is not known"
    return f"at most ${possibly_billed_usd:,.6f} for those whose price is known"


def lost_in_words(attempts: int) -> str:
    """Why more attempts were made than ended."""
    return f"lost, as the process died or was stopped at once: {plural(attempts, 'attempt')} of those"


def _next_steps(
    summary: Summary,
    max_failures: int,
    failing: Collection[Status],
    command: Sequence[str],
    settings: Collection[str] | None,
) -> Iterator[tuple[str, str]]:
    failed = failures(summary, failing)
    cure = None if summary.example_error is None else cure_of(summary.example_error, settings)
    if summary.complete and failed:
        verdict = "more than" if failed > max_failures else "within"
        allowed = f"{verdict} output.max_failures = {max_failures:,}"
        them = "it" if failed == 1 else "them"
        yield "failed", f"{plural(failed, 'row')}, {allowed}: see the column `error`; --retry-failed asks {them} again"
        if summary.example_error is not None and summary.by_status.get(Status.ERROR):
            yield "", f"for example: {summary.example_error}"
            if cure is not None:
                yield from _cured(cure, command, retry=True)
    if not summary.complete:
        left = f"{plural(summary.pending, 'row')} {are(summary.pending)} left"
        yield "stopped", summary.reason or "before the end"
        if cure is not None and summary.example_error is not None and summary.example_error in (summary.reason or ""):
            yield from _cured(cure, command, retry=False)
        else:
            yield "next", f"{left}; the same command goes on where this stopped"
    if not summary.complete and summary.by_status and "partial" not in summary.files and "usage" in summary.files:
        yield "rows so far", f"batchrun export {shlex.quote(str(Path(summary.files['usage']).parent))}"


def _cured(cure: Cure, command: Sequence[str], *, retry: bool) -> Iterator[tuple[str, str]]:
    """The setting that cures what the server refuses, and the command that tries it."""
    yield "cure", f"{cure.setting}: {cure.what}"
    if cure.flags and command:
        yield "next", shlex.join(commands(command, cure, retry=retry))
    elif cure.flags:
        yield "next", f"the same with {shlex.join(commands((), cure, retry=retry))}"
    else:
        flag = "--retry-failed" if retry else "--accept-changes"
        yield "next", f"change it there; then the same command, with {flag}"


def age_in_words(age_s: float) -> str:
    """An age in the largest unit that it has one of."""
    for unit, size_s in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if age_s >= size_s:
            return f"{age_s // size_s:.0f} {unit}"
    return f"{max(0, int(age_s))} s"


def plural(count: int, noun: str) -> str:
    """ "1 file", "2 files"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def are(count: int) -> str:
    """The verb behind `plural`."""
    return "is" if count == 1 else "are"
