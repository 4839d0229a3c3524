"""What is sound of a damaged run, in a new directory that the same command can go on with. The old one is not touched.

The input is read again and cut into the same chunks. A chunk that has all its rows is sealed; another is open over a
part that has only some of them, so that only the others are asked. Where the input is not what it was, or what the run
began with can't be read, the rows that are kept are still in salvaged.parquet.
"""

import csv
import shutil
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import msgspec
import pyarrow as pa

from batchrun import prices
from batchrun.durable import disk_errors, fsync, replace
from batchrun.errors import CheckpointError, InputError, JobError
from batchrun.integrity import readable_groups, rebuilt_checkpoint
from batchrun.integrity.db_records import DbRecords
from batchrun.integrity.rebuilt_checkpoint import Account
from batchrun.integrity.sound_rows import NO_END, SoundRows
from batchrun.integrity.verify import Findings, inspected
from batchrun.job.job import SIMULATOR, Endpoint, Job, Output
from batchrun.prices import PriceTable
from batchrun.records import Row
from batchrun.report.wording import plural
from batchrun.request.builder import RequestBuilder
from batchrun.source import START, Source, TableSource, Window, open_source
from batchrun.startup import resume
from batchrun.store import in_flight, manifest, stored_window, variants
from batchrun.store.db_tables import Chunk, Reopened
from batchrun.store.manifest import Manifest
from batchrun.store.rundir import RunDirectory
from batchrun.store.stored_window import StoredWindow
from batchrun.store.variants import Variant
from batchrun.tables import files
from batchrun.tables.arrow_types import JSON
from batchrun.tables.json_columns import ColumnTypes
from batchrun.tables.rows import OWN_COLUMNS, joined, output_schema, own_schema

NAME = "salvaged.parquet"
LOST = "lost.csv"
ANY_LENGTH = 1 << 40  # of a line: what was too long has been rejected already


class Salvaged(msgspec.Struct, frozen=True):
    """What was kept, and how many rows of opened chunks were not. `problem`: why the new directory can't be gone on
    with; None: it can.
    """

    path: Path
    rows: int
    missing: int
    cost_usd: Decimal
    problem: str | None


class Piece(NamedTuple):
    """Rows that were opened together, and those of them that are kept. `chunk` is their record in the new directory;
    None: they can't be gone on with. `answered`: all of them had a completion once.
    """

    first_row: int
    end_row: int
    answered: bool
    kept: pa.Table
    chunk: Chunk | None = None
    reopened: tuple[Reopened, ...] = ()


def salvage(directory: RunDirectory) -> tuple[Findings, Salvaged | None]:
    """What is sound of a damaged run is in `<directory>.salvaged`, whole or not at all; nothing where all is sound.

    Raises: as `inspected`, and
        JobError: there is something already.
        DiskError: it can't be written.
    """
    with inspected(directory) as inspection:
        findings = inspection.findings()
        return findings, _salvaged(directory, inspection.known) if findings.damages else None


def _salvaged(directory: RunDirectory, known: DbRecords) -> Salvaged:
    to = directory.path.with_name(directory.path.name + ".salvaged")
    if to.exists():
        raise JobError(f"{to}: is there already; move it away, then salvage again")
    begun = _facts(known)
    if begun is None:
        return _built(directory, known, None, None, "what the run began with can't be read", to)
    try:
        return _built(directory, known, begun, input_again(begun, directory), None, to)
    except InputError as error:
        return _built(directory, known, begun, None, str(error), to)


def _facts(known: DbRecords) -> Manifest | None:
    try:
        variants.read(known.manifest)
        return manifest.read(known.manifest)
    except CheckpointError:
        return None


def input_again(begun: Manifest, directory: RunDirectory) -> Source:
    """The input as it was when the run began.

    Raises:
        InputError: it is not there, or has changed.
    """
    paths = tuple(Path(file.path) for file in begun.files)
    if [path.name for path in paths] == [directory.spool.name] and directory.spool.exists():
        paths = (directory.spool,)
    if (what := resume.changed_input(paths, directory, begun)) is not None:
        raise InputError(what)
    return open_source(paths, ANY_LENGTH)


def _built(
    directory: RunDirectory,
    known: DbRecords,
    begun: Manifest | None,
    source: Source | None,
    problem: str | None,
    to: Path,
) -> Salvaged:
    building = RunDirectory(to.with_name(to.name + ".tmp"))
    shutil.rmtree(building.path, ignore_errors=True)
    building.create()
    try:
        rescue = Rescue(directory, known, begun, source, building)
        rescue.write()
        with disk_errors(to):
            building.path.rename(to)
            fsync(to.parent)
    except BaseException:
        shutil.rmtree(building.path, ignore_errors=True)
        raise
    return Salvaged(to, rescue.account.rows, rescue.missing, rescue.account.cost_usd(), problem)


def _as_asked(way: Variant) -> Job:
    """A job that asks the questions of this variant."""
    return Job(Endpoint(url=SIMULATOR, name=str(way.question["endpoint.name"])), request=way.request)


class Rescue:
    """One rescue into an empty directory. `write` is the whole of it."""

    def __init__(
        self, old: RunDirectory, known: DbRecords, begun: Manifest | None, source: Source | None, new: RunDirectory
    ) -> None:
        self._old = old
        self._known = known
        self._facts = begun
        self._source = source
        self._new = new
        self._types = None if begun is None or begun.types is None else ColumnTypes.from_json(begun.types)
        self._settings = Output() if begun is None else begun.output
        self._schema, self._prefix = self._columns()
        self._own = own_schema(self._prefix).names
        jobs = [] if begun is None else [_as_asked(way) for way in variants.read(known.manifest)]
        self._builders = [] if begun is None else [RequestBuilder(job, begun.dialect) for job in jobs]
        self._parsed = JSON if begun is None else manifest.parsed(begun)
        self._kept = SoundRows(old, known, self._schema, self._prefix)
        self.account = Account(in_flight.read(old.inflight), rebuilt_checkpoint.spilled(old))
        self.missing = 0

    def write(self) -> None:
        """The new directory has everything but its name."""
        lost: list[tuple[int, int, bool]] = []

        def write(temporary: Path) -> None:
            schema = self._typed(self._kept.schema)
            with files.ParquetFile(temporary, schema, self._settings.compression) as file:
                for piece in self._pieces():
                    own = piece.kept.select(self._own).rename_columns(OWN_COLUMNS.names)
                    self.account.add(own, piece.chunk, piece.reopened)
                    lost.extend((*span, piece.answered) for span in self._gaps(piece))
                    file.write(joined(piece.kept, own, schema, self._parsed))

        replace(self._new.path / NAME, write)
        self.missing = sum(end - first for first, end, _ in lost)
        self._write_lost(lost)
        if self._source is not None:
            rebuilt_checkpoint.write(self._old, self._known, self.account, self._new)

    def _typed(self, schema: pa.Schema) -> pa.Schema:
        """The schema with `parsed` in its type."""
        place = schema.get_field_index(self._prefix + "parsed")
        return schema.set(place, schema.field(place).with_type(self._parsed.type()))

    def _columns(self) -> tuple[pa.Schema, str]:
        """The output's schema, with `parsed` as JSON text, and prefix: by the input, else as the first part that can be
        read has them.
        """
        given = self._source.schema if isinstance(self._source, TableSource) else None
        if given is None and self._types is not None:
            given = self._types.schema()
        if given is not None:
            return output_schema(given, self._settings), self._settings.prefix
        results = (self._old.completions, *sorted(self._old.path.glob("*/*.parquet")))
        for schema in filter(None, map(readable_groups.schema_of, results)):
            if keys := [name for name in schema.names if name.endswith("request_key")]:
                prefix = keys[-1].removesuffix("request_key")
                given = pa.schema([field for field in schema if field.name not in own_schema(prefix).names])
                return pa.schema([*given, *own_schema(prefix)]), prefix
        return own_schema(self._settings.prefix), self._settings.prefix

    def _pieces(self) -> Iterator[Piece]:
        """Every chunk that was ever opened, or of which something is left."""
        if self._source is None or self._facts is None:
            yield from self._pieces_without_input()
            return
        first_row = 0
        for number, given in enumerate(self._windows(self._source, self._facts)):
            if not self._was_opened(number, first_row):
                return
            kept = self._kept.between(first_row, first_row + given.rows)
            end = msgspec.json.encode(given.end).decode()
            input_digest = stored_window.write(self._new.input_of(number, self._facts.layout), given.table)
            yield self._joined(Chunk(number, first_row, given.rows, end, input_digest), kept, self._facts)
            first_row += given.rows

    def _windows(self, source: Source, begun: Manifest) -> Iterator[Window]:
        """The chunks on record as they are (a pilot's last one is short), then as a start would open them."""
        position, rejected = START, frozenset(begun.rejected)
        for chunk in self._known.chunks if self._known.whole else ():
            again = next(source.windows(position, chunk.rows, sys.maxsize, rejected), None)
            if again is None or again.rows != chunk.rows:
                raise InputError(f"the input of rows {chunk.first_row:,} and on is not what it was")
            yield again
            position = again.end
        yield from source.windows(position, begun.output.chunk_rows, begun.output.chunk_bytes, rejected)

    def _was_opened(self, number: int, first_row: int) -> bool:
        if self._known.whole:
            return number < len(self._known.chunks)
        named = [int(path.name[:6]) for path in self._old.parts.glob("[0-9]*.*")]
        opened = number <= max((*named, *(chunk.chunk for chunk in self._known.chunks)), default=-1)
        return self._had_result() or opened or first_row <= max(self._known.rows, default=-1)

    def _had_result(self) -> bool:
        return self._old.completions.exists() or self._old.completions_folder.exists()

    def _joined(self, chunk: Chunk, kept: pa.Table, begun: Manifest) -> Piece:
        """The chunk with its input beside the rows that are kept: sealed if it has them all, else open over them."""
        path = self._new.input_of(chunk.chunk, begun.layout)
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
        again = self._asked_again(set(rows))
        if len(rows) == chunk.rows and not again:
            chunk = msgspec.structs.replace(chunk, open=0)
            path.unlink()
        whole = pa.Table.from_batches([joined(given, own, self._schema)]).cast(self._kept.schema)
        return Piece(chunk.first_row, chunk.end_row, self._was_sealed(chunk.chunk), whole, chunk, again)

    def _that_answer(self, kept: pa.Table, stored: StoredWindow) -> pa.Table:
        """The kept rows whose key is that of the row's own question: files of an earlier layout speak of others."""
        columns = (kept.column(self._prefix + name).to_pylist() for name in ("row", "variant", "request_key"))
        told = {row: (variant, key) for row, variant, key in zip(*columns, strict=True)}
        right = set()
        for batch in stored.rows():
            for row in batch:
                if row.row in told and self._is_of(row, *told[row.row]):
                    right.add(row.row)
        return kept.filter(pa.array([row in right for row in self._rows(kept)], pa.bool_()))

    def _is_of(self, row: Row, variant: int, key: bytes) -> bool:
        """True where the key is that of the row's question. With images nobody can say here; but in rows that were
        never laid out anew there are no answers to others.
        """
        try:
            request = self._builders[variant].build(row)
        except (InputError, IndexError):
            return False
        if request.pictures:
            return self._facts is not None and not self._facts.layout
        return request.key == key

    def _was_sealed(self, number: int) -> bool:
        return self._had_result() or any(chunk.chunk == number and not chunk.open for chunk in self._known.chunks)

    def _asked_again(self, kept: set[int]) -> tuple[Reopened, ...]:
        """Rows that a retry was about to ask, where that is certain; elsewhere their old records just stand."""
        if not self._known.whole:
            return ()
        reopened = self._known.reopened.items()
        return tuple(again for row, again in reopened if row in kept and row not in self._known.rows)

    def _pieces_without_input(self) -> Iterator[Piece]:
        chunks = self._known.chunks
        starts = [0, *(chunk.end_row for chunk in chunks)]
        if not self._known.whole or [chunk.first_row for chunk in chunks] != starts[:-1]:
            kept = self._kept.between(0, NO_END)
            yield Piece(0, max(self._rows(kept), default=-1) + 1, self._had_result(), kept)
            return
        for chunk in chunks:
            kept = self._kept.between(chunk.first_row, chunk.end_row)
            yield Piece(chunk.first_row, chunk.end_row, not chunk.open, kept)

    def _gaps(self, piece: Piece) -> Iterator[tuple[int, int]]:
        """The spans of the piece's rows that are not kept."""
        next_row = piece.first_row
        for row in (*self._rows(piece.kept), piece.end_row):
            if row > next_row:
                yield next_row, row
            next_row = row + 1

    def _rows(self, table: pa.Table) -> list[int]:
        rows: list[int] = table.column(self._prefix + "row").to_pylist()  # type: ignore[assignment]
        return rows

    def _write_lost(self, lost: list[tuple[int, int, bool]]) -> None:
        bound = self._bound_usd()

        def write(temporary: Path) -> None:
            temporary.touch(mode=0o600)
            with temporary.open("w", newline="", encoding="utf-8") as file:
                lines = csv.writer(file, lineterminator="\n")
                lines.writerow(["first_row", "last_row", "rows", "answered", "ask_again_usd_at_most"])
                for first, end, answered in lost:
                    at_most = "" if bound is None else bound * (end - first)
                    lines.writerow([first, end - 1, end - first, "yes" if answered else "perhaps", at_most])

        replace(self._new.path / LOST, write)

    def _bound_usd(self) -> Decimal | None:
        """The most that one row can cost; None where a price is unknown."""
        if self._facts is None:
            return None
        known = msgspec.json.decode(self._known.manifest.get("prices", "{}"), type=dict[str, PriceTable | None])
        requests = self._facts.max_request.items()
        bounds = [prices.upper_bound(*tokens, known.get(model)) for model, tokens in requests]
        return max((bound or Decimal(0) for bound in bounds), default=None) if None not in bounds else None


def in_words(salvaged: Salvaged) -> Iterator[str]:
    """What was kept, and how to go on."""
    kept = f"{plural(salvaged.rows, 'row')} that cost ${salvaged.cost_usd:,.6f}"
    yield f"kept     {salvaged.path / NAME}: {kept}"
    if salvaged.missing:
        yield f"missing  {salvaged.path / LOST}: {plural(salvaged.missing, 'row')}, lost or not answered yet"
    if salvaged.problem is None:
        yield f"next     the same command with -o {salvaged.path} asks only rows that are missing"
    else:
        yield f"next     it can't be gone on with ({salvaged.problem}): ask the missing rows by a job of their own"
