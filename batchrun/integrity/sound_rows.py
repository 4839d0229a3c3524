"""The intact rows of a damaged run, wherever in its directory they are.

A row is kept if its record in the database matches its CRC, or if the pages that hold it in a part or result match
their checksums. Of two records of a row, an answer wins over a failure, then the later attempt, as in a sealed chunk.
"""

from collections.abc import Iterator
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
        found = [*self._of_parts(first_row, end_row), *self._of_result(first_row, end_row)]
        return self._best([*found, self._of_records(first_row, end_row)])

    def _of_parts(self, first_row: int, end_row: int) -> Iterator[pa.Table]:
        for path, (first, last) in self._parts.items():
            if first < end_row and first_row <= last:
                for group in readable_groups.groups(path, self.schema, self._prefix, 0, NO_END):
                    yield self._within(group, first_row, end_row)

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

    def _of_result(self, first_row: int, end_row: int) -> Iterator[pa.Table]:
        """Reads the result's row groups as far as needed and drops those before the span."""
        while not self._ahead or self._last_row(self._ahead[-1]) < end_row - 1:
            group = next(self._result, None)
            if group is None:
                break
            self._ahead.append(group)
        for group in self._ahead:
            yield self._within(group, first_row, end_row)
        self._ahead = [group for group in self._ahead if self._last_row(group) >= end_row]

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
