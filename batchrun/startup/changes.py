"""A changed input or job: finds which answers still fit, and arranges the rows in new chunks.

Answers are matched with rows by request key: a line that was inserted at the top sends one row. Answers that no row
needs any more are money lost, so the user must accept that.
"""

import functools
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import cast

import msgspec
import pyarrow as pa

from batchrun.records import Status
from batchrun.run_summary import TotalsLine
from batchrun.source import START, Window
from batchrun.startup.answer_match import NONE, Matches, match
from batchrun.store import booking, result, stored_window
from batchrun.store.base_part import BasePart
from batchrun.store.carry_over import CarryOver, Taken
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.chunks import Layout
from batchrun.store.db_tables import Chunk
from batchrun.store.manifest import Manifest
from batchrun.store.rundir import RunDirectory
from batchrun.store.totals import Totals
from batchrun.tables import booked, files
from batchrun.tables.arrow_types import Column
from batchrun.tables.rows import OWN_COLUMNS, joined, own_schema, own_table, with_column


class Changes(msgspec.Struct, frozen=True):
    """The changes, and their effect on answers: the `kept` ones still fit, no row needs the `dropped` ones.

    A row that ended as `error` is not an answer: it stays with its request, and nothing is lost without it. `in_place`:
    every answer stays in its row. `fewer`: so many rows less than `before`, of which some were `pending`.
    `carried` of the rows without an answer take one without a request.
    `mean_cost_usd`: the mean of a row so far.
    """

    changed: tuple[str, ...]
    rows: int
    kept: int
    dropped: int
    in_place: bool
    mean_cost_usd: Decimal | None
    fewer: int = 0
    before: int = 0
    pending: int = 0
    carried: int = 0

    @property
    def harmless(self) -> bool:
        """True if no answer and no row is discarded or moved: rows were appended, columns changed, or nothing was
        answered yet. (A truncated export may have lost only pending rows, so fewer rows are not harmless.)
        """
        return self.in_place and not self.dropped and not self.fewer

    @property
    def rows_changed(self) -> int:
        """New or changed rows, or removed ones, whichever are more."""
        return max(self.rows - self.kept - self.pending, self.dropped, self.fewer)

    @property
    def to_send(self) -> int:
        """The rows that a start sends."""
        return self.rows - self.kept - self.carried

    def __str__(self) -> str:
        new = self.to_send
        cost = "" if self.mean_cost_usd is None else f", about ${self.mean_cost_usd * new:,.4f}"
        what = ", ".join(each if " " in each else f"{each} has changed" for each in self.changed)  # settings: one word
        stay = "1 answer stays" if self.kept == 1 else f"{self.kept:,} answers stay"
        send = "1 row will be sent" if new == 1 else f"{new:,} rows will be sent"
        fewer = f"; {self.fewer:,} fewer than before" if self.fewer else ""
        if self.carried:
            fewer = f"; {self.carried:,} without a request{fewer}"
        unused = "" if not self.dropped else f"; {self.dropped:,} paid answers no longer fit any row"
        if self.dropped == 1:
            unused = "; 1 paid answer no longer fits any row"
        return f"{what}: {stay}, {send}{cost}{fewer}{unused}"


class Answers:
    """The settled rows of a run, in our own columns, from open chunks and parts."""

    def __init__(self, directory: RunDirectory, checkpoint: Checkpoint, manifest: Manifest) -> None:
        self.directory = directory
        self.checkpoint = checkpoint
        self._manifest = manifest
        self.chunks = checkpoint.chunks()
        if result.FINISHED in checkpoint.manifest_entries():
            self.chunks = result.restore_parts(manifest, checkpoint, self.chunks, directory)
        self.rows = manifest.rows
        self.answered = bytearray()
        self.settled = checkpoint.totals.settled()
        self._first_rows = [chunk.first_row for chunk in self.chunks]
        self.of_chunk = functools.lru_cache(maxsize=4)(self._of_chunk)  # a shuffled input reads chunks again

    def questions(self) -> Iterator[tuple[bytes, int]]:
        """(request_key, row) of every settled row, in row order; `answered` marks those that have an answer."""
        for place in range(len(self.chunks)):
            own = self.of_chunk(place)
            columns = (own.column(name).to_pylist() for name in ("request_key", "row", "status"))
            for key, row, status in cast(Iterator[tuple[bytes, int, str]], zip(*columns, strict=True)):
                self.answered.extend(bytes(row + 1 - len(self.answered)))
                self.answered[row] = status != Status.ERROR
                yield key, row

    def take(self, wanted: Sequence[tuple[int, int]]) -> pa.Table:
        """The records of old rows under new numbers: `wanted` are (new row, old row), ascending by the new."""
        by_chunk: dict[int, list[tuple[int, int]]] = {}
        for new, old in wanted:
            by_chunk.setdefault(bisect_right(self._first_rows, old) - 1, []).append((old, new))
        tables = [OWN_COLUMNS.empty_table()]
        for place, pairs in by_chunk.items():
            own = self.of_chunk(place)
            at = {row: index for index, row in enumerate(own.column("row").to_pylist())}
            taken = own.take([at[old] for old, _ in pairs])
            tables.append(with_column(taken, "row", [new for _, new in pairs]))
        return pa.concat_tables(tables).sort_by("row")

    def given_up(self, matches: Matches) -> list[TotalsLine]:
        """The changes to the account for the answers that no new row has, one for each line of it."""
        kept = bytearray(self.rows)
        for old in matches:
            if old != NONE:
                kept[old] = 1
        account = Totals()
        for place in range(len(self.chunks)):
            own = self.of_chunk(place)
            answers = zip(cast(list[int], own.column("row").to_pylist()), booked.lines(own), strict=True)
            moved = (line for row, answer in answers if not kept[row] for line in booking.moved_to_discarded(answer))
            account = booking.with_changes(account, moved)
        return list(account.replaced.values())

    def _of_chunk(self, place: int) -> pa.Table:
        chunk = self.chunks[place]
        completions = self.checkpoint.completions(chunk.first_row, chunk.end_row)
        newer = own_table(completions, keep_raw=self._manifest.output.keep_raw)
        base = BasePart.of(chunk, self.directory, self._manifest.output.prefix)
        return newer if base is None else base.updated(newer, chunk.first_row, chunk.end_row)


def examine(
    answers: Answers,
    questions: Iterator[tuple[bytes, int]],
    rows: int,
    changed: tuple[str, ...],
) -> tuple[Changes, Matches]:
    """The effect of the change, and the matches behind it. `questions` are (key, row) of the new input's rows."""
    matches = match(answers.questions(), questions, rows, answers.directory.path)
    kept = kept_answers = in_place = 0
    for new, old in enumerate(matches):
        if old == NONE:
            continue
        kept += 1
        kept_answers += answers.answered[old]
        in_place += answers.answered[old] and old == new
    paid = sum(answers.answered)
    fewer = max(0, answers.rows - rows) if paid else 0
    pending = answers.rows - answers.settled
    dropped = paid - kept_answers
    mean_cost_usd = answers.checkpoint.totals.mean_cost_usd()
    seen = Changes(changed, rows, kept, dropped, in_place == paid, mean_cost_usd, fewer, answers.rows, pending)
    return seen, matches


def lay_out(answers: Answers, matches: Matches, layout: Layout, entries: dict[str, str], carry: CarryOver) -> None:
    """Makes the chunks of the new input, with the answers that fit, and replaces the run's by them in one transaction.

    A window whose every row has its answer becomes a sealed chunk, one with some an open chunk over a base part.
    Windows behind the last answer are left to be opened in their turn. With a limit, no row is opened that is behind
    both the limit and the last answer.
    """
    directory, settings = answers.directory, layout.settings
    generation = 1 + max((chunk.generation for chunk in answers.chunks), default=0)
    left = sum(old != NONE for old in matches)
    chunks: list[Chunk] = []
    standing: Counter[str] = Counter()
    first_row = 0
    last = max((new for new, old in enumerate(matches) if old != NONE), default=0)
    for read in _windows(layout, matches.rows if layout.limit is None else max(layout.limit, last + 1)):
        if not left:
            break
        end_row = first_row + read.rows
        own = answers.take([(new, old) for new in range(first_row, end_row) if (old := matches[new]) != NONE])
        own = _with_originals(own, carry.window(first_row, end_row))
        left -= own.num_rows
        standing.update(cast(list[str], own.column("status").to_pylist()))
        number = len(chunks)
        stored = directory.input_of(number, layout.number)
        chunk = Chunk(
            chunk=number,
            first_row=first_row,
            rows=read.rows,
            end_position=msgspec.json.encode(read.end).decode(),
            input_digest=stored_window.write(stored, read.table),
        )
        part = directory.part_of(number, generation)
        if own.num_rows == read.rows:
            tables = stored_window.StoredWindow(stored, chunk.input_digest, first_row).tables(layout.types)
            batches = _whole(tables, own, layout.schema, layout.parsed)
            digest = files.write_part(part, layout.schema, batches, settings, read.rows)
            chunk = msgspec.structs.replace(chunk, generation=generation, part_digest=digest, open=0)
            stored.unlink()
        elif own.num_rows:
            ours = own_schema(settings.prefix)
            batches = iter(own.rename_columns(ours.names).cast(ours).to_batches())
            digest = files.write_part(part, ours, batches, settings, own.num_rows)
            chunk = msgspec.structs.replace(chunk, generation=generation, part_digest=digest)
        chunks.append(chunk)
        first_row = end_row
    answers.checkpoint.replace_chunks(chunks, standing, entries, answers.given_up(matches))


def _with_originals(own: pa.Table, taken: Mapping[int, Taken]) -> pa.Table:
    """The records of copies, with `duplicate_of` set to the present number of the row whose answer they have."""
    rows, reused = (own.column(name).to_pylist() for name in ("row", "reused"))
    originals = [
        taken[row].original if copied and row in taken and taken[row].original >= 0 else None
        for row, copied in cast(Iterator[tuple[int, bool]], zip(rows, reused, strict=True))
    ]
    return with_column(own, "duplicate_of", originals)


def _windows(layout: Layout, upto: int) -> Iterator[Window]:
    """The windows that chunks are made from; none goes beyond the first `upto` rows."""
    source, settings, rejected = layout.source, layout.settings, layout.rejected
    position, rows = START, 0
    windows = source.windows(position, settings.chunk_rows, settings.chunk_bytes, rejected)
    while rows < upto:
        if upto - rows < settings.chunk_rows:
            windows = source.windows(position, upto - rows, settings.chunk_bytes, rejected)
        if (read := next(windows, None)) is None:
            return
        yield read
        position, rows = read.end, rows + read.rows


def _whole(tables: Iterator[pa.Table], own: pa.Table, schema: pa.Schema, parsed: Column) -> Iterator[pa.RecordBatch]:
    start = 0
    for table in tables:
        yield joined(table, own.slice(start, table.num_rows), schema, parsed)
        start += table.num_rows
