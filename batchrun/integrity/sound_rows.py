"""The intact rows of a damaged run, wherever in its directory they are.

A row is kept if its record in the database matches its CRC, or if the pages that hold it in a part or result match
their checksums. Of two records of a row, an answer wins over a failure, then the later attempt, as in a sealed chunk.
"""

from functools import cached_property
from pathlib import Path
from typing import Any, cast

import pyarrow as pa

from batchrun.integrity import readable_groups
from batchrun.integrity.db_records import DbRecords, rank
from batchrun.store.rundir import RunDirectory
from batchrun.tables.rows import own_schema, own_table

NO_END = 2**63  # above every row number, which are int64


class SoundRows:
    """Call `between` with ascending spans. Memory is bounded by the largest of them plus the database's rows."""

    def __init__(self, directory: RunDirectory, known: DbRecords, schema: pa.Schema, prefix: str) -> None:
        """`schema` is that of the output, with `parsed` as JSON text. Input columns that can't be read are null."""
        self._directory = directory
        self._known = known
        self._prefix = prefix
        self.schema = readable_groups.nullable(schema)
        self._result = readable_groups.groups(directory.completions, schema, prefix, 0, NO_END)
        self._ahead: list[pa.Table] = []

    def between(self, first_row: int, end_row: int) -> pa.Table:
        """The intact rows from `first_row` to `end_row` - 1, in order."""
        found: list[pa.Table] = []
        for path, (first, last) in self._parts.items():
            if first < end_row and first_row <= last:
                found += readable_groups.groups(path, self.schema, self._prefix, 0, NO_END)
        # Of the result, which is in order, as many groups are read as the span needs; those before it are dropped.
        while not self._ahead or self._rows(self._ahead[-1])[-1] < end_row - 1:
            if (group := next(self._result, None)) is None:
                break
            self._ahead.append(group)
        found += self._ahead
        self._ahead = [group for group in self._ahead if self._rows(group)[-1] >= end_row]

        found.append(self._of_records(first_row, end_row))
        together = pa.concat_tables([group.select(self.schema.names) for group in found])
        statuses = cast(list[str], together.column(self._prefix + "status").to_pylist())
        attempts = cast(list[int], together.column(self._prefix + "attempts").to_pylist())
        best: dict[int, int] = {}
        for place, row in enumerate(self._rows(together)):
            if first_row <= row < end_row:
                known = best.setdefault(row, place)
                if rank(statuses[place], attempts[place]) > rank(statuses[known], attempts[known]):
                    best[row] = place
        return together.take(pa.array([best[row] for row in sorted(best)], pa.int64()))

    @cached_property
    def _parts(self) -> dict[Path, tuple[int, int]]:
        """The first and last row of each part with a readable row."""
        files = (*self._directory.parts.glob("*.parquet"), *self._directory.completions_folder.glob("*.parquet"))
        spans: dict[Path, tuple[int, int]] = {}
        for path in sorted(files):
            for group in readable_groups.groups(path, own_schema(self._prefix), self._prefix, 0, NO_END):
                rows = self._rows(group)
                spans[path] = spans.get(path, (rows[0],))[0], rows[-1]
        return spans

    def _of_records(self, first_row: int, end_row: int) -> pa.Table:
        records = self._known.rows
        found = [records[row] for row in sorted(records) if first_row <= row < end_row]
        own = own_table(found, keep_raw=True)
        named = own.rename_columns(own_schema(self._prefix).names)
        arrays: list[Any] = [
            named.column(field.name) if field.name in named.column_names else pa.nulls(len(found), field.type)
            for field in self.schema
        ]
        return pa.Table.from_arrays(arrays, schema=self.schema)

    def _rows(self, table: pa.Table) -> list[int]:
        return cast(list[int], table.column(self._prefix + "row").to_pylist())
