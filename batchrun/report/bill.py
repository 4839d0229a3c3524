"""The bill over runs: the lines of their totals, summed by group. PURE, except that it reads the runs."""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any, NamedTuple

import msgspec

from batchrun.records import Status
from batchrun.report import days, earlier_runs, latencies, run_rows
from batchrun.report.cost_lines import up_to
from batchrun.report.earlier_runs import Against, Compared
from batchrun.report.figures import BillLine, added
from batchrun.report.findings import Finding
from batchrun.report.keys import OF_LINES, DaySpan, day_of, group
from batchrun.report.latencies import Scanned
from batchrun.report.runs import Account, FoundRun, LeftOut, Runs
from batchrun.report.summary import RATE_S
from batchrun.run_summary import TotalsLine
from batchrun.store.totals import DISCARDED, LOST

READERS = 2
"""Threads that read results; Arrow decodes without Python's lock."""


class WithoutUsage(msgspec.Struct, frozen=True):
    """A job's answers that came without usage, and their tokens by an offline count."""

    job: str
    answers: int
    offline_prompt_tokens: int
    offline_completion_tokens: int


class ExpectedCost(msgspec.Struct, frozen=True):
    """The estimated cost of complete runs before their first request, and their real cost."""

    runs: int
    expected_usd: Decimal
    cost_usd: Decimal


class Bill(msgspec.Struct, frozen=True):
    """The lines in the order of their groups, and their total. Beside them, what the total leaves out: possibly billed
    requests with their upper bound, answers without usage, attempts of unknown price by model, and files not counted.
    The total's attempts include the `lost` ones, which were in flight when a process died.

    `unread` counts the runs whose rows can't be read; no figure includes their latencies. `supposed` names the prices
    of a what-if bill.
    """

    by: tuple[str, ...]
    lines: tuple[BillLine, ...]
    total: BillLine
    runs: int
    possibly_billed: int
    possibly_billed_usd: Decimal
    possibly_billed_bound: str
    lost: int
    without_usage: tuple[WithoutUsage, ...]
    unpriced: dict[str, int]
    estimated: ExpectedCost | None
    left_out: tuple[LeftOut, ...]
    span: DaySpan = DaySpan()
    unread: int = 0
    unfinished: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    against: tuple[Compared, ...] = ()
    supposed: str | None = None

    @property
    def drifted(self) -> bool:
        """A figure is further from the earlier runs than their spread allows."""
        return any(each.jumped for each in self.against)


class CountedRun(NamedTuple):
    """A run, its lines within the span, and the latencies of its rows by the keys that `_scanned_by` chooses."""

    found: FoundRun
    lines: list[TotalsLine]
    scanned: Scanned | None


class Query(msgspec.Struct, frozen=True):
    """The options of a bill: `limits` adds findings by these thresholds, `against` a comparison with earlier runs."""

    by: tuple[str, ...] = ("job", "model")
    span: DaySpan = DaySpan()
    limits: Mapping[str, float] | None = None
    against: Against | None = None


def bill_of(found: Runs, query: Query) -> Bill:
    """The bill over runs that were found.

    Raises:
        InputError: `against` has nothing to compare with.
    """
    span = query.span
    bill = fold(counted(found.found, query.by, span), query.by, span, found.left_out)
    until = [each for each in found.found if not span.is_over(day_of(each.account.started_at, span.zone))]
    return msgspec.structs.replace(
        bill,
        findings=() if query.limits is None else tuple(earlier_runs.unusual(until, query.limits)),
        against=() if query.against is None else tuple(earlier_runs.compared(until, query.against)),
    )


def what_if(bill: Bill, prices: str, before_usd: Decimal, after_usd: Decimal, kept: Sequence[str] = ()) -> Bill:
    """The bill, marked as hypothetical: at `prices`, not at those that were paid. `kept` says what keeps its cost."""
    supposed = f"what if: at the prices of {prices} ${after_usd:,.6f}; paid were ${before_usd:,.6f}"
    return msgspec.structs.replace(bill, supposed="; ".join([supposed, *kept]))


def counted(found: Sequence[FoundRun], by: tuple[str, ...], span: DaySpan, *, rows: bool = True) -> list[CountedRun]:
    """The runs with lines within the span, in order."""
    with ThreadPoolExecutor(READERS) as pool:
        every = list(pool.map(functools.partial(_counted, by=by, span=span, rows=rows), found))
    ends = span.since is not None or span.until is not None
    return [each for each in every if each.lines or not ends]


def _counted(found: FoundRun, *, by: tuple[str, ...], span: DaySpan, rows: bool) -> CountedRun:
    began = day_of(found.account.started_at, span.zone)
    lines = [line for line in days.localised(found, span.zone) if span.holds(line.day, began)]
    if not rows:
        return CountedRun(found, lines, None)
    names = _scanned_by(by, span)
    scanned = run_rows.if_readable(found.place, lambda result: latencies.scan(result, names, span.zone))
    if scanned is not None and "day" in names:
        place = names.index("day")
        for values in [values for values in scanned if not span.holds(str(values[place]), began)]:
            del scanned[values]
    return CountedRun(found, lines, scanned)


def fold(every: Sequence[CountedRun], by: tuple[str, ...], span: DaySpan, left_out: tuple[LeftOut, ...]) -> Bill:
    """The bill over runs that were counted."""
    lines: dict[tuple[str, ...], BillLine] = {}
    total = BillLine(("total",))
    for each in every:
        whole = functools.reduce(added, map(_of_line, each.lines), BillLine(()))
        total = added(total, _of_run(whole, each))
        for place, part in _grouped(each, whole, by, span).items():
            lines[place] = added(lines.get(place) or _empty(place, by), part)
    accounts = [each.found.account for each in every]
    possibly_billed = sum(account.possibly_billed_count for account in accounts)
    possibly_usd = sum((account.possibly_billed_usd for account in accounts), Decimal(0))
    booked = [line for each in every for line in each.lines]
    unpriced: Counter[str] = Counter()
    for line in booked:
        unpriced[line.model] += line.unpriced
    without_usage = []
    for job in sorted({account.job for account in accounts}):
        of_job = [line for each in every if each.found.account.job == job for line in each.lines]
        if answers := sum(line.without_usage for line in of_job):
            prompt_tokens = sum(line.offline_prompt_tokens for line in of_job)
            completion_tokens = sum(line.offline_completion_tokens for line in of_job)
            without_usage.append(WithoutUsage(job, answers, prompt_tokens, completion_tokens))
    return Bill(
        by=by,
        lines=tuple(lines[place] for place in sorted(lines)),
        total=total,
        runs=len(every),
        possibly_billed=possibly_billed,
        possibly_billed_usd=possibly_usd,
        possibly_billed_bound=up_to(
            possibly_billed, possibly_usd, (doubt for account in accounts for doubt in account.possibly_billed)
        ),
        lost=sum(line.attempts for line in booked if line.status == LOST),
        without_usage=tuple(without_usage),
        unpriced={model: count for model, count in sorted(unpriced.items()) if count},
        estimated=_expected(accounts),
        left_out=left_out,
        span=span,
        unread=sum(each.scanned is None for each in every),
        unfinished=tuple(sorted(str(each.found.place) for each in every if not each.found.account.complete)),
    )


def _grouped(each: CountedRun, whole: BillLine, by: tuple[str, ...], span: DaySpan) -> dict[tuple[str, ...], BillLine]:
    """One run's lines by group. A group that holds the whole run also has the figures that only a whole run has."""
    if not OF_LINES & set(by):
        place = group(by, each.found, TotalsLine(0, "", ""), span.zone)
        return {place: msgspec.structs.replace(_of_run(whole, each), group=place)}
    empty = _empty((), by)
    parts = [(line, _of_line(line)) for line in each.lines]
    for values, buckets in (each.scanned or {}).items():
        value = dict(zip(_scanned_by(by, span), values, strict=True))
        model, status, day, tier = (
            str(value.get(key) or "") for key in ("requested_model", "status", "day", "service_tier")
        )
        parts.append((TotalsLine(0, model, status, day, tier), msgspec.structs.replace(empty, latencies=buckets)))
    lines: dict[tuple[str, ...], BillLine] = {}
    for line, figures in parts:
        place = group(by, each.found, line, span.zone)
        before = lines.get(place, msgspec.structs.replace(empty, group=place, runs=1))
        lines[place] = added(before, figures)
    return lines


def _empty(place: tuple[str, ...], by: tuple[str, ...]) -> BillLine:
    """An empty group. Figures of whole runs are None where groups divide runs."""
    if OF_LINES & set(by):
        return BillLine(place, complete=None, pending=None, possibly_billed=None, possibly_billed_usd=None)
    return BillLine(place)


_SAME = tuple(name for name in BillLine.__struct_fields__ if name in TotalsLine.__struct_fields__)
"""The sums that a line of a run's totals has, too."""


def _of_line(line: TotalsLine) -> BillLine:
    same: dict[str, Any] = {name: getattr(line, name) for name in _SAME}
    return BillLine(
        (),
        complete=None,
        pending=None,
        possibly_billed=None,
        possibly_billed_usd=None,
        ok=line.rows if line.status == Status.OK else 0,
        wasted_usd=line.cost_usd if line.status == DISCARDED else Decimal(0),
        **same,
    )


def _of_run(whole: BillLine, each: CountedRun) -> BillLine:
    """The run's sums, with the figures that only a whole run has."""
    account, scanned = each.found.account, each.scanned
    expected = _expected([account])
    used_s, limit_s = _limit(account)
    buckets: Counter[int] = sum((scanned or {}).values(), Counter())
    return msgspec.structs.replace(
        whole,
        runs=1,
        complete=int(account.complete),
        pending=account.pending,
        possibly_billed=account.possibly_billed_count,
        possibly_billed_usd=account.possibly_billed_usd,
        expected_usd=None if expected is None else expected.expected_usd,
        compared_usd=None if expected is None else expected.cost_usd,
        latencies=None if scanned is None else buckets,
        limit_used_s=used_s,
        limit_s=limit_s,
    )


def _limit(account: Account) -> tuple[float | None, float | None]:
    """The last start's length in seconds, times the share of its tightest limit that it used; and that length."""
    limits = account.limits
    if limits is None or account.elapsed_s < RATE_S:
        return None, None
    pairs = (
        (account.requests_per_minute, limits.requests_per_minute),
        (account.tokens_per_minute, limits.tokens_per_minute),
    )
    shares = [used / allowed for used, allowed in pairs if allowed]
    return (max(shares) * account.elapsed_s, account.elapsed_s) if shares else (None, None)


_ROWS = {
    **{"model": "requested_model", "service_tier": "service_tier", "status": "status"},
    **{"day": "day", "month": "day"},
}


def _scanned_by(by: tuple[str, ...], span: DaySpan) -> list[str]:
    """The columns by which rows must be counted for these keys."""
    needed = [_ROWS[key] for key in by if key in _ROWS]
    if span.since is not None or span.until is not None:
        needed.append("day")
    return list(dict.fromkeys(needed))


def _expected(accounts: Sequence[Account]) -> ExpectedCost | None:
    """None if no complete run has both an estimate and a cost."""
    known = [
        (account.estimate.expected_usd, account.cost_usd)
        for account in accounts
        if account.complete and account.estimate is not None and account.estimate.expected_usd is not None
        if account.all_priced
    ]
    if not known:
        return None
    return ExpectedCost(len(known), sum((e for e, _ in known), Decimal(0)), sum((c for _, c in known), Decimal(0)))
