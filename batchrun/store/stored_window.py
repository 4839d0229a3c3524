"""The stored input of an open chunk. Dispatch and sealing read it instead of the source.

Compressed sources can't seek, row groups are large, and files may be overwritten while a run works.
"""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from batchrun import arrow_files
from batchrun.durable import digest, disk_errors, replacing
from batchrun.errors import CheckpointError
from batchrun.records import Row
from batchrun.source import rows_of
from batchrun.tables.json_columns import ColumnTypes, lines_to_table

BATCH_ROWS = 1000

MOST_ALONE = 8
"""So many rows of a batch are typed one by one, the next one with all others: if only a few old rows are retried, their
batches are not typed as a whole."""


def write(path: Path, table: pa.Table) -> str:
    """Writes the window's rows in batches of 1,000; returns the file's digest."""
    with replacing(path) as temporary:
        temporary.touch(mode=0o600)
        with arrow_files.opened(temporary, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            for batch in table.combine_chunks().to_batches(max_chunksize=BATCH_ROWS):
                writer.write_batch(batch)
    return digest(path)


def schema_of(path: Path) -> pa.Schema:
    """The columns of a stored window.

    Raises:
        CheckpointError: it can't be read.
    """
    try:
        with arrow_files.mapped(path) as mapped:
            return pa.ipc.open_file(mapped).schema
    except (OSError, pa.ArrowException) as error:
        raise CheckpointError(f"{path}: the input of an open chunk can't be read: {error}") from error


def rows_stored(path: Path) -> int:
    """How many rows the stored input has."""
    with arrow_files.opened(path) as file, pa.ipc.open_file(file) as reader:
        return sum(reader.get_batch(number).num_rows for number in range(reader.num_record_batches))


class StoredBatch:
    """Up to 1,000 rows as they are stored: a view of the mapped file, which stays valid after the file is deleted."""

    def __init__(self, rows: pa.RecordBatch) -> None:
        self.rows = rows
        self._wanted = 0
        self._typed: list[dict[str, Any]] | None = None

    def typed_row(self, place: int, types: ColumnTypes | None, names: Sequence[str]) -> dict[str, Any]:
        """The row's columns of these names as the output has them.

        Arrow takes 30 µs for one row and 2 for one of many, so all are made once several are wanted.
        """
        self._wanted += 1
        if self._typed is None and self._wanted > MOST_ALONE:
            self._typed = typed([self.rows], types).select(names).to_pylist()
        if self._typed is not None:
            return self._typed[place]
        (row,) = typed([self.rows.slice(place, 1)], types).select(names).to_pylist()
        return row


class StoredWindow:
    """An open chunk's input from row `first_row` on, mapped into memory."""

    def __init__(self, path: Path, expected_digest: str | None, first_row: int) -> None:
        """`expected_digest` None: this process has just written it.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        if expected_digest is not None:
            with disk_errors(path):
                found = digest(path) if path.exists() else None
            if found != expected_digest:
                what = "missing" if found is None else "damaged"
                raise CheckpointError(f"{path}: the input of an open chunk is {what}")
        self._path = path
        self._first_row = first_row
        self._mapped: pa.RecordBatchFileReader | None = None
        self._last: dict[int, StoredBatch] = {}  # the last two by number: rows are settled in nearly their order
        self._reading = threading.Lock()

    def row(self, row: int) -> Row:
        """One row, read from the file. Any thread may call it."""
        batch, place = self.stored(row)
        return Row(row, rows_of(batch.rows.slice(place, 1))[0])

    def stored(self, row: int) -> tuple[StoredBatch, int]:
        """The row's batch, and its place there. Any thread may call it."""
        number, place = divmod(row - self._first_row, BATCH_ROWS)
        return self._batch(number), place

    def rows(self, skip: bytes | bytearray = b"") -> Iterator[list[Row]]:
        """The rows in order, up to 1,000 at a time. Those that have a byte in `skip` other than 0 are not decoded."""
        row = self._first_row
        for number in range(self._batches()):
            batch = self._batch(number).rows
            marks = skip[row - self._first_row : row - self._first_row + batch.num_rows]
            numbers = [each for each, mark in enumerate(marks or bytes(batch.num_rows), row) if not mark]
            if len(numbers) < batch.num_rows:
                stored = batch.take(pa.array([each - row for each in numbers], pa.int64()))
            else:
                stored = batch
            row += batch.num_rows
            if numbers:
                yield [Row(each, columns) for each, columns in zip(numbers, rows_of(stored), strict=True)]

    def tables(self, types: ColumnTypes | None) -> Iterator[pa.Table]:
        """The same rows as typed columns, up to 1,000 at a time; `types` are those of JSONL input."""
        for number in range(self._batches()):
            yield typed([self._batch(number).rows], types)

    def release(self) -> None:
        """Closes the file until it is read again: a chunk that waits for others must not take a file descriptor."""
        with self._reading:
            self._mapped = None
            self._last.clear()

    def _batches(self) -> int:
        with self._reading:
            return int(self._reader().num_record_batches)

    def _batch(self, number: int) -> StoredBatch:
        with self._reading:
            if (batch := self._last.get(number)) is None:
                if len(self._last) == 2:
                    del self._last[min(self._last)]
                batch = self._last[number] = StoredBatch(self._reader().get_batch(number))
            return batch

    def _reader(self) -> pa.RecordBatchFileReader:
        """The open file. To be called with the lock held: `release` closes it in another thread."""
        if self._mapped is None:
            self._mapped = pa.ipc.open_file(arrow_files.mapped(self._path))
        return self._mapped


def typed(batches: Sequence[pa.RecordBatch], types: ColumnTypes | None) -> pa.Table:
    """Stored rows, at least one batch of them, as typed columns; `types` are those of JSONL input."""
    table = pa.Table.from_batches(batches)
    return table if types is None else lines_to_table(cast(list[bytes], table.column("line").to_pylist()), types)
