"""Rows without an outcome, as the output has them: in the result of a run that is not complete. PURE."""

from collections.abc import Mapping, Sequence
from typing import cast

import pyarrow as pa

from batchrun.records import Discarded
from batchrun.tables.rows import OWN_COLUMNS

PENDING = "pending"
"""The status of a row without an outcome. No row of a complete result has it."""


def beside(
    own: pa.Table,
    first_row: int,
    end_row: int,
    discarded: Mapping[int, Sequence[Discarded]] | None = None,
    lost: Mapping[int, int] | None = None,
) -> pa.Table:
    """Rows `first_row` to `end_row` - 1 in order: those of `own`, and the others as pending.

    By row, `discarded` are the attempts so far, and `lost` is the number of the last one without a known end.
    """
    there = set(cast(list[int], own.column("row").to_pylist()))
    missing = [row for row in range(first_row, end_row) if row not in there]
    if not missing:
        return own
    pending = _table(missing, discarded or {}, lost or {})
    return pa.concat_tables([own, pending]).sort_by("row") if there else pending


def _table(rows: Sequence[int], discarded: Mapping[int, Sequence[Discarded]], lost: Mapping[int, int]) -> pa.Table:
    """The rows as `OWN_COLUMNS`: how often each was sent, what that cost, and what its last attempt came to."""
    attempts = [discarded.get(row, ()) for row in rows]
    costs = [[attempt.cost_usd for attempt in each] for each in attempts]
    values: dict[str, list[object]] = {
        "row": list(rows),
        "status": [PENDING] * len(rows),
        "cost_usd": [None if None in each else sum(filter(None, each)) for each in costs],
        "attempts": [
            max([lost.get(row, 0), *(attempt.n for attempt in each)]) for row, each in zip(rows, attempts, strict=True)
        ],
        "error": [_error(each[-1]) if each else None for each in attempts],
        "reused": [False] * len(rows),
    }
    arrays = [
        pa.array(values[field.name], field.type) if field.name in values else pa.nulls(len(rows), field.type)
        for field in OWN_COLUMNS
    ]
    return pa.Table.from_arrays(arrays, schema=OWN_COLUMNS)


def _error(attempt: Discarded) -> dict[str, object]:
    said = {"http_status": attempt.http_status, "code": None, "message": attempt.message}
    return {"kind": attempt.error_kind, **said}
