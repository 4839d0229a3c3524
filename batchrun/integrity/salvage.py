"""Copies what is intact of a damaged run into a new directory, which the same command resumes. The old one is kept.

The input is read again and cut into the same chunks. A chunk with all its rows is sealed. Another is open, with a part
that has only some rows, so only the others are sent. If the input has changed, or the run's manifest
can't be read, salvaged.parquet still has the rows.
"""

import contextlib
import csv
import itertools
import shutil
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import msgspec
import pyarrow as pa

from batchrun.durable import disk_errors, fsync, replacing
from batchrun.errors import CheckpointError, InputError, JobError
from batchrun.integrity import readable_groups, rebuilt_checkpoint
from batchrun.integrity.db_records import DbRecords
from batchrun.integrity.findings import Findings
from batchrun.integrity.rebuilt_checkpoint import KeptSums
from batchrun.integrity.sound_rows import NO_END, SoundRows
from batchrun.integrity.verify import inspected
from batchrun.job.job import SIMULATOR, Job
from batchrun.job.settings import Endpoint, Output
from batchrun.report.wording import plural
from batchrun.request.builder import RequestBuilder
from batchrun.source import START, Source, TableSource, Window, file_at, open_source
from batchrun.startup import adopt
from batchrun.store import in_flight, price_tables, stored_window, variants
from batchrun.store.db_tables import Chunk, Reopened
from batchrun.store.manifest import Manifest
from batchrun.store.rundir import RunDirectory
from batchrun.store.stored_window import StoredWindow
from batchrun.tables import files
from batchrun.tables.arrow_types import JSON
from batchrun.tables.rows import OWN_COLUMNS, joined, output_schema, own_schema, prefix_in

NAME = "salvaged.parquet"
LOST = "lost.csv"
ANY_LENGTH = 1 << 40  # of a line: longer ones were rejected at the first start


class Salvaged(msgspec.Struct, frozen=True):
    """The kept rows, and the number of lost rows of opened chunks. `problem`: why the new directory can't be resumed;
    None: it can.
    """

    path: Path
    rows: int
    missing: int
    cost_usd: Decimal
    problem: str | None


class Piece(NamedTuple):
    """One chunk and its `kept` rows. `chunk` is its record in the new directory; None: it can't be resumed. `answered`:
    every row had a completion.
    """

    first_row: int
    end_row: int
    answered: bool
    kept: pa.Table
    chunk: Chunk | None = None
    reopened: tuple[Reopened, ...] = ()


def salvage(directory: RunDirectory) -> tuple[Findings, Salvaged | None]:
    """Writes what is intact of a damaged run to `<directory>.salvaged`, whole or not at all.

    Raises: as `inspected`, and
        JobError: the target exists.
        DiskError: it can't be written.
    """
    with inspected(directory) as inspection:
        findings = inspection.findings()
        return findings, _salvaged(directory, inspection.known) if findings.damages else None


def _salvaged(directory: RunDirectory, known: DbRecords) -> Salvaged:
    to = directory.path.with_name(directory.path.name + ".salvaged")
    if to.exists():
        raise JobError(f"{to}: already exists; move it away, then salvage again")
    manifest: Manifest | None = None
    problem = "its manifest can't be read"
    with contextlib.suppress(CheckpointError):
        variants.decode(known.manifest)
        manifest = Manifest.decode(known.manifest)
    if manifest is not None:
        try:
            return _built(directory, known, manifest, unchanged_input(manifest, directory), None, to)
        except InputError as error:  # before or while it was read
            problem = str(error)
    return _built(directory, known, manifest, None, problem, to)


def unchanged_input(manifest: Manifest, directory: RunDirectory) -> Source:
    """The input, unchanged since the run began.

    Raises:
        InputError: it is missing or has changed.
    """
    paths = tuple(file_at(file.path) for file in manifest.files)
    if [path.name for path in paths] == [directory.spool.name] and directory.spool.exists():
        paths = (directory.spool,)
    if (what := adopt.changed_input(paths, directory, manifest)) is not None:
        raise InputError(what)
    return open_source(paths, ANY_LENGTH, None if manifest.share is None else manifest.share.span)


def _built(
    directory: RunDirectory,
    known: DbRecords,
    manifest: Manifest | None,
    source: Source | None,
    problem: str | None,
    to: Path,
) -> Salvaged:
    building = RunDirectory(to.with_name(to.name + ".tmp"))
    shutil.rmtree(building.path, ignore_errors=True)
    building.create()
    try:
        copy = Salvage(directory, known, manifest, source, building)
        copy.write()
        with disk_errors(to):
            building.path.rename(to)
            fsync(to.parent)
    except BaseException:
        shutil.rmtree(building.path, ignore_errors=True)
        raise
    return Salvaged(to, copy.account.rows, copy.missing, copy.account.cost_usd(), problem)


class Salvage:
    """Copies a run into an empty directory; `write` does all of it."""

    def __init__(
        self, old: RunDirectory, known: DbRecords, manifest: Manifest | None, source: Source | None, new: RunDirectory
    ) -> None:
        self._old = old
        self._known = known
        self._manifest = manifest
        self._source = source
        self._new = new
        self._types = None if manifest is None else manifest.column_types
        self._settings = Output() if manifest is None else manifest.output
        self._schema, self._prefix = self._columns()
        self._own = own_schema(self._prefix).names
        self._builders: list[RequestBuilder] = []  # of each variant of the requests that rows were sent as
        if manifest is not None:
            for variant in variants.decode(known.manifest):
                endpoint = Endpoint(url=SIMULATOR, name=str(variant.question["endpoint.name"]))
                self._builders.append(RequestBuilder(Job(endpoint, request=variant.request), manifest.dialect))
        self._parsed = JSON if manifest is None else manifest.answer_column
        self._kept = SoundRows(old, known, self._schema, self._prefix)
        self.account = KeptSums(in_flight.read(old.inflight), rebuilt_checkpoint.spilled(old))
        self.missing = 0

    def write(self) -> None:
        lost: list[tuple[int, int, bool]] = []
        schema = self._typed(self._kept.schema)
        with (
            replacing(self._new.path / NAME) as temporary,
            files.ParquetFile(temporary, schema, self._settings.compression) as file,
        ):
            for piece in self._pieces():
                own = piece.kept.select(self._own).rename_columns(OWN_COLUMNS.names)
                self.account.add(own, piece.chunk, piece.reopened)
                next_row = piece.first_row
                for row in (*self._rows(piece.kept), piece.end_row):
                    if row > next_row:
                        lost.append((next_row, row, piece.answered))
                    next_row = row + 1
                file.write(joined(piece.kept, own, schema, self._parsed))
        self.missing = sum(end - first for first, end, _ in lost)
        self._write_lost(lost)
        if self._source is not None:
            rebuilt_checkpoint.write(self._old, self._known, self.account, self._new)

    def _typed(self, schema: pa.Schema) -> pa.Schema:
        """The schema with `parsed` in its type."""
        place = schema.get_field_index(self._prefix + "parsed")
        return schema.set(place, schema.field(place).with_type(self._parsed.type()))

    def _columns(self) -> tuple[pa.Schema, str]:
        """The output's schema, with `parsed` as JSON text, and its prefix: by the input, or by a readable part."""
        given = self._source.schema if isinstance(self._source, TableSource) else None
        if given is None and self._types is not None:
            given = self._types.schema()
        if given is not None:
            return output_schema(given, self._settings), self._settings.prefix
        results = (self._old.completions, *sorted(self._old.path.glob("*/*.parquet")))
        for schema in filter(None, map(readable_groups.schema_of, results)):
            if (prefix := prefix_in(schema.names)) is not None:
                given = pa.schema([field for field in schema if field.name not in own_schema(prefix).names])
                return pa.schema([*given, *own_schema(prefix)]), prefix
        return own_schema(self._settings.prefix), self._settings.prefix

    def _pieces(self) -> Iterator[Piece]:
        """Every chunk that was ever opened, or of which rows can be read."""
        if self._source is None or self._manifest is None:
            yield from self._pieces_without_input()
            return
        first_row = self._manifest.first_row
        for number, given in enumerate(self._windows(self._source, self._manifest)):
            if not self._was_opened(number, first_row):
                return
            kept = self._kept.between(first_row, first_row + given.rows)
            end = msgspec.json.encode(given.end).decode()
            input_digest = stored_window.write(self._new.input_of(number, self._manifest.layout), given.table)
            yield self._joined(Chunk(number, first_row, given.rows, end, input_digest), kept, self._manifest)
            first_row += given.rows

    def _windows(self, source: Source, manifest: Manifest) -> Iterator[Window]:
        """The recorded chunks (a pilot's last one is short), then those that a start would open."""
        position, rejected = START, frozenset(manifest.rejected)
        for chunk in self._known.chunks if self._known.whole else ():
            again = next(source.windows(position, chunk.rows, sys.maxsize, rejected), None)
            if again is None or again.rows != chunk.rows:
                raise InputError(f"the input has changed from row {chunk.first_row:,} on")
            yield again
            position = again.end
        yield from source.windows(position, manifest.output.chunk_rows, manifest.output.chunk_bytes, rejected)

    def _was_opened(self, number: int, first_row: int) -> bool:
        if self._known.whole:
            return number < len(self._known.chunks)
        named = [int(path.name[:6]) for path in self._old.parts.glob("[0-9]*.*")]
        opened = number <= max((*named, *(chunk.chunk for chunk in self._known.chunks)), default=-1)
        return self._had_result() or opened or first_row <= max(self._known.rows, default=-1)

    def _had_result(self) -> bool:
        return self._old.completions.exists() or self._old.completions_folder.exists()

    def _joined(self, chunk: Chunk, kept: pa.Table, manifest: Manifest) -> Piece:
        """Joins the chunk's input and its intact rows: sealed if all rows are there, else open."""
        path = self._new.input_of(chunk.chunk, manifest.layout)
        stored = StoredWindow(path, chunk.input_digest, chunk.first_row)
        kept = self._that_answer(kept, stored)
        rows = self._rows(kept)
        places = pa.array([row - chunk.first_row for row in rows], pa.int64())
        given = pa.concat_tables(list(stored.tables(self._types))).take(places)
        own = kept.select(self._own).rename_columns(OWN_COLUMNS.names)
        if rows:
            part, schema = self._new.part_of(chunk.chunk, 1), self._typed(self._schema)
            batch = joined(given, own, schema, self._parsed)
            part_digest = files.write_part(part, schema, [batch], self._settings, len(rows))
            chunk = msgspec.structs.replace(chunk, generation=1, part_digest=part_digest)
        # Rows that a retry was about to send, if that is certain; otherwise their old records are kept.
        reopened = self._known.reopened if self._known.whole else {}
        there = set(rows) - self._known.rows.keys()
        again = tuple(reopened[row] for row in reopened if row in there)
        if len(rows) == chunk.rows and not again:
            chunk = msgspec.structs.replace(chunk, open=0)
            path.unlink()
        whole = pa.Table.from_batches([joined(given, own, self._schema)]).cast(self._kept.schema)
        sealed = any(known.chunk == chunk.chunk and not known.open for known in self._known.chunks)
        return Piece(chunk.first_row, chunk.end_row, self._had_result() or sealed, whole, chunk, again)

    def _that_answer(self, kept: pa.Table, stored: StoredWindow) -> pa.Table:
        """The rows whose key is that of their present request: files of an earlier layout answer other requests."""
        columns = (kept.column(self._prefix + name).to_pylist() for name in ("row", "variant", "request_key"))
        keys = {row: (variant, key) for row, variant, key in zip(*columns, strict=True)}
        right: set[int] = set()
        for row in itertools.chain.from_iterable(stored.rows()):
            if row.row not in keys:
                continue
            variant, key = keys[row.row]
            try:
                request = self._builders[variant].build(row)
            except (InputError, IndexError):
                continue
            # With images the key can't be computed here; but in the run's first layout, the row can hold no other
            # answer.
            is_first_layout = self._manifest is not None and not self._manifest.layout
            if is_first_layout if request.pictures else request.key == key:
                right.add(row.row)
        return kept.filter(pa.array([row in right for row in self._rows(kept)], pa.bool_()))

    def _pieces_without_input(self) -> Iterator[Piece]:
        chunks = self._known.chunks
        starts = [0 if self._manifest is None else self._manifest.first_row, *(chunk.end_row for chunk in chunks)]
        if not self._known.whole or [chunk.first_row for chunk in chunks] != starts[:-1]:
            kept = self._kept.between(0, NO_END)
            yield Piece(0, max(self._rows(kept), default=-1) + 1, self._had_result(), kept)
            return
        for chunk in chunks:
            kept = self._kept.between(chunk.first_row, chunk.end_row)
            yield Piece(chunk.first_row, chunk.end_row, not chunk.open, kept)

    def _rows(self, table: pa.Table) -> list[int]:
        rows: list[int] = table.column(self._prefix + "row").to_pylist()  # type: ignore[assignment]
        return rows

    def _write_lost(self, lost: list[tuple[int, int, bool]]) -> None:
        bound: Decimal | None = None  # the most that one row can cost; None if a price is unknown
        if self._manifest is not None:
            bound = price_tables.most_usd(self._manifest, price_tables.decode(self._known.manifest))
        with replacing(self._new.path / LOST) as temporary:
            temporary.touch(mode=0o600)
            with temporary.open("w", newline="", encoding="utf-8") as file:
                lines = csv.writer(file, lineterminator="\n")
                lines.writerow(["first_row", "last_row", "rows", "answered", "ask_again_usd_at_most"])
                for first, end, answered in lost:
                    at_most = "" if bound is None else bound * (end - first)
                    lines.writerow([first, end - 1, end - first, "yes" if answered else "perhaps", at_most])


def in_words(salvaged: Salvaged) -> Iterator[str]:
    """The lines that say what was kept, and how to resume."""
    kept = f"{plural(salvaged.rows, 'row')} that cost ${salvaged.cost_usd:,.6f}"
    yield f"kept     {salvaged.path / NAME}: {kept}"
    if salvaged.missing:
        yield f"missing  {salvaged.path / LOST}: {plural(salvaged.missing, 'row')}, lost or not answered yet"
    if salvaged.problem is None:
        yield f"next     run the same command with -o {salvaged.path}: it sends only the missing rows"
    else:
        yield f"next     it can't be resumed ({salvaged.problem}): send the missing rows with a separate job"
