"""A run's totals by the days of a time zone other than UTC. PURE, except that it may read rows.

Totals are kept by UTC day. If the run's part of a UTC day is within one local day, that is its day. Otherwise the
rows are read, which have the time of their end. Attempts without a row (discarded ones, or all if rows can't be read)
can't be divided: their day reads `2026-11-27 or 2026-11-28`, and they count in the month and span of the first.
"""

import functools
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pyarrow as pa

from batchrun import compute as pc
from batchrun.report import run_rows
from batchrun.report.keys import UNKNOWN, day_of
from batchrun.report.latencies import local_days
from batchrun.report.run_rows import Result
from batchrun.report.runs import FoundRun
from batchrun.run_summary import LineKey, TotalsLine
from batchrun.store.totals import FIGURES, negative, plus

_TOKENS = tuple(name for name in FIGURES if name.endswith("_tokens") and not name.startswith("offline"))
_SUMMED = (*_TOKENS, "answer_cost_usd", "reported_cost_usd")
_OF_REUSE = ("reused_cost_usd", "duplicate_of")


def localised(found: FoundRun, zone: str) -> list[TotalsLine]:
    """The run's totals with local days in `day`; their sum does not change.

    A line of several local days is divided by the days on which its rows ended. Attempts without a row stay on several.
    """
    if zone == "UTC":
        return [msgspec.structs.replace(line, day=line.day or UNKNOWN) for line in found.account.totals]
    lines, divided = [], []
    for line in found.account.totals:
        days = _days(found, line, zone)
        if len(days) == 1:
            lines.append(msgspec.structs.replace(line, day=days[0]))
        else:
            divided.append(line)
    if not divided:
        return lines
    rows: dict[LineKey, list[TotalsLine]] = defaultdict(list)
    read = run_rows.if_readable(found.place, lambda result: list(_rows_by_day(result, zone)))
    for utc_day, line in read or ():
        rows[line.invocation, line.model, line.status, utc_day, line.service_tier].append(line)
    for line in divided:
        known = rows.get(line.key, [])
        lines += known
        left = functools.reduce(plus, map(negative, known), line)
        if any(getattr(left, name) for name in FIGURES):
            lines.append(msgspec.structs.replace(left, day=" or ".join(_days(found, line, zone))))
    return lines


def _days(found: FoundRun, line: TotalsLine, zone: str) -> list[str]:
    """The local days on which the run's part of the line's UTC day can lie."""
    if not line.day:
        return [UNKNOWN]
    first = datetime.combine(date.fromisoformat(line.day), time(), UTC)
    last = first + timedelta(days=1) - timedelta(microseconds=1)
    account = found.account
    begin, end = max(first, account.started_at), min(last, account.updated_at)
    if begin > end:  # the clock was set during the run
        begin, end = first, last
    return sorted({day_of(begin, zone), day_of(end, zone)})


def _rows_by_day(result: Result, zone: str) -> Iterator[tuple[str, TotalsLine]]:
    """The rows' own part of the totals, by local day, each with its UTC day."""
    keys = ["invocation", "requested_model", "status", "service_tier"]
    beside = [name for name in _OF_REUSE if result.prefix + name in result.schema.names]  # older results have none
    for table in run_rows.tables(result, [*keys, "finished_at", *_SUMMED, "reused", *beside]):
        columns: dict[str, Any] = {name: table[name] for name in (*keys, *_SUMMED)}
        columns["utc"] = local_days(table["finished_at"], "UTC")
        columns["local"] = local_days(table["finished_at"], zone)
        columns["unpriced"] = pc.cast(
            pc.and_(pc.is_valid(table["prompt_tokens"]), pc.is_null(table["answer_cost_usd"])), pa.int64()
        )
        columns["without_usage"] = pc.cast(
            pc.and_(pc.is_null(table["prompt_tokens"]), pc.is_null(table["answer_cost_usd"])), pa.int64()
        )
        nulls = pa.nulls(table.num_rows, pa.int64())
        columns["reused"] = pc.cast(table["reused"], pa.int64())
        columns["saved_usd"] = table["reused_cost_usd"] if "reused_cost_usd" in beside else nulls
        columns["duplicates"] = pc.cast(pc.is_valid(table["duplicate_of"] if beside else nulls), pa.int64())
        summed = [*_SUMMED, "unpriced", "without_usage", "reused", "saved_usd", "duplicates"]
        grouped = pa.table(columns).group_by([*keys, "utc", "local"])
        for row in grouped.aggregate([*((name, "sum") for name in summed), ([], "count_all")]).to_pylist():
            if row["local"] is None:
                continue
            tokens: dict[str, Any] = {name: row[f"{name}_sum"] for name in _TOKENS}
            yield (
                row["utc"].isoformat(),
                TotalsLine(
                    row["invocation"],
                    row["requested_model"],
                    row["status"],
                    row["local"].isoformat(),
                    row["service_tier"] or "",
                    rows=row["count_all"],
                    attempts=row["count_all"] - (row["reused_sum"] or 0),
                    cost_usd=row["answer_cost_usd_sum"] or Decimal(0),
                    unpriced=row["unpriced_sum"],
                    without_usage=row["without_usage_sum"],
                    reported_cost_usd=row["reported_cost_usd_sum"] or Decimal(0),
                    reused=row["reused_sum"] or 0,
                    duplicates=row["duplicates_sum"] or 0,
                    saved_usd=row["saved_usd_sum"] or Decimal(0),
                    **tokens,
                ),
            )
