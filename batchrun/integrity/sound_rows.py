"""The rows of a damaged run that can be believed, from wherever in its directory they are.

A row is kept where a record of it matches its own CRC in the database (in pages that are free by now, too), or where
the pages of a part or result that hold it match their checksums. Of two, an answer stands before a failure, then the
later one: what a seal would have kept.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from batchrun.integrity import db_records, readable_groups
from batchrun.integrity.db_records import DbRecords, rank
from batchrun.records import Completion
from batchrun.store.rundir import RunDirectory
from batchrun.tables.rows import own_schema, own_table

NO_END = 2**63


class SoundRows:
    """Give it spans of rows in ascending order; memory is bounded by the largest of them, and the database's rows."""

    def __init__(self, directory: RunDirectory, known: DbRecords, schema: pa.Schema, prefix: str) -> None:
        """`schema` is that of the output, with `parsed` as JSON text; the input's columns are null where they can't be
        read.
        """
        self._directory = directory
        self._known = known
        self._prefix = prefix
        self.schema = readable_groups.nullable(schema)
        self._result = readable_groups.groups(directory.completions, schema, prefix, 0, NO_END)
        self._ahead: list[pa.Table] = []

    def between(self, first_row: int, end_row: int) -> pa.Table:
        """The rows kept of `first_row` to `end_row` - 1 of the input, in order."""
        found = [*self._of_parts(first_row, end_row), *self._of_result(first_row, end_row)]
        table = self._best([*found, self._of_records(self._known.rows, first_row, end_row)])
        if table.num_rows < end_row - first_row and self._known.whole and not self._is_open(first_row):
            table = self._best([table, self._of_records(self._carved, first_row, end_row)])
        return table

    def _of_parts(self, first_row: int, end_row: int) -> Iterator[pa.Table]:
        for path, (first, last) in self._parts.items():
            if first < end_row and first_row <= last:
                for group in readable_groups.groups(path, self.schema, self._prefix, 0, NO_END):
                    yield self._within(group, first_row, end_row)

    @cached_property
    def _parts(self) -> dict[Path, tuple[int, int]]:
        """The first and the last row of each part that has a readable one."""
        files = (*self._directory.parts.glob("*.parquet"), *self._directory.completions_folder.glob("*.parquet"))
        spans: dict[Path, tuple[int, int]] = {}
        for path in sorted(files):
            for group in readable_groups.groups(path, own_schema(self._prefix), self._prefix, 0, NO_END):
                rows = self._rows(group)
                spans[path] = spans.get(path, (rows[0],))[0], rows[-1]
        return spans

    def _of_result(self, first_row: int, end_row: int) -> Iterator[pa.Table]:
        """The result's groups are taken as far as they are needed, and let go when they lie behind."""
        while not self._ahead or self._last_row(self._ahead[-1]) < end_row - 1:
            group = next(self._result, None)
            if group is None:
                break
            self._ahead.append(group)
        for group in self._ahead:
            yield self._within(group, first_row, end_row)
        self._ahead = [group for group in self._ahead if self._last_row(group) >= end_row]

    def _of_records(self, records: dict[int, Completion], first_row: int, end_row: int) -> pa.Table:
        found = [records[row] for row in sorted(records) if first_row <= row < end_row]
        own = own_table(found, keep_raw=True)
        named = own.rename_columns(own_schema(self._prefix).names)
        arrays: list[Any] = [
            named.column(field.name) if field.name in named.column_names else pa.nulls(len(found), field.type)
            for field in self.schema
        ]
        return pa.Table.from_arrays(arrays, schema=self.schema)

    @cached_property
    def _carved(self) -> dict[int, Completion]:
        return db_records.left(self._directory.checkpoint).rows

    def _is_open(self, row: int) -> bool:
        """True for a row of an open chunk: it may just have no answer yet."""
        return any(chunk.open and chunk.first_row <= row < chunk.end_row for chunk in self._known.chunks)

    def _best(self, candidates: list[pa.Table]) -> pa.Table:
        together = pa.concat_tables([table.select(self.schema.names) for table in candidates])
        statuses = cast(list[str], together.column(self._prefix + "status").to_pylist())
        attempts = cast(list[int], together.column(self._prefix + "attempts").to_pylist())
        ranks = [rank(*each) for each in zip(statuses, attempts, strict=True)]
        best: dict[int, int] = {}
        for place, row in enumerate(self._rows(together)):
            if ranks[place] > ranks[best.setdefault(row, place)]:
                best[row] = place
        return together.take(pa.array([best[row] for row in sorted(best)], pa.int64()))

    def _within(self, group: pa.Table, first_row: int, end_row: int) -> pa.Table:
        return group.filter(pa.array([first_row <= row < end_row for row in self._rows(group)], pa.bool_()))

    def _rows(self, table: pa.Table) -> list[int]:
        return cast(list[int], table.column(self._prefix + "row").to_pylist())

    def _last_row(self, table: pa.Table) -> int:
        return cast(int, table.column(self._prefix + "row")[-1].as_py())
