"""The base part of an open chunk: our columns as they were sealed before, to be updated by newer completions."""

from bisect import bisect_left
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Self, cast

import msgspec
import pyarrow as pa

from batchrun import arrow_files
from batchrun.records import replaces
from batchrun.store.db_tables import Chunk, Reopened
from batchrun.store.rundir import RunDirectory
from batchrun.tables import booked
from batchrun.tables.files import require_digest
from batchrun.tables.rows import as_own, own_schema


class BasePart:
    """Our columns of a sealed part, in memory.

    Raises:
        CheckpointError: the part was changed after it was sealed.
    """

    def __init__(self, path: Path, expected_digest: str, prefix: str) -> None:
        require_digest(path, expected_digest)
        names = own_schema(prefix).names
        empty = own_schema(prefix).empty_table()
        with arrow_files.parquet(path) as file:
            groups = [file.read_row_group(group, columns=names).select(names) for group in range(file.num_row_groups)]
        self._table = pa.concat_tables([as_own(group) for group in groups or [empty]])
        self.rows = cast(list[int], self._table.column("row").to_pylist())
        self.statuses = cast(list[str], self._table.column("status").to_pylist())
        firsts = cast(list[int | None], self._table.column("duplicate_of").to_pylist())
        self.originals = {row: first for row, first in zip(self.rows, firsts, strict=True) if first is not None}

    @classmethod
    def of(cls, chunk: Chunk, directory: RunDirectory, prefix: str) -> Self | None:
        """The chunk's base part, if it has one."""
        if not chunk.generation:
            return None
        return cls(directory.part_of(chunk.chunk, chunk.generation), chunk.part_digest or "", prefix)

    def reopened(self, statuses: Collection[str], variant: int) -> list[Reopened]:
        """The rows with one of the statuses, to be sent again with `variant` of the job."""
        attempts = cast(list[int], self._table.column("attempts").to_pylist())
        costs = self._table.column("cost_usd").to_pylist()
        found = zip(self.rows, attempts, self.statuses, costs, booked.lines(self._table), strict=True)
        return [
            Reopened(row, variant, n, status, None if cost is None else str(cost), msgspec.json.encode(answer).decode())
            for row, n, status, cost, answer in found
            if status in statuses
        ]

    def take(self, rows: Sequence[int]) -> pa.Table:
        """The records of these rows of the part, in this order."""
        places = [bisect_left(self.rows, row) for row in rows]
        return self._table.take(pa.array(places, pa.int64()))

    def updated(self, newer: pa.Table, first_row: int, end_row: int) -> pa.Table:
        """Rows `first_row` to `end_row` - 1 in order: the newer record of each row, or the base part's.

        A failure never replaces an answer.
        """
        start, end = bisect_left(self.rows, first_row), bisect_left(self.rows, end_row)
        old = dict(zip(self.rows[start:end], self.statuses[start:end], strict=True))
        newer_wins: dict[int, bool] = {}
        for row, status in zip(_rows(newer), newer.column("status").to_pylist(), strict=True):
            newer_wins[row] = row not in old or replaces(cast(str, status), old[row])
        from_newer = newer.filter(pa.array([newer_wins[row] for row in _rows(newer)], pa.bool_()))
        older = self._table.slice(start, end - start)
        from_base = older.filter(pa.array([not newer_wins.get(row, False) for row in _rows(older)], pa.bool_()))
        return pa.concat_tables([from_newer, from_base]).sort_by("row")


def _rows(table: pa.Table) -> list[int]:
    return cast(list[int], table.column("row").to_pylist())
