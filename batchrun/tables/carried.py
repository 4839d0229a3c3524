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
    answers: pa.Table,
    rows: Sequence[int],
    originals: Sequence[int | None],
    *,
    invocation: int,
    at_s: float,
    source: str | None = None,
    variant: int | None = None,
    model: str = "",
) -> pa.Table:
    """`answers` (`OWN_COLUMNS`), one for each of `rows`, as the records of these rows, settled `at_s` (Unix time).

    `originals` are the equal rows of this run whose answer it is, `source` the earlier result that had it. `variant`:
    the present settings of the job, None: those of the answers; `model` is used where they name no requested model.
    """
    count = len(rows)
    columns: dict[str, Any] = {name: answers.column(name) for name in OWN_COLUMNS.names}
    was_reused = pc.fill_null(columns["reused"], False)
    first_cost = pc.if_else(was_reused, columns["reused_cost_usd"], columns["cost_usd"])
    named = columns["reused_from"]
    known: dict[str, Any] = {
        "row": list(rows),
        "requested_model": pc.fill_null(columns["requested_model"], model),
        "finished_at": [int(at_s * 1_000_000)] * count,
        "cost_usd": [NOTHING] * count,
        "answer_cost_usd": [NOTHING] * count,
        "attempts": [0] * count,
        "reused": [True] * count,
        "reused_from": named if source is None else pc.fill_null(named, source),
        "reused_cost_usd": first_cost,
        "duplicate_of": list(originals),
        "variant": columns["variant"] if variant is None else [variant] * count,
        "invocation": [invocation] * count,
    }
    of_the_answer = {name: column for name, column in columns.items() if name not in OF_THE_REQUEST}
    return own_columns({**of_the_answer, **known}, count)


OF_THE_REQUEST = frozenset(
    {
        *("request_id", "service_tier", "reported_cost_usd", "set_aside", "latency_s", "time_to_first_token_s"),
        *(name for name in OWN_COLUMNS.names if name.endswith("_tokens")),
    }
)
"""Columns that are null where there was no request."""
