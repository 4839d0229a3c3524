"""The page's data besides the bill: cost and tokens by night, throughput, failures, the most expensive rows.

It reads no row's question or answer: the page is mailed, and prompts are data.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from decimal import Decimal
from functools import partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute

from batchrun.records import RowError
from batchrun.report import latencies, run_rows
from batchrun.report.bill import Bill, CountedRun, fold
from batchrun.report.charts import COLOURS, Chart
from batchrun.report.keys import DaySpan, night
from batchrun.report.run_rows import Result
from batchrun.report.runs import FoundRun

pc: Any = pyarrow.compute  # its stubs know less than it does

MOST_COSTLY = 10  # rows in the page's table of the most expensive ones
MOST_NIGHTS = 62
"""With more nights, bars are of months."""

BINS = 40
"""Points of the throughput chart."""


class FailureKind(NamedTuple):
    """One kind of failure: its rows, and one of their messages, which never holds the API key."""

    kind: str
    rows: int
    example: str


class CostlyRow(NamedTuple):
    """One of the most expensive rows. `run` is the name of its directory: a path could say too much in a mail."""

    cost_usd: Decimal
    job: str
    run: str
    row: int
    status: str
    attempts: int
    prompt_tokens: int | None
    completion_tokens: int | None


def by_night(every: Sequence[CountedRun], span: DaySpan) -> list[Chart]:
    """Cost by model, and tokens by kind, night by night."""
    key = "night" if len({night(each.found, span.zone) for each in every}) <= MOST_NIGHTS else "month"
    bill = fold(every, (key, "model"), span, ())
    labels = sorted({line.group[0] for line in bill.lines})
    costs: defaultdict[str, Decimal] = defaultdict(Decimal)
    for line in bill.lines:
        costs[line.group[1]] += line.cost_usd
    names = sorted(costs, key=lambda name: (-costs[name], name))
    shown = names if len(names) <= COLOURS else names[: COLOURS - 1]
    cost = {name: [0.0] * len(labels) for name in (shown if shown == names else [*shown, "others"])}
    kinds = {name: [0.0] * len(labels) for name in _KINDS}
    for line in bill.lines:
        place = labels.index(line.group[0])
        cost[line.group[1] if line.group[1] in shown else "others"][place] += float(line.cost_usd)
        cached, reasoning = line.cached_tokens or 0, line.reasoning_tokens or 0
        tokens = (line.prompt_tokens - cached, cached, line.completion_tokens - reasoning, reasoning)
        for kind, value in zip(_KINDS, tokens, strict=True):
            kinds[kind][place] += value
    return [
        Chart("stacked", f"Cost by {key} and model", "USD", labels, list(cost.items())),
        Chart("stacked", f"Tokens by {key} and kind", "tokens", labels, list(kinds.items())),
    ]


_KINDS = ("input, not cached", "input, cached", "output, besides reasoning", "reasoning")


def latency(bill: Bill) -> Chart | None:
    """How many rows took how long, in steps of a factor of √2."""
    if not bill.total.latencies:
        return None
    steps: Counter[int] = Counter()
    for bucket, count in bill.total.latencies.items():
        steps[math.floor(math.log2(latencies.seconds_of(bucket)) * 2)] += count
    places = range(min(steps), max(steps) + 1)
    labels = [f"{2 ** (place / 2):.2g} s" for place in places]
    return Chart("bars", "Latency of the rows' last attempts", "rows", labels, [("rows", [steps[p] for p in places])])


def throughput(found: Sequence[FoundRun]) -> Chart | None:
    """Rows per minute over the newest run, with the requests per minute that its limit allows."""
    newest = max(found, key=lambda each: each.account.started_at, default=None)
    seconds = None if newest is None else run_rows.if_readable(newest.place, _by_second)
    if newest is None or seconds is None or len(seconds) < 2:
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


def _by_second(result: Result) -> Counter[int]:
    """Second of Unix time → rows that ended in it."""
    seconds: Counter[int] = Counter()
    for table in run_rows.tables(result, ["finished_at"]):
        whole = pc.cast(pc.floor_temporal(table["finished_at"], unit="second"), pa.int64())
        seconds.update({micros // 1_000_000: rows for micros, rows in run_rows.counts(whole).items()})
    return seconds


def rows(found: Sequence[FoundRun]) -> tuple[list[FailureKind], list[CostlyRow]]:
    """The failures by kind, commonest first, and the most expensive rows. Runs without readable rows are left out."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    costliest: list[CostlyRow] = []
    for each in found:
        of_run = run_rows.if_readable(each.place, partial(_of_run, each))
        if of_run is not None:
            counts.update(of_run[0])
            examples = {**of_run[1], **examples}
            costliest += of_run[2]
    return [FailureKind(kind, count, examples[kind]) for kind, count in counts.most_common()], _most_costly(costliest)


_COLUMNS = ("row", "status", "attempts", "prompt_tokens", "completion_tokens", "cost_usd", "error")


def _of_run(found: FoundRun, result: Result) -> tuple[Counter[str], dict[str, str], list[CostlyRow]]:
    """How many rows each kind of failure has, an example of each, and the run's most expensive rows."""
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    costliest: list[CostlyRow] = []
    for table in run_rows.tables(result, _COLUMNS):
        failed = table.filter(pc.and_(pc.is_valid(table["error"]), pc.not_equal(table["status"], "ok")))
        errors: list[Any] = failed["error"].to_pylist()
        for status, fields in zip(failed["status"].to_pylist(), errors, strict=True):
            error = RowError(**fields)
            kind = f"{status}, {error.kind}"
            counts[kind] += 1
            if kind not in examples:
                examples[kind] = error.text
        paid = table.filter(pc.is_valid(table["cost_usd"]))
        first = pc.sort_indices(paid, sort_keys=[("cost_usd", "descending")])[:MOST_COSTLY]
        directory = found.place if found.place.is_dir() else found.place.absolute().parent
        named = (found.account.job, directory.name)
        costliest += [
            CostlyRow(
                *(row["cost_usd"], *named, row["row"], row["status"]),
                *(row["attempts"], row["prompt_tokens"], row["completion_tokens"]),
            )
            for row in paid.take(first).to_pylist()
            if row["cost_usd"]
        ]
        costliest = _most_costly(costliest)
    return counts, examples, costliest


def _most_costly(rows: list[CostlyRow]) -> list[CostlyRow]:
    return sorted(rows, key=lambda row: (-row.cost_usd, row.job, row.run, row.row))[:MOST_COSTLY]
