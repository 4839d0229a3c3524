"""Rows that take their answer without a request: whether that is settled, and how long its record is kept."""

import functools
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import cast

import pyarrow as pa

from batchrun.job.settings import Output
from batchrun.store.base_part import BasePart
from batchrun.store.carry_over import CarryOver, Taken
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.db_tables import Chunk
from batchrun.store.open_chunk import OpenChunk
from batchrun.store.rundir import RunDirectory
from batchrun.tables.rows import own_table


class Copies:
    """The copies among a run's rows: each takes the answer of an equal row of this run, or of an earlier result.

    `chunks` are the run's so far, by number: `Chunks` adds new ones to this list, and replaces those that it seals.
    """

    def __init__(
        self, directory: RunDirectory, checkpoint: Checkpoint, chunks: list[Chunk], carry: CarryOver, settings: Output
    ) -> None:
        self._directory = directory
        self._checkpoint = checkpoint
        self._chunks = chunks
        self._carry = carry
        self._settings = settings
        self._part = functools.lru_cache(maxsize=2)(self._base)  # copies of rows of a part come together

    def taken(self, open_chunk: OpenChunk, first_row: int, end_row: int) -> dict[int, Taken]:
        """Of these rows of the chunk, those that take their answer without a request, and where it is."""
        if not open_chunk.has_carried:
            return {}
        rows = range(first_row, end_row)
        found = {
            row: each for row, each in self._carry.window(first_row, end_row).items() if open_chunk.is_carried(row)
        }
        found |= {row: each for row, each in open_chunk.earlier.copied_again.items() if row in rows}
        return dict(sorted(found.items()))

    def are_answered(self, full: OpenChunk) -> bool:
        """Whether the rows whose answers the chunk's copies take are all settled."""
        if full.waits_for is None:
            first, end = full.chunk.first_row, full.chunk.end_row
            taken = self.taken(full, first, end).values()
            full.waits_for = {each.original for each in taken if each.of_this_run and not first <= each.original < end}
        full.waits_for = {row for row in full.waits_for if self._chunk_of(row).open}
        full.waits_for -= self._checkpoint.rows_among(list(full.waits_for))
        for number in {self._chunk_of(row).chunk for row in full.waits_for}:
            chunk = self._chunks[number]
            if (base := self._base(chunk)) is not None:
                full.waits_for -= set(base.rows) - self._checkpoint.reopened(chunk).keys()
        return not full.waits_for

    def records(self, taken: Mapping[int, Taken]) -> pa.Table:
        """The records of these rows, in order.

        Raises:
            InputError: an earlier result is gone, or not what it was.
        """
        return self._carry.table(taken, self._own_answers, invocation=self._checkpoint.invocation)

    def kept(self, chunk: Chunk, opened_rows: int) -> list[int]:
        """Of this chunk, which is sealed now: the rows whose answers copies in later, unsealed chunks still take.

        `opened_rows` is one past the last row of the newest chunk.
        """
        return [
            row
            for row, last in self._carry.last_copies(chunk.first_row, chunk.end_row).items()
            if last >= chunk.end_row and (last >= opened_rows or self._chunk_of(last).open)
        ]

    def dropped(self, open_chunk: OpenChunk) -> list[int]:
        """Rows of earlier chunks whose records are not needed any more after this chunk, which is sealed now."""
        first, end = open_chunk.chunk.first_row, open_chunk.chunk.end_row
        taken = self.taken(open_chunk, first, end).values()
        before = {each.original for each in taken if each.of_this_run and each.original < first}
        return [row for row in before if self._carry.last_copies(row, row + 1).get(row, -1) < end]

    def _own_answers(self, rows: Sequence[int]) -> pa.Table:
        """The records of settled rows of this run, in this order: from the database, else from their parts."""
        records = self._checkpoint.records_of(sorted(set(rows)))
        found = {record.row for record in records}
        tables = [own_table(records, keep_raw=self._settings.keep_raw)]
        by_chunk: dict[int, list[int]] = {}
        for row in sorted(set(rows) - found):
            by_chunk.setdefault(self._chunk_of(row).chunk, []).append(row)
        for number, of_chunk in by_chunk.items():
            part = self._part(self._chunks[number])
            assert part is not None, "a settled row is in the database or in a part"
            tables.append(part.take(of_chunk))
        together = pa.concat_tables(tables)
        place = {row: at for at, row in enumerate(cast(list[int], together.column("row").to_pylist()))}
        return together.take(pa.array([place[row] for row in rows], pa.int64()))

    def _base(self, chunk: Chunk) -> BasePart | None:
        return BasePart.of(chunk, self._directory, self._settings.prefix)

    def _chunk_of(self, row: int) -> Chunk:
        return self._chunks[bisect_right(self._chunks, row, key=lambda chunk: chunk.first_row) - 1]
