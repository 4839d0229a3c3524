"""Answers of earlier results, read out of Parquet files whichever program wrote them: batchrun, polars, DuckDB, Spark.

A file needs the column `request_key` (16 bytes, or 32 hexadecimal digits) and should have `content`; all other columns
of ours are taken where they are there. A prefix before all the names is found by that of `request_key`.
"""

import contextlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from batchrun import arrow_files
from batchrun import compute as pc
from batchrun.errors import InputError
from batchrun.records import Status
from batchrun.source import hive
from batchrun.tables.carried import OF_THE_REQUEST
from batchrun.tables.rows import NOT_IN_PARSED, OWN_COLUMNS, own_columns, prefix_in, with_column

KEY = "request_key"
KEYS_AT_ONCE = 262_144  # 4 MB of keys
KEYS_A_BATCH = 32_768  # where only keys and statuses are read
BATCH_ROWS = 1_000  # where whole answers are read

_ANSWERS = ("content", "function_call", "tool_calls")
"""The columns of an answer. A file that has no `status` has an answer where one of these is not null."""

_UNREAD = OF_THE_REQUEST | {"row", "attempts", "finished_at", "answer_cost_usd", "variant", "invocation"}
"""Columns that are not read: `carried` gives them no value, or another one."""


class OldAnswers:
    """One Parquet file of completions. Close it."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            InputError: it is not one, or can't be read.
        """
        self._path = path
        with self._readable():
            self._file = pq.ParquetFile(arrow_files.opened(path), pre_buffer=False)
        schema = self._file.schema_arrow
        if (prefix := prefix_in(schema.names)) is None:
            self._file.close(force=True)
            raise InputError(f"{path}: no answers to reuse: it has no column {KEY}")

        self._names = {name: prefix + name for name in OWN_COLUMNS.names if prefix + name in schema.names}
        keys_of_folders = hive.texts_of(path)
        self._of_folder = {
            name: keys_of_folders[prefix + name]
            for name in OWN_COLUMNS.names
            if prefix + name in keys_of_folders and name not in self._names
        }
        if not self._names.keys() & set(_ANSWERS):
            self._file.close(force=True)
            raise InputError(f"{path}: no answers to reuse: it has no column {prefix}content")
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._first = self._end = 0  # the rows of the batch at hand
        self._batch: pa.RecordBatch | None = None

    def keys(self, statuses: Collection[str], *, copies: bool) -> Iterator[tuple[Any, Any]]:
        """The request keys of acceptable answers with their rows in the file, 262,144 rows at a time.

        `copies`: answers that an equal row of the same run was given without a request count, too.
        """
        wanted = [name for name in (KEY, "status", "duplicate_of") if name in self._names]
        if "status" not in self._names:
            wanted += [name for name in _ANSWERS if name in self._names]
        size = KEYS_A_BATCH if "status" in self._names else BATCH_ROWS
        keys: list[pa.Array[Any]] = []
        rows: list[pa.Array[Any]] = []
        first = held = 0
        with self._readable():
            for group in range(self._file.num_row_groups):
                for batch in self._batches_of(group, wanted, size):
                    places = self._acceptable(batch, statuses, copies=copies)
                    key = _as_keys(batch.column(0).take(places), self._path)
                    known = pc.is_valid(key)
                    keys.append(key.filter(known))
                    rows.append(pc.add(places.filter(known), pa.scalar(first, pa.int64())))
                    first, held = first + batch.num_rows, held + len(keys[-1])
                    if held >= KEYS_AT_ONCE:
                        yield pa.chunked_array(keys), pa.chunked_array(rows)
                        keys, rows, held = [], [], 0
        if keys:
            yield pa.chunked_array(keys), pa.chunked_array(rows)

    def take(self, rows: Sequence[int]) -> pa.Table:
        """The rows of the file in this order, as `OWN_COLUMNS`; what a file does not have is null.

        Fastest where rows ascend from call to call: then the file is read once. Memory is that of a batch.
        """
        wanted = sorted(set(rows))
        found: list[pa.RecordBatch] = []
        with self._readable():
            at = 0
            while at < len(wanted):
                batch = self._at(wanted[at])
                upto = at
                while upto < len(wanted) and wanted[upto] < self._end:
                    upto += 1
                places = [row - self._first for row in wanted[at:upto]]
                found.append(batch.take(pa.array(places, pa.int64())))
                at = upto
        place = {row: number for number, row in enumerate(wanted)}
        table = pa.Table.from_batches(found) if found else pa.table({})
        return self._as_ours(table.take(pa.array([place[row] for row in rows], pa.int64())))

    def close(self) -> None:
        self._file.close(force=True)

    def _at(self, row: int) -> pa.RecordBatch:
        """The batch that holds the row: that at hand, one further on, or from the start of its row group."""
        if self._batch is None or not self._first <= row:
            self._seek(row)
        while row >= self._end:
            batch = next(self._batches, None)
            if batch is None:
                self._seek(row)
                continue
            self._first, self._end, self._batch = self._end, self._end + batch.num_rows, batch
        assert self._batch is not None
        return self._batch

    def _seek(self, row: int) -> None:
        """The next batch is the first one of the row's group."""
        first = 0
        for group in range(self._file.num_row_groups):
            rows = self._file.metadata.row_group(group).num_rows
            if row < first + rows:
                wanted = [name for name in self._names if name not in _UNREAD]
                self._batches = self._batches_of(group, wanted, BATCH_ROWS)
                self._first = self._end = first
                self._batch = None
                return
            first += rows
        raise InputError(f"{self._path}: has no row {row:,} any more")

    def _batches_of(self, group: int, names: Sequence[str], size: int) -> Iterator[pa.RecordBatch]:
        columns = [self._names[name] for name in names]
        for batch in self._file.iter_batches(size, row_groups=[group], columns=columns, use_threads=False):
            yield batch.select(columns).rename_columns(list(names))

    def _acceptable(self, batch: pa.RecordBatch, statuses: Collection[str], *, copies: bool) -> "pa.Array[Any]":
        """The places of the batch's rows whose answer may be reused."""
        if "status" in self._names:
            good = pc.is_in(batch.column("status").cast(pa.string()), pa.array(sorted(statuses), pa.string()))
        elif "status" in self._of_folder:
            good = pa.array([self._of_folder["status"] in statuses] * batch.num_rows, pa.bool_())
        elif Status.OK in statuses:
            good = pa.array([False] * batch.num_rows)
            for name in _ANSWERS:
                if name in self._names:
                    good = pc.or_(good, pc.is_valid(batch.column(name)))
        else:
            good = pa.array([False] * batch.num_rows)
        if not copies and "duplicate_of" in self._names:
            good = pc.and_(good, pc.is_null(batch.column("duplicate_of")))
        return pc.indices_nonzero(good).cast(pa.int64())

    def _as_ours(self, table: pa.Table) -> pa.Table:
        """The columns as `OWN_COLUMNS`: a tool that wrote the file again may have changed their types."""
        values: dict[str, Any] = {}
        for name, text in self._of_folder.items():
            same = pa.repeat(pa.scalar(text, pa.string()), table.num_rows)
            values[name] = same.cast(OWN_COLUMNS.field(name).type)
        for field in OWN_COLUMNS:
            if field.name not in table.column_names or field.name == "parsed" or field.name in values:
                continue
            column = table.column(field.name)
            if field.name == KEY:
                values[KEY] = _as_keys(column.combine_chunks(), self._path)
                continue
            try:
                values[field.name] = column.cast(field.type)
            except pa.ArrowException as error:
                raise InputError(
                    f"{self._path}: column {self._names[field.name]} is {column.type} instead of {field.type}; "
                    "cast it, or leave it out"
                ) from error
        ours = own_columns(values, table.num_rows)
        if "status" not in table.column_names and "status" not in self._of_folder:
            ours = with_column(ours, "status", ["ok"] * table.num_rows)

        # `parsed` is the content of each row whose answer was the requested JSON: of those that have something there,
        # or an error that only says that it could not hold all of a good answer.
        contents = cast(list[str | None], ours.column("content").to_pylist())
        errors: list[Any] = ours.column("error").to_pylist()
        noted = [error is not None and error["kind"] == NOT_IN_PARSED for error in errors]
        if "parsed" in table.column_names:
            was = cast(list[bool], pc.is_valid(table.column("parsed")).to_pylist())
            found = [there or note for there, note in zip(was, noted, strict=True)]
        else:  # unknown: an object or an array is taken as it, since a text that is a number may be prose
            found = [text is not None and text.lstrip().startswith(("{", "[")) for text in contents]
        parsed = [text if wanted and _is_json(text) else None for text, wanted in zip(contents, found, strict=True)]
        errors = [None if note else error for error, note in zip(errors, noted, strict=True)]
        return with_column(with_column(ours, "error", errors), "parsed", parsed)

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{self._path}: its answers can't be read: {error}") from error


def _is_json(text: str | None) -> bool:
    try:
        msgspec.json.decode(text or "")
    except msgspec.DecodeError:
        return False
    return True


def _as_keys(column: Any, path: Path) -> Any:
    """The column as 16 bytes a row; null where it holds something else."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
        return pa.array([_from_hex(text) for text in column.to_pylist()], pa.binary(16))
    if column.type == pa.binary(16):
        return column
    try:
        binary = column.cast(pa.large_binary())
    except pa.ArrowException as error:
        raise InputError(f"{path}: its column {KEY} is {column.type}, not 16 bytes") from error
    whole = pc.equal(pc.binary_length(binary), pa.scalar(16, pa.int32()))
    return pc.if_else(whole, binary, pa.scalar(None, pa.large_binary())).cast(pa.binary(16))


def _from_hex(text: Any) -> bytes | None:
    try:
        key = bytes.fromhex(text or "")
    except ValueError:
        return None
    return key if len(key) == 16 else None
