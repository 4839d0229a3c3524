"""The partial result of a run that is not complete: every row, those without a completion as `pending`.

Its name and its footer distinguish it from the result. A complete run has none.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import msgspec
import pyarrow as pa

from batchrun import compute as pc
from batchrun import durable
from batchrun.errors import CheckpointError
from batchrun.run_summary import Summary
from batchrun.store.result import bill
from batchrun.store.stored_window import BATCH_ROWS
from batchrun.tables import files, json_lines, pending
from batchrun.tables.rows import OWN_COLUMNS


def write(
    path: Path, batches: Iterable[pa.RecordBatch], schema: pa.Schema, compression: files.Compression, summary: Summary
) -> int:
    """Writes the rows, with the number of pending ones in the footer; returns that number.

    `batches` are `Chunks.so_far` or similar. `summary` is of the run now, with the number of all its rows.

    Raises:
        CheckpointError: `batches` has another number of rows.
        DiskError: the file can't be written; an earlier one is unchanged.
    """
    standing: Counter[str] = Counter()
    packing = json_lines.packing_of(path)
    with durable.replacing(path) as temporary:
        with (
            files.ParquetFile(temporary, schema, compression)
            if packing is None
            else json_lines.JsonLinesFile(temporary, schema, packing)
        ) as file:
            for batch in batches:
                standing.update(_statuses(batch))
                file.write(batch)
            if (rows := standing.total()) != summary.rows:
                raise CheckpointError(
                    f"{path}: the run has {summary.rows:,} rows, {rows:,} were found; nothing is written"
                )
            if isinstance(file, files.ParquetFile):
                footer = {
                    **bill(summary),
                    "complete": False,
                    "rows_in_output": rows,
                    "by_status": {status: n for status, n in standing.items() if status != pending.PENDING},
                    "pending": standing[pending.PENDING],
                    "invocation": summary.invocation,
                    "updated_at": summary.updated_at,
                }
                file.write_metadata({files.FOOTER_KEY: msgspec.json.encode(footer).decode()})
        if packing is None:
            files.require_rows(temporary, summary.rows)
        else:
            json_lines.require_rows(temporary, packing, summary.rows)
    return standing[pending.PENDING]


def without_input(first_row: int, end_row: int, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Pending rows whose input can't be read: its columns are null, which `schema` must allow."""
    inputs = len(schema) - len(OWN_COLUMNS)
    for row in range(first_row, end_row, BATCH_ROWS):
        own = pending.with_pending(OWN_COLUMNS.empty_table(), row, min(row + BATCH_ROWS, end_row))
        ours = zip(own.columns, list(schema)[inputs:], strict=True)
        arrays = [pa.nulls(own.num_rows, field.type) for field in list(schema)[:inputs]]
        arrays += [
            column.combine_chunks() if column.type == field.type else pa.nulls(own.num_rows, field.type)
            for column, field in ours
        ]
        yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def _statuses(batch: pa.RecordBatch) -> dict[str, int]:
    """The number of rows by status. Our columns are found by position, because their prefix differs."""
    place = OWN_COLUMNS.get_field_index("status") - len(OWN_COLUMNS)
    counts = pc.value_counts(batch.column(batch.num_columns + place))
    pairs = zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True)
    return {cast(str, status): cast(int, rows) for status, rows in pairs}
