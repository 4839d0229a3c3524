"""Rows without an outcome, as the output has them: in the result of a run that is not complete. PURE."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import pyarrow as pa

from batchrun.records import Discarded
from batchrun.tables.rows import own_columns, usd_array

PENDING = "pending"
"""The status of a row without an outcome. No row of a complete result has it."""


def with_pending(
    own: pa.Table,
    first_row: int,
    end_row: int,
    discarded: Mapping[int, Sequence[Discarded]] | None = None,
    lost: Mapping[int, int] | None = None,
) -> pa.Table:
    """Rows `first_row` to `end_row` - 1 in order: those of `own`, and the others as pending.

    A pending row says how often it was sent, what that cost, and what its last attempt came to.
    By row, `discarded` are the attempts so far, and `lost` is the number of the last one without a known end.
    """
    there = set(cast(list[int], own.column("row").to_pylist()))
    missing = [row for row in range(first_row, end_row) if row not in there]
    if not missing:
        return own
    attempts = [(discarded or {}).get(row, ()) for row in missing]
    costs = [[attempt.cost_pico_usd for attempt in each] for each in attempts]
    values: dict[str, Any] = {
        "row": list(missing),
        "status": [PENDING] * len(missing),
        "cost_usd": usd_array([None if None in each else sum(filter(None, each)) for each in costs]),
        "attempts": [
            max([(lost or {}).get(row, 0), *(attempt.n for attempt in each)])
            for row, each in zip(missing, attempts, strict=True)
        ],
        "error": [
            {"kind": last.error_kind, "http_status": last.http_status, "code": None, "message": last.message}
            if (last := each[-1] if each else None) is not None
            else None
            for each in attempts
        ],
        "reused": [False] * len(missing),
    }
    pending = own_columns(values, len(missing))
    return pa.concat_tables([own, pending]).sort_by("row") if there else pending
