"""What the page shows besides the bill: cost and tokens by night, throughput, failures, the dearest rows.

No question and no answer is on it: a page is mailed, and prompts are data.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.compute

from batchrun.errors import InputError
from batchrun.report import run_rows
from batchrun.report.bill import Bill, BillLine, counted, fold
from batchrun.report.charts import COLOURS, Chart
from batchrun.report.keys import Span, night
from batchrun.report.run_rows import Result
from batchrun.report.runs import Found

pc: Any = pyarrow.compute  # its stubs know less than it does

DEAREST = 10
MOST_NIGHTS = 62
"""Beyond, bars are of months."""

BINS = 40
"""Moments of a run at which its throughput is shown."""


class Failure(msgspec.Struct, frozen=True):
    """One kind of failure: its rows, and one of their messages, from which the key was cut out when it was written."""

    kind: str
    rows: int
    example: str


class Dear(NamedTuple):
    """One of the dearest rows."""

    cost_usd: Decimal
    job: str
    night: str
    row: int
    status: str
    attempts: int
    prompt_tokens: int | None
    completion_tokens: int | None


class Rows(NamedTuple):
    """What is collected of every run's rows."""

    failures: list[Failure]
    dearest: list[Dear]


def by_night(found: Sequence[Found], span: Span) -> list[Chart]:
    """Cost by model, and tokens by kind, night by night."""
    key = "night" if len({night(each, span.zone) for each in found}) <= MOST_NIGHTS else "month"
    by = (key, "model")
    bill = fold(counted(found, by, span, rows=False), by, span, ())
    labels = sorted({line.group[0] for line in bill.lines})
    costs = _by_model(bill)
    names = sorted(costs, key=lambda name: (-costs[name], name))
    shown = names if len(names) <= COLOURS else names[: COLOURS - 1]
    cost = {name: [0.0] * len(labels) for name in (shown if shown == names else [*shown, "others"])}
    kinds = {name: [0.0] * len(labels) for name in _KINDS}
    for line in bill.lines:
        place = labels.index(line.group[0])
        cost[line.group[1] if line.group[1] in shown else "others"][place] += float(line.cost_usd)
        for kind, value in _tokens(line).items():
            kinds[kind][place] += value
    return [
        Chart("stacked", f"Cost by {key} and model", "USD", labels, list(cost.items())),
        Chart("stacked", f"Tokens by {key} and kind", "tokens", labels, list(kinds.items())),
    ]


_KINDS = ("input, not cached", "input, cached", "output, besides reasoning", "reasoning")


def _tokens(line: BillLine) -> Mapping[str, int]:
    values = (
        line.prompt_tokens - line.cached_tokens,
        line.cached_tokens,
        line.completion_tokens - line.reasoning_tokens,
        line.reasoning_tokens,
    )
    return dict(zip(_KINDS, values, strict=True))


def _by_model(bill: Bill) -> dict[str, Decimal]:
    costs: dict[str, Decimal] = {}
    for line in bill.lines:
        costs[line.group[1]] = costs.get(line.group[1], Decimal(0)) + line.cost_usd
    return costs


def latency(bill: Bill) -> Chart | None:
    """How many rows took how long, in steps that double four times over."""
    if not bill.total.latencies:
        return None
    steps: Counter[int] = Counter()
    for bucket, count in bill.total.latencies.items():
        seconds = math.exp((bucket + 0.5) * math.log(1.01))
        steps[math.floor(math.log2(seconds) * 2)] += count
    places = range(min(steps), max(steps) + 1)
    labels = [f"{2 ** (place / 2):.2g} s" for place in places]
    return Chart("bars", "Latency of the rows' last attempts", "rows", labels, [("rows", [steps[p] for p in places])])


def throughput(found: Sequence[Found]) -> Chart | None:
    """Rows a minute over the newest run, beside the requests a minute that it was allowed."""
    newest = max(found, key=lambda each: each.account.began, default=None)
    if newest is None or (result := _result(newest)) is None:
        return None
    seconds: Counter[int] = Counter()
    for table in run_rows.tables(result, ["finished_at"]):
        whole = pc.cast(pc.floor_temporal(table["finished_at"], unit="second"), pa.int64())
        for each in pc.value_counts(pc.drop_null(whole)).to_pylist():
            seconds[each["values"] // 1_000_000] += each["counts"]
    if len(seconds) < 2:
        return None
    first, last = min(seconds), max(seconds)
    width = max(1, -(-(last - first + 1) // BINS))
    bins = [0.0] * ((last - first) // width + 1)
    for second, rows in seconds.items():
        bins[(second - first) // width] += rows * 60 / width
    labels = [f"{place * width // 60}:{place * width % 60:02d}" for place in range(len(bins))]
    series: list[tuple[str, Sequence[float | None]]] = [("rows a minute", bins)]
    limits = newest.account.limits
    if limits is not None and limits.requests_per_minute:
        series.append(("requests a minute allowed", [limits.requests_per_minute] * len(bins)))
    return Chart("lines", f"Throughput of the newest run ({newest.account.job})", "rows a minute", labels, series)


def rows(found: Sequence[Found], span: Span) -> Rows:
    """Failures by kind and the dearest rows, of every run whose rows can be read."""
    kinds: Counter[str] = Counter()
    examples: dict[str, str] = {}
    dearest: list[Dear] = []
    for each in found:
        if (result := _result(each)) is None:
            continue
        for table in run_rows.tables(result, _COLUMNS):
            for kind, message in _failures(table):
                kinds[kind] += 1
                examples.setdefault(kind, message)
            dearest += _dearest(table, each, span)
        dearest = sorted(dearest, key=lambda dear: (-dear.cost_usd, dear.job, dear.row))[:DEAREST]
    failures = [Failure(kind, count, examples[kind]) for kind, count in kinds.most_common()]
    return Rows(failures, dearest)


_COLUMNS = ("row", "status", "attempts", "prompt_tokens", "completion_tokens", "cost_usd", "error")


def _failures(table: pa.Table) -> Iterator[tuple[str, str]]:
    failed = table.filter(pc.and_(pc.is_valid(table["error"]), pc.not_equal(table["status"], "ok")))
    errors: list[Any] = failed["error"].to_pylist()
    for status, error in zip(failed["status"].to_pylist(), errors, strict=True):
        http = f"HTTP {error['http_status']}: " if error["http_status"] else ""
        yield f"{status}, {error['kind']}", http + (error["message"] or "")


def _dearest(table: pa.Table, found: Found, span: Span) -> Iterator[Dear]:
    paid = table.filter(pc.is_valid(table["cost_usd"]))
    for row in paid.take(pc.sort_indices(paid, sort_keys=[("cost_usd", "descending")])[:DEAREST]).to_pylist():
        if row["cost_usd"]:
            yield Dear(
                *(row["cost_usd"], found.account.job, night(found, span.zone), row["row"], row["status"]),
                *(row["attempts"], row["prompt_tokens"], row["completion_tokens"]),
            )


def _result(found: Found) -> Result | None:
    try:
        return run_rows.result_of(found.place)
    except InputError:
        return None
