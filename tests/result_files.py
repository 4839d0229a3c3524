"""Results as runs leave them, made of rows that a test writes down: summary.json, completions.parquet."""

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.report.summary import VERSION
from batchrun.run_summary import TotalsLine
from batchrun.store.totals import plus
from batchrun.tables.arrow_types import column_of
from batchrun.tables.booked import lines
from batchrun.tables.rows import OWN_COLUMNS, own_schema

MODEL = "vtrix-gpt-5.3-codex"
SCHEMA = {
    "type": "object",
    "properties": {
        "label": {"enum": ["good", "bad", "mixed"]},
        "score": {"type": "number"},
        "note": {"type": ["string", "null"]},
    },
    "additionalProperties": False,
}


def row(number: int, **changes: Any) -> dict[str, Any]:
    """A row that is ok, its question by its number."""
    text = changes.pop("text", f"question {number}")
    whole: dict[str, Any] = dict.fromkeys(OWN_COLUMNS.names)
    whole |= {
        **{"id": f"r{number}", "text": text, "row": number, "status": "ok", "content": f"answer {number}"},
        **{"model": MODEL, "requested_model": MODEL, "prompt_tokens": 100, "cached_tokens": 0, "cache_write_tokens": 0},
        **{"completion_tokens": 10, "reasoning_tokens": 0, "total_tokens": 110, "attempts": 1, "latency_s": 0.5},
        **{"finished_at": datetime(2026, 11, 1, 2, tzinfo=UTC), "invocation": 1, "variant": 0, "reused": False},
        **{"cost_usd": Decimal("0.001"), "answer_cost_usd": Decimal("0.001")},
        "request_key": hashlib.blake2b(str(text).encode(), digest_size=16).digest(),
    }
    return whole | changes


def write_result(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    /,
    *,
    typed: bool = False,
    prefix: str = "",
    also: Sequence[TotalsLine] = (),
    **summary: Any,
) -> Path:
    """A run directory with these rows; `typed`: `parsed` is of `SCHEMA`; `also`: lines of the totals without a row."""
    folder.mkdir(parents=True)
    schema = pa.schema(
        [("id", pa.string()), ("text", pa.string()), *own_schema("", column_of(SCHEMA if typed else None))]
    )
    table = pa.Table.from_pylist([dict(each) for each in rows], schema)
    named = [*schema.names[:2], *(prefix + name for name in schema.names[2:])]
    pq.write_table(table.rename_columns(named), folder / "completions.parquet", row_group_size=64)
    totals: dict[Any, TotalsLine] = {}
    for line, each in zip(lines(table), rows, strict=True):
        before = totals.get(line.key, TotalsLine(*line.key))
        more = TotalsLine(*line.key, attempts=each["attempts"] - 1)
        totals[line.key] = plus(plus(before, line), more)
    reported = {
        **{"version": VERSION, "job": "job", "run_id": folder.name, "invocation": 1, "complete": True},
        **{"created_at": "2026-11-01T01:00:00Z", "updated_at": "2026-11-01T03:00:00Z", "rows": len(rows)},
        **{"totals": [*totals.values(), *also], "possibly_billed_count": 0, "possibly_billed_usd": "0", "pending": 0},
    }
    (folder / "summary.json").write_bytes(msgspec.json.encode(reported | summary))
    return folder
