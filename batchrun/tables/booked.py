"""Rows of the output as lines of the bill: what each answer alone used and cost, and where it is booked. PURE."""

from collections.abc import Iterator, Sequence
from datetime import date
from decimal import Decimal
from typing import Any

import pyarrow as pa

from batchrun.run_summary import TotalsLine

_TOKENS = (
    *("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens", "total_tokens"),
    "cache_write_tokens",
)
_COLUMNS = (
    *("invocation", "requested_model", "status", "service_tier", "finished_at"),
    *("answer_cost_usd", "reported_cost_usd", "reused", "reused_cost_usd", "duplicate_of"),
    *_TOKENS,
)


def lines(own: pa.Table) -> Iterator[TotalsLine]:
    """For each row of our columns (`OWN_COLUMNS`), in order: its answer as a line of the totals that counts 1 row.

    The offline count of an answer without usage is in no column, so it is not in the line. A reused answer took no
    attempt.
    """
    columns: list[Any] = [own.column(name).to_pylist() for name in _COLUMNS]
    for invocation, model, status, tier, finished_at, cost, reported, reused, saved, first, *tokens in zip(
        *columns, strict=True
    ):
        known = tokens[0] is not None  # usage, which brings all or none of the counts that are not parts of others
        yield TotalsLine(
            invocation,
            model,
            status,
            finished_at.date().isoformat(),
            tier or "",
            rows=1,
            attempts=int(not reused),
            cost_usd=cost or Decimal(0),
            unpriced=int(known and cost is None),
            without_usage=int(not known and cost is None),
            reported_cost_usd=reported or Decimal(0),
            reused=int(reused),
            duplicates=int(first is not None),
            saved_usd=saved or Decimal(0),
            **{name: n for name, n in zip(_TOKENS, tokens, strict=True) if n is not None},
        )


def usage_rows(totals: Sequence[TotalsLine]) -> list[dict[str, Any]]:
    """The lines as rows of usage.parquet."""
    names = TotalsLine.__struct_fields__
    return [
        {name: getattr(line, name) for name in names} | {"day": date.fromisoformat(line.day) if line.day else None}
        for line in totals
    ]


def totals_of(rows: Sequence[dict[str, Any]]) -> list[TotalsLine]:
    return [TotalsLine(**{**row, "day": "" if row["day"] is None else row["day"].isoformat()}) for row in rows]
