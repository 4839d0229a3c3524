"""Opens chunks and seals them into parts. `open_next` and `seal` block: call them in threads."""

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, Self, cast

import msgspec
import pyarrow as pa

from batchrun import compute as pc
from batchrun.errors import ANOTHER, CheckpointError, InputError
from batchrun.job.settings import Output
from batchrun.records import CompletionRecord, Discarded
from batchrun.response import packed
from batchrun.run_summary import TotalsLine
from batchrun.source import START, FileIdentity, Position, Source, Window, changed
from batchrun.store import result_folder
from batchrun.store.base_part import BasePart
from batchrun.store.carry_over import CarryOver, Taken
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.copies import Copies
from batchrun.store.db_tables import Chunk
from batchrun.store.manifest import Manifest
from batchrun.store.open_chunk import Earlier, OpenChunk
from batchrun.store.rundir import RunDirectory
from batchrun.store.stored_window import BATCH_ROWS, StoredBatch, StoredWindow, typed, write
from batchrun.tables import booked, completions, files, pending
from batchrun.tables.arrow_types import JSON, Column
from batchrun.tables.json_columns import ColumnTypes
from batchrun.tables.rows import OWN_COLUMNS, Completion, joined, own_table

MOST_FULL = 2
"""How many chunks without a row to send may wait to be sealed. Beyond that none is opened until one is sealed."""

MOST_KEPT = 3
KEPT_BYTES = 16_000_000
"""How many open chunks keep their answers in memory: the one that is sent, the one before it and the one after it; and
how much each may keep. With short answers that is all of them.
"""


class Layout(msgspec.Struct, frozen=True):
    """How a run's rows become chunks. `identities` are the source's files as they were checked, `rejected` the ordinals
    of invalid records; `types` are those of JSONL columns, `parsed` the column of answers in JSON. `number` counts how
    often a changed input or job was accepted; the run begins with `first_row` and ends after `limit` rows.
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
    first_row: int = 0

    @classmethod
    def of(cls, manifest: Manifest, source: Source, schema: pa.Schema, rows: int) -> Self:
        """The layout of a run that ends after so many of its rows, all or the first ones."""
        return cls(
            source,
            manifest.files,
            frozenset(manifest.rejected),
            manifest.column_types,
            schema,
            manifest.output,
            manifest.answer_column,
            manifest.layout,
            limit=rows if rows < manifest.rows else None,
            first_row=manifest.first_row,
        )


NOTHING_CARRIED = CarryOver(None, Path())


class Mirror(Protocol):
    """Keeps a copy of the chunks in another place. Both calls block; an error ends the run."""

    def opened(self, chunk: Chunk, directory: RunDirectory, checkpoint: Checkpoint) -> None:
        """The chunk's input is stored in the other place, before any of its rows is sent."""

    def sealed(self, chunk: Chunk, directory: RunDirectory, checkpoint: Checkpoint) -> None:
        """The chunk's part is stored there, and the checkpoint that names it."""


class Chunks:
    """All chunks of a run, in order: first those in the checkpoint, then new ones from the source."""

    def __init__(
        self,
        directory: RunDirectory,
        checkpoint: Checkpoint,
        layout: Layout,
        carry: CarryOver = NOTHING_CARRIED,
        on_carried: Callable[[Iterator[pa.RecordBatch]], None] | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        """`on_carried` gets the rows that took their answer without a request, as each chunk is sealed."""
        self._mirror = mirror
        self._carry = carry
        self._on_carried = on_carried
        self._sealing = threading.Lock()  # of the thread that opens chunks and the one that seals them
        self._sealed_one = threading.Condition()
        # weak, because each open chunk has a file open: it is closed when no row of the chunk is wanted any more
        self._open_chunks = weakref.WeakValueDictionary[int, OpenChunk]()
        self._waiting: list[OpenChunk] = []  # full chunks with copies of rows further up that are not settled yet
        self._failed = False
        self._directory = directory
        self._checkpoint = checkpoint
        self._layout = layout
        self._source = layout.source
        self._types = layout.types
        self._schema = layout.schema
        self._settings = layout.settings
        self._parsed = layout.parsed
        self._end_row = None if layout.limit is None else layout.first_row + layout.limit
        on_record = checkpoint.chunks()
        self._on_record = list(on_record)
        self._copies = Copies(directory, checkpoint, self._on_record, carry, layout.settings)
        self.sealed = {chunk.chunk: chunk for chunk in on_record if not chunk.open}
        self._opened = iter([chunk for chunk in on_record if chunk.open])
        self._next = len(on_record)
        self._next_row = on_record[-1].end_row if on_record else layout.first_row
        self._position = msgspec.json.decode(on_record[-1].end_position, type=Position) if on_record else START
        self._windows = self._window_of(self._settings.chunk_rows)

    def open_next(self, *, keep_settled: bool = False) -> OpenChunk | None:
        """The next chunk, its input stored; None if there is no other. A new one without a row to send is sealed, at
        once or later. `keep_settled`: chunks whose rows are settled stay open, and the call does not wait for any.

        Raises:
            InputError: the input has changed since the run started, or an earlier result whose answers are reused.
        """
        for chunk in self._opened:
            reopened = self._open_chunks[chunk.chunk] = self._reopen(chunk)
            if reopened.left:
                self._mirror_opened(chunk)
                return reopened
            if not keep_settled:
                self.seal(reopened)  # the process died between the last row's commit and the seal
        if not keep_settled:
            with self._sealed_one:  # not while too many full chunks wait to be sealed
                self._sealed_one.wait_for(
                    lambda: (
                        self._failed or sum(not each.left for each in self._in_use()) - len(self._waiting) <= MOST_FULL
                    )
                )
        self._check_unchanged()
        window_read = self._next_window()
        if window_read is None:
            return None
        self._check_unchanged()
        opened = self._open(window_read)
        self._mirror_opened(opened.chunk)
        if not opened.left:
            self.seal(opened)
        return opened

    def _in_use(self) -> list[OpenChunk]:
        """The chunks that are open now."""
        # not `values()`: the thread that seals chunks may change the dictionary meanwhile
        return [each for ref in self._open_chunks.valuerefs() if (each := ref()) is not None]

    def _mirror_opened(self, chunk: Chunk) -> None:
        if self._mirror is not None:
            self._mirror.opened(chunk, self._directory, self._checkpoint)

    def seal(self, open_chunk: OpenChunk) -> None:
        """Writes the chunk's rows as a part; deletes them from the database, its stored input and its base part.

        If a row is a copy of an earlier one that is not settled yet, that happens when a later chunk is sealed.
        """
        try:
            with self._sealing:
                self._waiting.append(open_chunk)
                open_chunk.window.release()
                while (ready := next(filter(self._copies.are_answered, self._waiting), None)) is not None:
                    self._waiting.remove(ready)
                    self._seal(ready)
        except BaseException:
            self._failed = True
            raise
        finally:
            with self._sealed_one:
                self._sealed_one.notify_all()

    def _seal(self, open_chunk: OpenChunk) -> None:
        """First the part is on disk, then it is in the checkpoint, and only then are its sources deleted: after a kill
        between two steps the next start finds either all it needs to seal again, or a part that is recorded.
        """
        chunk = open_chunk.chunk
        generation = chunk.generation + 1
        part = self._directory.part_of(chunk.chunk, generation)
        carried: dict[int, TotalsLine] = {}
        batches = self._batches(open_chunk, carried)
        part_digest = files.write_part(part, self._schema, batches, self._settings, chunk.rows)
        sealed = msgspec.structs.replace(chunk, generation=generation, part_digest=part_digest, open=0)
        keep, drop = self._copies.kept(chunk, self._next_row), self._copies.dropped(open_chunk)
        stored = None if chunk.generation else chunk.rows - len(carried)
        self._checkpoint.seal_chunk(sealed, carried, stored=stored, keep=keep, drop=drop)
        open_chunk.kept.clear()
        self.sealed[chunk.chunk] = self._on_record[chunk.chunk] = sealed
        self._open_chunks.pop(chunk.chunk, None)
        if carried and self._on_carried is not None:
            name, rows = f"{self._settings.prefix}row", pa.array(sorted(carried), pa.int64())
            self._on_carried(batch.filter(pc.is_in(batch.column(name), rows)) for batch in files.batches_of(part))
        self._input_of(chunk.chunk).unlink(missing_ok=True)
        if chunk.generation:
            self._directory.part_of(chunk.chunk, chunk.generation).unlink(missing_ok=True)
        if self._mirror is not None:
            self._mirror.sealed(sealed, self._directory, self._checkpoint)

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
        left = None if self._end_row is None else self._end_row - self._next_row
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
        """Called before and after a window is read: a file that was replaced meanwhile would give rows of both."""
        if (what := changed(self._source.files, self._layout.identities)) is not None:
            raise InputError(f"the input changed while the run works: {what}; restore it, or {ANOTHER}")

    def _reopen(self, chunk: Chunk) -> OpenChunk:
        """A chunk that an earlier start has opened, with what it did to the rows."""
        discarded: dict[int, list[Discarded]] = {}
        for attempt in self._checkpoint.discarded(chunk):
            discarded.setdefault(attempt.row, []).append(attempt)
        settled, reopened = self._checkpoint.settled_rows(chunk), self._checkpoint.reopened(chunk)
        if (base := BasePart.of(chunk, self._directory, self._settings.prefix)) is not None:
            settled |= set(base.rows) - reopened.keys()
        taken = self._carry.window(chunk.first_row, chunk.end_row)
        copied_again: dict[int, Taken] = {}
        if base is not None:  # a copy that is sent again takes the new answer of the row that it is a copy of
            copies = reopened.keys() & base.originals.keys() - settled
            copied_again = {row: Taken(base.originals[row]) for row in copies}
        return OpenChunk(
            chunk,
            StoredWindow(self._input_of(chunk.chunk), chunk.input_digest, chunk.first_row),
            [row for row in taken if row not in settled and row not in reopened],
            Earlier(settled, discarded, self._checkpoint.last_lost_attempts(chunk), reopened, copied_again),
        )

    def _open(self, window: Window) -> OpenChunk:
        """A new chunk of these rows: first its input is on disk, then the chunk in the checkpoint."""
        path = self._input_of(self._next)
        chunk = Chunk(
            chunk=self._next,
            first_row=self._next_row,
            rows=window.rows,
            end_position=msgspec.json.encode(window.end).decode(),
            input_digest=write(path, window.table),
        )
        self._checkpoint.open_chunk(chunk)
        self._on_record.append(chunk)
        self._position = window.end
        self._next += 1
        self._next_row = chunk.end_row
        stored = StoredWindow(path, None, chunk.first_row)
        carried = self._carry.window(chunk.first_row, chunk.end_row)
        room_bytes = KEPT_BYTES if len(self._in_use()) < MOST_KEPT else 0
        opened = OpenChunk(chunk, stored, carried, room_bytes=room_bytes)
        self._open_chunks[chunk.chunk] = opened
        return opened

    def _batches(
        self, open_chunk: OpenChunk, carried: dict[int, TotalsLine] | None = None, *, with_pending: bool = False
    ) -> Iterator[pa.RecordBatch]:
        """The chunk's rows with their completions; newer ones replace those of the base part. With `carried`, rows that
        take their answer without a request have it, and their lines of the totals are added there.

        A row without a completion is an error, unless `with_pending`.
        """
        row = open_chunk.chunk.first_row
        base = BasePart.of(open_chunk.chunk, self._directory, self._settings.prefix)
        for window in open_chunk.window.tables(self._types):
            kept = open_chunk.kept.all_of(row, row + window.num_rows)
            done, read = kept or (self._checkpoint.completions(row, row + window.num_rows), None)
            for first_row, end_row, at in _by_size(row, row + window.num_rows, done):
                own = own_table(done[at], keep_raw=self._settings.keep_raw, read=read and read[at])
                table = window.slice(first_row - row, end_row - first_row)
                taken = {} if carried is None else self._copies.taken(open_chunk, first_row, end_row)
                if carried is not None and taken:
                    more = self._copies.records(taken)
                    carried.update(zip(taken, booked.lines(more), strict=True))
                    own = pa.concat_tables([own, more]).sort_by("row")
                if base is not None:
                    own = base.updated(own, first_row, end_row)
                if with_pending:
                    earlier = open_chunk.earlier
                    own = pending.with_pending(own, first_row, end_row, earlier.discarded, earlier.lost)
                if own.num_rows != table.num_rows:
                    raise CheckpointError(f"chunk {open_chunk.chunk.chunk}: rows are missing from the checkpoint")
                yield joined(table, own, self._schema, self._parsed)
            row += window.num_rows

    # ── for a program that reads rows as they are settled ─────────────────────────────────────────────────────────────

    def completions_of(
        self, records: Sequence[CompletionRecord], inputs: Sequence[tuple[StoredBatch, int]]
    ) -> Iterator[Completion]:
        """These rows as in the output; `inputs` say where each is stored. Only one thread may call it."""
        names = self._schema.names[: -len(OWN_COLUMNS)]
        rows = [batch.typed_row(place, self._types, names) for batch, place in inputs]
        return completions.settled(records, rows, self._parsed, keep_raw=self._settings.keep_raw)

    def settled(self) -> Iterator[pa.RecordBatch]:
        """The rows that have a completion, in order, as in the output. Call it before `open_next`."""
        for chunk in self._checkpoint.chunks():
            if not chunk.open:
                yield from files.batches_of(self._directory.part_of(chunk.chunk, chunk.generation))
                continue
            open_chunk, row = self._reopen(chunk), chunk.first_row
            base = BasePart.of(chunk, self._directory, self._settings.prefix)
            for table in open_chunk.window.tables(self._types):
                end_row = row + table.num_rows
                done = self._checkpoint.completions(row, end_row)
                own = own_table(done, keep_raw=self._settings.keep_raw)
                if base is not None:
                    own = base.updated(own, row, end_row)
                again = open_chunk.earlier.reopened.keys() - {completion.row for completion in done}
                rows = [at for at in cast(list[int], own.column("row").to_pylist()) if at not in again]
                own = own.filter(pc.is_in(own.column("row"), pa.array(rows, pa.int64())))
                inputs = table.take(pa.array([at - row for at in rows], pa.int64()))
                yield joined(inputs, own, self._schema, self._parsed)
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
                part, digest = self._directory.part_of(chunk.chunk, chunk.generation), chunk.part_digest or ""
                if self._settings.layout == "parts":  # a process killed at the end may have moved it to the result
                    part = result_folder.place_of(part, chunk.chunk, digest, self._directory)
                yield from files.sealed_batches(part, digest, chunk.rows)
        while (unread := self._next_window()) is not None:
            row = self._next_row
            for batch in unread.table.to_batches(max_chunksize=BATCH_ROWS):
                own = pending.with_pending(OWN_COLUMNS.empty_table(), row, row + batch.num_rows)
                yield joined(typed([batch], self._types), own, self._schema, self._parsed)
                row += batch.num_rows
            self._position, self._next_row = unread.end, row


def _by_size(first_row: int, end_row: int, completions: Sequence[CompletionRecord]) -> Iterator[tuple[int, int, slice]]:
    """Consecutive ranges of the rows whose answers have at most a row group's bytes, or are a single one: (first row,
    end row, where their completions are).
    """
    # by the unpacked size: in the checkpoint a stream may take a thirtieth of that
    start, range_bytes = 0, 0
    for place, completion in enumerate(completions):
        size = packed.size(completion.raw)
        if range_bytes and range_bytes + size > files.ROW_GROUP_BYTES:
            yield first_row, completion.row, slice(start, place)
            first_row, start, range_bytes = completion.row, place, 0
        range_bytes += size
    yield first_row, end_row, slice(start, None)
