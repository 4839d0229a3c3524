"""Opens chunks and seals them into parts. `open_next` and `seal` block: call them in threads."""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import cast

import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from batchrun.errors import ANOTHER, CheckpointError, InputError
from batchrun.job.job import Output
from batchrun.records import Completion, Discarded, Row
from batchrun.response import packed
from batchrun.source import START, FileIdentity, Position, Source, Window, changed
from batchrun.store.base_part import BasePart
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.db_tables import Chunk, Reopened
from batchrun.store.rundir import RunDirectory
from batchrun.store.stored_window import BATCH_ROWS, StoredWindow, typed, write
from batchrun.tables import files, pending
from batchrun.tables.arrow_types import JSON, Column
from batchrun.tables.json_columns import ColumnTypes
from batchrun.tables.rows import OWN_COLUMNS, joined, own_table


class OpenChunk:
    """A chunk whose rows are sent. `left` counts those without a completion; `is_new`: no row of it was sent before."""

    def __init__(
        self,
        chunk: Chunk,
        window: StoredWindow,
        settled: set[int] | None = None,
        discarded: dict[int, list[Discarded]] | None = None,
        lost: dict[int, int] | None = None,
        reopened: dict[int, Reopened] | None = None,
    ) -> None:
        """By row: `discarded` attempts, the number of the last attempt that was `lost`, and the `reopened` rows."""
        self.chunk = chunk
        self.window = window
        self.discarded = discarded or {}
        self.lost = lost or {}
        self.reopened = reopened or {}
        self._settled = settled or set()
        self.left = chunk.rows - len(self._settled)
        self.is_new = not (self.discarded or self.lost or self.reopened)
        self._only: list[int] | None = None

    def to_send(self) -> Iterator[int]:
        """The rows still to be sent, by their numbers."""
        return (row for row in range(self.chunk.first_row, self.chunk.end_row) if row not in self._settled)

    def limit_to(self, only: Collection[int]) -> bool:
        """Of the rows still to be sent, `rows` gives these alone from now on; False if there are none."""
        self._only = [row for row in self.to_send() if row in only]
        return bool(self._only)

    def rows(self) -> Iterator[list[Row]]:
        """The rows to send, in order, up to 1,000 at a time."""
        if self._only is not None:
            yield [self.window.row(row) for row in self._only]
            return
        for batch in self.window.rows():
            yield [row for row in batch if row.row not in self._settled] if self._settled else batch


class Layout(msgspec.Struct, frozen=True):
    """How a run's rows become chunks. `identities` are the source's files as they were checked, `rejected` the ordinals
    of invalid records; `types` are those of JSONL columns, `parsed` the column of answers in JSON. `number` counts how
    often a changed input or job was accepted; the run ends after `limit` rows.
    """

    source: Source
    identities: tuple[FileIdentity, ...]
    rejected: frozenset[int]
    types: ColumnTypes | None
    schema: pa.Schema
    settings: Output
    parsed: Column = JSON
    number: int = 0
    limit: int | None = None


class Chunks:
    """All chunks of a run, in order: first those in the checkpoint, then new ones from the source."""

    def __init__(self, directory: RunDirectory, checkpoint: Checkpoint, layout: Layout) -> None:
        self._directory = directory
        self._checkpoint = checkpoint
        self._layout = layout
        self._source = layout.source
        self._types = layout.types
        self._schema = layout.schema
        self._settings = layout.settings
        self._parsed = layout.parsed
        self._limit = layout.limit
        on_record = checkpoint.chunks()
        self.sealed = {chunk.chunk: chunk for chunk in on_record if not chunk.open}
        self._opened = iter([chunk for chunk in on_record if chunk.open])
        self._next = len(on_record)
        self._next_row = on_record[-1].end_row if on_record else 0
        self._position = msgspec.json.decode(on_record[-1].end_position, type=Position) if on_record else START
        self._windows = self._window_of(self._settings.chunk_rows)

    def open_next(self) -> OpenChunk | None:
        """The next chunk with rows to send, its input stored; None if there is no other.

        Raises:
            InputError: the input has changed since the run started.
        """
        for chunk in self._opened:
            reopened = self._reopen(chunk)
            if reopened.left:
                return reopened
            self.seal(reopened)  # the process died between the last row's commit and the seal
        self._check_unchanged()
        window_read = self._next_window()
        if window_read is None:
            return None
        self._check_unchanged()
        return self._open(window_read)

    def seal(self, open_chunk: OpenChunk) -> None:
        """Writes the chunk's rows as a part; deletes them from the database, its stored input and its base part."""
        chunk = open_chunk.chunk
        generation = chunk.generation + 1
        part = self._directory.part_of(chunk.chunk, generation)
        batches = self._batches(open_chunk)
        part_digest = files.write_part(part, self._schema, batches, self._settings, chunk.rows)
        sealed = msgspec.structs.replace(chunk, generation=generation, part_digest=part_digest, open=0)
        self._checkpoint.seal_chunk(sealed)
        self.sealed[chunk.chunk] = sealed
        self._input_of(chunk.chunk).unlink(missing_ok=True)
        if chunk.generation:
            self._directory.part_of(chunk.chunk, chunk.generation).unlink(missing_ok=True)

    def remove_orphans(self) -> None:
        """Deletes files in `parts/` that belong to no chunk, which a killed process left."""
        known = {self._input_of(chunk.chunk) for chunk in self._checkpoint.chunks() if chunk.open}
        for chunk in self._checkpoint.chunks():
            known.add(self._directory.part_of(chunk.chunk, chunk.generation))
        for path in self._directory.parts.iterdir():
            if path not in known:
                path.unlink()

    def _next_window(self) -> Window | None:
        """The rows of the next chunk; `limit` may cut the last one."""
        left = None if self._limit is None else self._limit - self._next_row
        if left is not None and left <= 0:
            return None
        if left is not None and left < self._settings.chunk_rows:
            self._windows = self._window_of(left)
        return next(self._windows, None)

    def _window_of(self, rows: int) -> Iterator[Window]:
        return self._source.windows(self._position, rows, self._settings.chunk_bytes, self._layout.rejected)

    def _input_of(self, chunk: int) -> Path:
        return self._directory.input_of(chunk, self._layout.number)

    def _check_unchanged(self) -> None:
        if (what := changed(self._source.files, self._layout.identities)) is not None:
            raise InputError(f"the input changed while the run works: {what}; restore it, or {ANOTHER}")

    def _reopen(self, chunk: Chunk) -> OpenChunk:
        discarded: dict[int, list[Discarded]] = {}
        for attempt in self._checkpoint.discarded(chunk):
            discarded.setdefault(attempt.row, []).append(attempt)
        settled, reopened = self._checkpoint.settled_rows(chunk), self._checkpoint.reopened(chunk)
        if (base := self._base(chunk)) is not None:
            settled |= set(base.rows) - reopened.keys()
        return OpenChunk(
            chunk,
            StoredWindow(self._input_of(chunk.chunk), chunk.input_digest, chunk.first_row),
            settled,
            discarded,
            self._checkpoint.last_lost_attempts(chunk),
            reopened,
        )

    def _base(self, chunk: Chunk) -> BasePart | None:
        """Our columns of the chunk's base part, if it has one."""
        if not chunk.generation:
            return None
        path = self._directory.part_of(chunk.chunk, chunk.generation)
        return BasePart(path, chunk.part_digest or "", self._settings.prefix)

    def _open(self, window: Window) -> OpenChunk:
        path = self._input_of(self._next)
        chunk = Chunk(
            chunk=self._next,
            first_row=self._next_row,
            rows=window.rows,
            end_position=msgspec.json.encode(window.end).decode(),
            input_digest=write(path, window.table),
        )
        self._checkpoint.open_chunk(chunk)
        self._position = window.end
        self._next += 1
        self._next_row = chunk.end_row
        return OpenChunk(chunk, StoredWindow(path, chunk.input_digest, chunk.first_row))

    def _batches(self, open_chunk: OpenChunk, *, with_pending: bool = False) -> Iterator[pa.RecordBatch]:
        """The chunk's rows with their completions; newer ones replace those of the base part.

        A row without a completion is an error, unless `with_pending`.
        """
        row = open_chunk.chunk.first_row
        base = self._base(open_chunk.chunk)
        for window in open_chunk.window.tables(self._types):
            completions = self._checkpoint.completions(row, row + window.num_rows)
            for first_row, end_row, settled in _by_size(row, row + window.num_rows, completions):
                table, own = window.slice(first_row - row, end_row - first_row), self._own(settled)
                if base is not None:
                    own = base.updated(own, first_row, end_row)
                if with_pending:
                    own = pending.beside(own, first_row, end_row, open_chunk.discarded, open_chunk.lost)
                if own.num_rows != table.num_rows:
                    raise CheckpointError(f"chunk {open_chunk.chunk.chunk}: rows are missing from the checkpoint")
                yield joined(table, own, self._schema, self._parsed)
            row += window.num_rows

    def _own(self, completions: Sequence[Completion]) -> pa.Table:
        keep_raw = self._settings.raw == "always"
        return own_table(completions, keep_raw=keep_raw)

    # ── for a program that reads rows as they are settled ─────────────────────────────────────────────────────────────

    def rows_of(self, records: Sequence[Completion], inputs: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
        """These rows as in the output; `inputs` are their slices of windows. Any thread may call it."""
        return joined(typed(inputs, self._types), self._own(records), self._schema, self._parsed)

    def settled(self) -> Iterator[pa.RecordBatch]:
        """The rows that have a completion, in order, as in the output. Call it before `open_next`."""
        for chunk in self._checkpoint.chunks():
            if chunk.open:
                yield from self._settled_rows(self._reopen(chunk))
            else:
                part = self._directory.part_of(chunk.chunk, chunk.generation)
                yield from files.batches_of(part)

    def _settled_rows(self, open_chunk: OpenChunk) -> Iterator[pa.RecordBatch]:
        row, base = open_chunk.chunk.first_row, self._base(open_chunk.chunk)
        for table in open_chunk.window.tables(self._types):
            end_row = row + table.num_rows
            completions = self._checkpoint.completions(row, end_row)
            own, again = self._own(completions), open_chunk.reopened.keys() - {c.row for c in completions}
            if base is not None:
                own = base.updated(own, row, end_row)
            rows = [at for at in cast(list[int], own.column("row").to_pylist()) if at not in again]
            kept = own.filter(pc.is_in(own.column("row"), pa.array(rows, pa.int64())))
            yield joined(table.take(pa.array([at - row for at in rows], pa.int64())), kept, self._schema, self._parsed)
            row = end_row

    # ── for a result of the rows so far ───────────────────────────────────────────────────────────────────────────────

    def so_far(self) -> Iterator[pa.RecordBatch]:
        """Every row in order, as in the output, rows without a completion as pending. Opens no chunk.

        Call it before `open_next`. A row that is sent again has its earlier record until the new one is durable.

        Raises:
            CheckpointError: a part or a stored input is damaged.
            InputError: the rest of the input can't be read.
        """
        for chunk in self._checkpoint.chunks():
            if chunk.open:
                yield from self._batches(self._reopen(chunk), with_pending=True)
            else:
                yield from files.sealed_batches(self._part_of(chunk), chunk.part_digest or "", chunk.rows)
        while (unread := self._next_window()) is not None:
            yield from self._unread(unread)
            self._position, self._next_row = unread.end, self._next_row + unread.rows

    def _unread(self, window: Window) -> Iterator[pa.RecordBatch]:
        row = self._next_row
        for batch in window.table.to_batches(max_chunksize=BATCH_ROWS):
            own = pending.beside(OWN_COLUMNS.empty_table(), row, row + batch.num_rows)
            yield joined(typed([batch], self._types), own, self._schema, self._parsed)
            row += batch.num_rows

    def _part_of(self, chunk: Chunk) -> Path:
        """The path of a sealed chunk. A process that was killed at the end may have moved it to the result already."""
        part = self._directory.part_of(chunk.chunk, chunk.generation)
        moved = files.part_in(self._directory.completions_folder, chunk.chunk)
        return moved if self._settings.layout == "parts" and moved.exists() and not part.exists() else part


def _by_size(
    first_row: int, end_row: int, completions: Sequence[Completion]
) -> Iterator[tuple[int, int, Sequence[Completion]]]:
    """Consecutive ranges of the rows whose answers have at most a row group's bytes, or are a single one: (first row,
    end row, completions).
    """
    # by the unpacked size: in the checkpoint a stream may take a thirtieth of that
    start, range_bytes = 0, 0
    for place, completion in enumerate(completions):
        size = packed.size(completion.raw)
        if range_bytes and range_bytes + size > files.ROW_GROUP_BYTES:
            yield first_row, completion.row, completions[start:place]
            first_row, start, range_bytes = completion.row, place, 0
        range_bytes += size
    yield first_row, end_row, completions[start:]
