"""Reads Parquet or CSV files as records and windows of one schema."""

import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Container, Iterator
from itertools import groupby

import msgspec
import pyarrow as pa

from batchrun.errors import InputError, writable
from batchrun.source import csv, hive, parquet, unify
from batchrun.source.content import Format, format_of
from batchrun.source.rows import rows_of
from batchrun.source.window import START, Position, Record, Span, Window, size_of
from batchrun.storage.objects import InputFile


class _Batch(msgspec.Struct, frozen=True):
    """Consecutive rows of a file. `row` is the first one's position in the file, `ordinal` the one in the input."""

    rows: pa.RecordBatch
    file: int
    row: int
    ordinal: int

    def part(self, first: int, count: int | None = None) -> "_Batch":
        return _Batch(self.rows.slice(first, count), self.file, self.row + first, self.ordinal + first)

    def after(self) -> Position:
        count = self.rows.num_rows
        return Position(self.file, self.row + count, 0, self.ordinal + count)


class TableSource:
    """Parquet or CSV files with one schema over all of them (`unify`). File metadata is dropped.

    The keys of folders named `key=value` are the first columns, unless a file has a column of that name.
    """

    def __init__(self, files: tuple[InputFile, ...], span: Span | None = None) -> None:
        """Reads every file's footer or header. With a `span` nothing else is yielded.

        Raises:
            InputError: a file is truncated, damaged or encrypted, has two columns of one name, or its schema can't be
                combined with the others.
        """
        self.files = files
        self._span = span
        self.format: Format = format_of(files[0])
        self._module = csv if self.format == "csv" else parquet
        schemas: list[tuple[InputFile, pa.Schema]] = []
        for file in files:
            if format_of(file) != self.format:
                kind = self.format.capitalize()
                raise InputError(f"{file} is not a {kind} file; all files of an input must have one format")
            schemas.append((file, self._module.schema_of(file)))
        for file, schema in schemas:
            _require_single_names(f"{file} has two columns", schema.names)
            for field in schema:
                _require_single_fields(f"{file}: column '{field.name}'", field.type)
            nested = [field for field in schema if pa.types.is_nested(field.type)]
            parquet.require_writable(pa.schema(nested), f"{file}: ")
        inside = unify.schema_over(schemas)
        self._keys = hive.keys_of(files)
        keys = {name: type_ for name, type_ in hive.fields_of(self._keys).items() if name not in inside.names}
        self.schema: pa.Schema = pa.schema([*(pa.field(name, type_) for name, type_ in keys.items()), *inside])

    def records(self, start: Position = START) -> Iterator[Record]:
        """Every record from `start` on. A value that Python can't hold makes its record invalid.

        Raises:
            InputError: a page is damaged, encrypted, or of a type Arrow can't read.
        """
        origins = [writable(f"{file} row ") for file in self.files]
        for batch in self._batches(start):
            try:
                rows = rows_of(batch.rows)
            except ValueError:  # one by one, to find which rows
                for i in range(batch.rows.num_rows):
                    problem: str | None = None
                    row: dict[str, object] = {}
                    try:
                        (row,) = rows_of(batch.rows.slice(i, 1))
                    except ValueError as error:
                        problem = str(error)
                    yield Record(batch.ordinal + i, origins[batch.file], batch.row + i, row, problem)
            else:
                for i, row in enumerate(rows):
                    yield Record(batch.ordinal + i, origins[batch.file], batch.row + i, row)

    def windows(self, start: Position, max_rows: int, max_bytes: int, skip: Container[int] = ()) -> Iterator[Window]:
        """The rows from `start` on without those in `skip`. `max_bytes` counts Arrow's bytes without dictionaries.

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
                    yield window  # its parts have been released
                    del window
                    continue
                part, run = run.part(0, max(1, fitting)), run.part(max(1, fitting))
                parts.append(part.rows)
                rows, size, end = rows + part.rows.num_rows, size + size_of(part.rows), part.after()
        if parts:
            yield self._window(parts, end)

    def find_span(self, choose: Callable[[int], tuple[int, int]]) -> Span:
        """The span of the ordinals that `choose` returns for the number of records. Parquet footers have that number;
        CSV is read to its end.

        Raises:
            InputError: as `records`.
        """
        counts = [self._module.rows_in(file) for file in self.files]
        first, end = choose(sum(counts))
        file, row = 0, first
        while file < len(counts) - 1 and row >= counts[file]:
            row -= counts[file]
            file += 1
        return Span(Position(file, row, 0, first), end, sum(counts))

    def column(self, name: str) -> Iterator[tuple[int, object]]:
        """(ordinal, value) of every row of the files that have this column. Of Parquet nothing else is read.

        Raises:
            InputError: as `records`.
        """
        ordinal = 0
        for file in self.files:
            if name not in self._module.schema_of(file).names:
                ordinal += self._module.rows_in(file)
                continue
            for batch in self._module.column(file, name):
                try:
                    values = [row[name] for row in rows_of(batch)]
                except ValueError:  # a value that Python can't hold; the check of its record reports it
                    values = [None] * batch.num_rows
                yield from enumerate(values, ordinal)
                ordinal += batch.num_rows

    def _window(self, parts: list[pa.RecordBatch], end: Position) -> Window:
        return Window(pa.Table.from_batches(parts, schema=self.schema).combine_chunks(), end)

    def _accepted(self, start: Position, skip: Container[int]) -> Iterator[_Batch]:
        """The longest stretches of each batch without an ordinal in `skip`."""
        for batch in self._batches(start):
            ordinals = range(batch.ordinal, batch.ordinal + batch.rows.num_rows)
            for skipped, run in groupby(ordinals, skip.__contains__):
                places = list(run)
                if not skipped:
                    yield batch.part(places[0] - batch.ordinal, len(places))

    def _batches(self, start: Position) -> Iterator[_Batch]:
        """The rows from `start` on, in the columns of the whole input."""
        if self._span is not None:
            start = self._span.enter(start)
        end = sys.maxsize if self._span is None else self._span.end
        row, ordinal = start.offset, start.ordinal
        for index in range(start.file, len(self.files)):
            if ordinal >= end:
                return
            for batch in self._module.batches(self.files[index], row):
                rows = batch.slice(0, end - ordinal).replace_schema_metadata(None)
                if rows.schema != self.schema:
                    try:
                        rows = unify.fitted(rows, self.schema, self._keys[index])
                    except ValueError as error:
                        span = f"rows {row} to {row + rows.num_rows - 1}"
                        raise InputError(f"{self.files[index]} {span} can't be read: {error}") from error
                yield _Batch(rows, index, row, ordinal)
                row, ordinal = row + rows.num_rows, ordinal + rows.num_rows
                if ordinal == end:
                    return
            row = 0


def _require_single_fields(place: str, type_: pa.DataType) -> None:
    """No struct of that type, at any depth, has two fields of one name."""
    fields = [type_.field(n) for n in range(type_.num_fields)] if pa.types.is_nested(type_) else []
    if pa.types.is_struct(type_):
        _require_single_names(f"{place} has two fields", [field.name for field in fields], " in one struct")
    for field in fields:
        _require_single_fields(place, field.type)


def _require_single_names(what: str, names: list[str], where: str = "") -> None:
    if len(set(names)) < len(names):
        twice = next(name for name, times in Counter(names).items() if times > 1)
        raise InputError(f"{what} named '{twice}'{where}; rename one")


def _fitting(rows: pa.RecordBatch, max_rows: int, max_bytes: int) -> int:
    """How many rows from the first on stay within both limits."""
    counts = range(1, min(rows.num_rows, max_rows) + 1)
    return bisect_right(counts, max_bytes, key=lambda count: size_of(rows.slice(0, count)))
