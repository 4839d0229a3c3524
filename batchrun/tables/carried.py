"""Rows that take their answer without a request: an earlier answer's columns under a new row. PURE.

Columns of the answer are carried over; columns of a request are empty, since there was none: no attempts, no
latency, no tokens, no cost. What the answer cost when it was paid for is in `reused_cost_usd`.
"""

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import pyarrow as pa

from batchrun import compute as pc
from batchrun.tables.rows import OWN_COLUMNS, own_columns

NOTHING = Decimal(0)


def carried(
    answers: pa.Table, rows: Sequence[int], originals: Sequence[int | None], *, invocation: int, at_s: float
) -> pa.Table:
    """`answers` (`OWN_COLUMNS`), one for each of `rows`, as the records of these rows, settled `at_s` (Unix time).

    `originals` are the equal rows of this run whose answers they are, None where they are of an earlier result.
    """
    count = len(rows)
    columns: dict[str, Any] = {name: answers.column(name) for name in OWN_COLUMNS.names if name not in OF_THE_REQUEST}
    was_reused = pc.fill_null(columns["reused"], False)
    columns |= {
        "row": list(rows),
        "finished_at": [int(at_s * 1_000_000)] * count,
        "reused_cost_usd": pc.if_else(was_reused, columns["reused_cost_usd"], columns["cost_usd"]),
        "cost_usd": [NOTHING] * count,
        "answer_cost_usd": [NOTHING] * count,
        "attempts": [0] * count,
        "reused": [True] * count,
        "duplicate_of": list(originals),
        "invocation": [invocation] * count,
    }
    return own_columns(columns, count)


def with_source(answers: pa.Table, source: str, *, variant: int, model: str) -> pa.Table:
    """Answers of the earlier result `source` (`OWN_COLUMNS`) as those of the job's present `variant`.

    An answer that was reused there, too, keeps its own source. `model` is used where none was stored as requested.
    """
    columns: dict[str, Any] = {name: answers.column(name) for name in OWN_COLUMNS.names}
    columns["reused_from"] = pc.fill_null(columns["reused_from"], source)
    columns["requested_model"] = pc.fill_null(columns["requested_model"], model)
    columns["variant"] = [variant] * answers.num_rows
    return own_columns(columns, answers.num_rows)


OF_THE_REQUEST = frozenset(
    {
        *("request_id", "service_tier", "reported_cost_usd", "set_aside", "latency_s", "time_to_first_token_s"),
        *(name for name in OWN_COLUMNS.names if name.endswith("_tokens")),
    }
)
"""Columns that are null where there was no request."""
