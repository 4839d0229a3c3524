"""Parquet: row groups → small batches → records and windows."""

from bisect import bisect_right
from collections.abc import Container, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Literal

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.errors import InputError
from batchrun.source.files import content_of
from batchrun.source.rows import rows_of
from batchrun.source.window import START, Position, Record, Window

BATCH_ROWS = 1024  # more gets no faster (measured); a 40 KB text repeated by a dictionary is 40 MB then
BATCH_BYTES = 1 << 20
PAGE_BUFFER_BYTES = 1 << 18  # without one, a whole column chunk is read at once: 1 GB for a 1 GB row group (measured)
DAMAGE = (OSError, pa.ArrowException, UnicodeDecodeError)  # the last for a column's name that is not UTF-8


class _Batch(msgspec.Struct, frozen=True):
    """Rows that follow one another in a file: `row` is the first one's place there, `ordinal` in the input."""

    rows: pa.RecordBatch
    file: int
    row: int
    ordinal: int

    def part(self, first: int, count: int | None = None) -> "_Batch":
        return _Batch(self.rows.slice(first, count), self.file, self.row + first, self.ordinal + first)

    def cut(self, count: int) -> tuple["_Batch", "_Batch"]:
        return self.part(0, count), self.part(count)

    def after(self) -> Position:
        count = self.rows.num_rows
        return Position(self.file, self.row + count, 0, self.ordinal + count)


class ParquetSource:
    """Parquet files of one schema. Windows carry the columns as they are; file metadata is left behind."""

    format: Literal["parquet"] = "parquet"

    def __init__(self, files: tuple[Path, ...]) -> None:
        """Every file's footer was read.

        Raises:
            InputError: a file is cut, damaged, encrypted or has a column name twice, or the schemas differ.
        """
        self.files = files
        self.schema = _schema_of(files[0])
        for file in files[1:]:
            _require_same_schema(files[0], self.schema, file, _schema_of(file))

    def records(self, start: Position = START) -> Iterator[Record]:
        """Every record from `start` on; a value without a Python form is that record's problem.

        Raises:
            InputError: a page is damaged, encrypted, or of a type Arrow can't read.
        """
        origins = [f"{file} row " for file in self.files]
        for batch in self._batches(start):
            try:
                rows = rows_of(batch.rows)
            except ValueError:
                yield from (_record(batch.part(i, 1), origins[batch.file]) for i in range(batch.rows.num_rows))
            else:
                for i, row in enumerate(rows):
                    yield Record(batch.ordinal + i, origins[batch.file], batch.row + i, row)

    def windows(self, start: Position, max_rows: int, max_bytes: int, skip: Container[int] = ()) -> Iterator[Window]:
        """The rows from `start` on without those in `skip`; bytes are Arrow's, dictionaries not counted.

        Raises:
            InputError: as `records`.
        """
        parts: list[pa.RecordBatch] = []
        rows, size, end = 0, 0, start
        for run in self._accepted(start, skip):
            while run.rows.num_rows:
                fitting = _fitting(run.rows, max_rows - rows, max_bytes - size)
                if parts and not fitting:
                    window, parts, rows, size = self._window(parts, end), [], 0, 0
                    yield window  # after letting go of what it was made of
                    del window
                    continue
                part, run = run.cut(max(1, fitting))
                parts.append(part.rows)
                rows, size, end = rows + part.rows.num_rows, size + _size_of(part.rows), part.after()
        if parts:
            yield self._window(parts, end)

    def _window(self, parts: list[pa.RecordBatch], end: Position) -> Window:
        return Window(pa.Table.from_batches(parts, schema=self.schema).combine_chunks(), end)

    def _accepted(self, start: Position, skip: Container[int]) -> Iterator[_Batch]:
        """The longest runs within a batch that have no ordinal of `skip`."""
        for batch in self._batches(start):
            ordinals = range(batch.ordinal, batch.ordinal + batch.rows.num_rows)
            for skipped, run in groupby(ordinals, skip.__contains__):
                places = list(run)
                if not skipped:
                    yield batch.part(places[0] - batch.ordinal, len(places))

    def _batches(self, start: Position) -> Iterator[_Batch]:
        """The rows from `start` on, row group by row group: nested dictionaries can't be read across two."""
        row, ordinal = start.offset, start.ordinal
        for index in range(start.file, len(self.files)):
            first = 0
            with _open(self.files[index]) as file:
                for group in range(file.num_row_groups):
                    behind = first + file.metadata.row_group(group).num_rows
                    if row < behind:
                        for rows in _group(file, self.files[index], group, first, skip=row - first):
                            yield _Batch(rows.replace_schema_metadata(None), index, row, ordinal)
                            row, ordinal = row + rows.num_rows, ordinal + rows.num_rows
                    first = behind
            row = 0


def _group(file: pq.ParquetFile, path: Path, group: int, first: int, skip: int) -> Iterator[pa.RecordBatch]:
    """The rows of a row group behind its first `skip`; `first` is the group's place in the file."""
    meta = file.metadata.row_group(group)
    batch_rows = max(1, min(BATCH_ROWS, BATCH_BYTES * meta.num_rows // max(1, meta.total_byte_size)))
    done = 0
    try:
        for batch in file.iter_batches(batch_size=batch_rows, row_groups=[group]):
            done += batch.num_rows
            if done > skip:
                yield batch.slice(max(0, batch.num_rows - (done - skip)))
    except DAMAGE as error:
        last = first + meta.num_rows - 1
        raise InputError(f"{path} rows {first + done} to {last} can't be read: {_reason(error)}") from error


@contextmanager
def _open(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=PAGE_BUFFER_BYTES, page_checksum_verification=True)
    except DAMAGE as error:
        raise InputError(f"{path} can't be read: {_reason(error)}") from error
    with file:
        yield file


def _reason(error: Exception) -> str:
    text = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    if "crypt" in text:
        return "it is encrypted; decrypt it first"
    if "not implemented" in text or isinstance(error, pa.ArrowNotImplementedError):
        return f"{text}; cast that column to a plain type"
    return f"{text}; the file is damaged or was not written to its end: write or copy it again"


def _schema_of(path: Path) -> pa.Schema:
    if content_of(path) != "parquet":
        raise InputError(f"{path} is no Parquet file; an input has one format")
    try:
        with _open(path) as file:
            schema = file.schema_arrow.remove_metadata()
        names = schema.names
    except DAMAGE as error:
        raise InputError(f"{path} can't be read: {_reason(error)}") from error
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{path} has two columns named '{name}'; rename one")
    return schema


def _require_same_schema(path: Path, schema: pa.Schema, other_path: Path, other: pa.Schema) -> None:
    for name in [*schema.names, *other.names]:
        types = [str(each.field(name).type) if name in each.names else None for each in (schema, other)]
        if types[0] != types[1]:
            has = [f"as {type_}" if type_ else "not at all" for type_ in types]
            raise InputError(
                f"{other_path} has column '{name}' {has[1]}, {path} {has[0]}; the files of an input share one schema"
            )
    if schema.names != other.names:
        raise InputError(f"{other_path} has its columns in another order than {path}; write them in one order")


def _record(batch: _Batch, origin: str) -> Record:
    try:
        return Record(batch.ordinal, origin, batch.row, rows_of(batch.rows)[0])
    except ValueError as error:
        return Record(batch.ordinal, origin, batch.row, {}, str(error))


def _size_of(rows: pa.RecordBatch) -> int:
    """Bytes of the rows themselves: a dictionary is the file's, however few of its rows are here."""
    return sum((c.indices if isinstance(c, pa.DictionaryArray) else c).nbytes for c in rows.columns)


def _fitting(rows: pa.RecordBatch, max_rows: int, max_bytes: int) -> int:
    """How many of the first rows stay within both limits."""
    counts = range(1, min(rows.num_rows, max_rows) + 1)
    return bisect_right(counts, max_bytes, key=lambda count: _size_of(rows.slice(0, count)))
