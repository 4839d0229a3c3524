"""Reads the row groups of a damaged completions file that are intact.

A page's checksum covers its content, not its header or the file's footer. So a row group counts as intact only if all
pages of our columns match their checksums, the types are ours, and its rows are in order and within their bounds.
Measured: 10,000 flipped bits never led to a wrong value.
"""

import contextlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchrun import arrow_files
from batchrun.errors import CheckpointError
from batchrun.records import Status
from batchrun.tables.rows import OWN_COLUMNS, as_own, own_schema

_STATUSES = pa.array([str(status) for status in Status])

UNREADABLE = (OSError, ValueError, KeyError, IndexError, OverflowError, pa.ArrowException)
"""The exceptions of pyarrow for a damaged file; a name in its footer may be invalid text."""

Group = pa.Table
"""A row group: the columns of the input, null where they can't be read, then ours as `OWN_COLUMNS` has them."""


def groups(path: Path, schema: pa.Schema, prefix: str, first_row: int, end_row: int) -> Iterator[Group]:
    """The intact row groups, in order, in `schema`; none if the footer can't be read.

    `first_row` and `end_row` bound the rows that the file may hold.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(arrow_files.parquet(path))
        except UNREADABLE:
            return
        for number in range(file.num_row_groups):
            try:
                group = _group(file, number, schema, prefix)
            except UNREADABLE:
                continue
            if group is None or (numbers := group.column(prefix + "row")).null_count:
                continue
            # not by the footer's statistics: pyarrow 26 aborts the process when it reads them from a damaged footer
            rows = cast(list[int], numbers.to_pylist())
            in_order = all(before < after for before, after in pairwise(rows))
            if in_order and first_row <= rows[0] and rows[-1] < end_row:
                first_row = rows[-1] + 1
                yield group


def schema_of(path: Path) -> pa.Schema | None:
    """The columns that the file says it has, or None."""
    try:
        return arrow_files.schema_of(path).remove_metadata()
    except UNREADABLE:
        return None


def _group(file: pq.ParquetFile, number: int, schema: pa.Schema, prefix: str) -> Group | None:
    names = own_schema(prefix).names
    own = _columns(file, number, names)
    if own is None or not own.num_rows:
        return None
    parsed = OWN_COLUMNS.get_field_index("parsed")  # it has the type of its job
    types = enumerate(zip(own.schema.types, OWN_COLUMNS.types, strict=True))
    if any(one != other for place, (one, other) in types if place != parsed):
        return None
    own = as_own(own).rename_columns(names)
    if not pc.all(pc.is_in(own.column(prefix + "status"), _STATUSES)).as_py():
        return None
    arrays: list[Any] = []
    for field in schema:
        if field.name in names:
            arrays.append(own.column(field.name))
            continue
        read = _columns(file, number, [field.name])
        sound = read is not None and read.schema.types == [field.type] and read.num_rows == own.num_rows
        arrays.append(read.column(0) if read is not None and sound else pa.nulls(own.num_rows, field.type))
    return pa.Table.from_arrays(arrays, schema=nullable(schema))


def nullable(schema: pa.Schema) -> pa.Schema:
    """The schema with all columns nullable, for lost values."""
    return pa.schema([field.with_nullable(True) for field in schema])


def _columns(file: pq.ParquetFile, number: int, names: list[str]) -> pa.Table | None:
    """The columns of a row group, or None if one of them can't be read."""
    try:
        table = file.read_row_group(number, columns=names)
        table.validate(full=True)
    except UNREADABLE:
        return None
    return table.select(names) if set(names) <= set(table.column_names) else None


def columns(path: Path, names: Sequence[str]) -> Iterator[pa.Table]:
    """These columns of a file whose digest is right, row group by row group.

    Raises:
        CheckpointError: they can't be read.
    """
    try:
        with arrow_files.parquet(path) as file:
            for number in range(file.num_row_groups):
                yield file.read_row_group(number, columns=list(names)).select(names)
    except UNREADABLE as error:
        raise CheckpointError(f"{path}: can't be read: {error}") from error
