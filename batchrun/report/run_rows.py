"""Reads the rows of a run's result by column, at most a row group or 65,536 rows of narrow columns at once."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun import arrow_files
from batchrun import compute as pc
from batchrun.errors import InputError
from batchrun.source import hive
from batchrun.store import result_files
from batchrun.store.result_folder import MANIFEST
from batchrun.tables.rows import OWN_COLUMNS, prefix_in

_T = TypeVar("_T")


class Result(NamedTuple):
    """The files of a result in the order of their rows; our columns' names in them start with `prefix`."""

    files: tuple[Path, ...]
    prefix: str
    schema: pa.Schema

    @property
    def inputs(self) -> list[str]:
        """The names of the input's columns."""
        own = {self.prefix + name for name in OWN}  # a folder's name may be a column of ours
        return [
            name for name in self.schema.names[: self.schema.get_field_index(self.prefix + "row")] if name not in own
        ]


def result_of(place: Path) -> Result | None:
    """The result of the run in the directory, or the file itself; None if there is none, or it is not ours.

    An incomplete run has one after `batchrun export`.

    Raises:
        InputError: the file can't be read.
    """
    files = result_files.of(place)
    if not files:
        return None
    try:
        schema = arrow_files.schema_of(files[0])
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{files[0]}: can't be read as Parquet: {error}") from error
    place = place.parent if place.name == MANIFEST else place
    if (place / MANIFEST).exists():  # a folder that was moved: keys of partitions are in its folders' names alone
        keys = [name for name in hive.texts_of(files[0].relative_to(place)) if name not in schema.names]
        schema = pa.schema([*(pa.field(name, pa.string()) for name in keys), *schema])
    if (prefix := prefix_in(schema.names)) is None:
        return None
    needed = ("row", "status", "finished_at", "latency_s", "requested_model", "cost_usd", "parsed", "reused")
    if any(prefix + name not in schema.names for name in needed):
        return None
    return Result(tuple(files), prefix, schema)


def if_readable(place: Path, read: Callable[[Result], _T]) -> _T | None:
    """The result of `read` on the run's rows; None if they can't be read: a bill can do without."""
    try:
        result = result_of(place)
        return None if result is None else read(result)
    except InputError:
        return None


def counts(column: Any) -> dict[Any, int]:
    """Value → how often it occurs, without nulls."""
    return {each["values"]: each["counts"] for each in pc.value_counts(pc.drop_null(column)).to_pylist()}


_WIDE = frozenset({"parsed", "content", "raw", "choices", "error"})
"""Columns read one row group at a time: they may be large, and Arrow can't join dictionaries in structs."""

ROWS_AT_ONCE = 65_536  # narrow columns of so many rows are a few MB


def _together(file: pq.ParquetFile, *, narrow: bool) -> Iterator[list[int]]:
    """Row groups to read at once: opening a small group of narrow columns costs more than reading it."""
    groups: list[int] = []
    held = 0
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if groups and (not narrow or held + count > ROWS_AT_ONCE):
            yield groups
            groups, held = [], 0
        groups.append(group)
        held += count
    if groups:
        yield groups


def _ours(table: pa.Table, first: int) -> pa.Table:
    """Casts our columns, from position `first` on, to our types: a tool that rewrote the file may have changed them."""
    for place in range(first, table.num_columns):
        field = table.schema.field(place)
        wanted = OWN_COLUMNS.field(field.name).type
        if field.type != wanted and (field.name != "parsed" or pa.types.is_null(field.type)):
            table = table.set_column(place, field.name, table.column(place).cast(wanted))
    return table


def tables(result: Result, own: Sequence[str], inputs: Sequence[str] = ()) -> Iterator[pa.Table]:
    """The rows, some row groups at a time, with the `inputs` and then the `own` columns, which lose their prefix.

    Raises:
        InputError: a file can't be read.
    """
    names = [*inputs, *(result.prefix + name for name in own)]
    for path in result.files:
        try:
            with arrow_files.parquet(path, checked=False) as file:
                for groups in _together(file, narrow=not inputs and not set(own) & _WIDE):
                    table = file.read_row_groups(groups, columns=names, use_threads=False)
                    for name in set(names).difference(table.column_names):
                        value = pa.scalar(hive.texts_of(path)[name], pa.string())
                        table = table.append_column(name, pa.repeat(value, table.num_rows))
                    yield _ours(table.select(names).rename_columns([*inputs, *own]), len(inputs))
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path}: can't be read: {error}") from error


OWN = tuple(OWN_COLUMNS.names)
"""The names of our columns."""
