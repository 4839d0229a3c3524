"""Checks everything in a run directory by checksums, and figures that are kept twice. Changes no file, sends nothing.

The database's records have CRCs; parts, stored inputs and results have digests; figures kept twice must agree.
"""

import contextlib
import itertools
from collections.abc import Collection, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import msgspec

from batchrun.durable import digest, disk_errors
from batchrun.errors import CheckpointError, DiskError, InputError
from batchrun.integrity import audit, db_records, readable_groups
from batchrun.integrity.audit import RowSums
from batchrun.integrity.db_records import DbRecords
from batchrun.integrity.findings import SALVAGE, Damage, Findings, Span, merged
from batchrun.money import usd_or_none
from batchrun.report.wording import plural
from batchrun.store import in_flight, price_tables, result, result_folder, spill, variants
from batchrun.store.at_rest import wal_of
from batchrun.store.commits import SPILL
from batchrun.store.db_tables import Chunk
from batchrun.store.manifest import Manifest
from batchrun.store.price_tables import Tables
from batchrun.store.rundir import RunDirectory
from batchrun.tables import files
from batchrun.tables.rows import own_schema

RESUME = "run the same command again: it resumes all the same"
EXPORT_AGAIN = "remove it; `batchrun export` writes it again"
REBUILD = "`batchrun verify DIR --rebuild` writes the result again from the run's parts"
REWRITE = "remove it and run the same command again, which rewrites it"


def verify(directory: RunDirectory) -> Findings:
    """The findings: intact files and damages.

    Raises: as `inspected`.
    """
    with inspected(directory) as inspection:
        return inspection.findings()


@contextlib.contextmanager
def inspected(directory: RunDirectory) -> "Iterator[Inspection]":
    """Inspects every file, and holds the directory's lock until the block ends.

    Raises:
        InputError: there is no run.
        RunLockedError: a process works on it.
        DiskError: a file can't be read.
    """
    if not directory.path.is_dir() or not any(directory.path.iterdir()):
        raise InputError(f"{directory.path}: no run here; name a run directory")
    with directory.lock():
        inspection = Inspection(directory)
        inspection.inspect()
        yield inspection


class Inspection:
    """One inspection of a locked directory. `known` are the records of its database, all or those that can be read."""

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self.sound: list[str] = []
        self.damages: list[Damage] = []
        self.sums = RowSums()
        self.known = self._read()
        self._finished = result.FINISHED in self.known.manifest

    def findings(self) -> Findings:
        """The result of `inspect`."""
        if not self.known.whole and not self.known.manifest and (bill := audit.bill_without_database(self.directory)):
            what = f"{plural(bill.rows, 'row')}, ${bill.usd:,.6f}, with no other record to check it"
            self.sound.append(f"{bill.place}: {what}")
            return Findings(tuple(self.sound), tuple(self.damages), f"{bill.usd:,.6f}", f"{Decimal(0):,.6f}")
        beyond, exact = audit.unaccounted_usd(self.known, self.sums)
        return Findings(
            tuple(self.sound),
            tuple(self.damages),
            f"{self.known.totals.cost_usd():,.6f}",
            f"{beyond:,.6f}" if exact and beyond >= 0 else None,
        )

    def inspect(self) -> None:
        """Inspects every file."""
        directory = self.directory
        if self.known.torn:
            what = "the last commit can't be read: torn by a power cut, or damaged; its rows are sent again"
            self._damaged(wal_of(directory.checkpoint), what, then=RESUME)
        if Manifest.ENTRY not in self.known.manifest:
            traces = [path.name for path in (directory.completions, directory.inflight) if path.exists()]
            if self.known.whole and traces:
                self._damaged(directory.checkpoint, f"holds no run, although {traces[0]} exists")
            elif self.known.whole:
                self.sound.append("checkpoint.db: no run has started here yet")
            return
        try:
            manifest = Manifest.decode(self.known.manifest)
            variants.decode(self.known.manifest)
            prices = price_tables.decode(self.known.manifest)
        except (CheckpointError, msgspec.DecodeError) as error:
            self._damaged(self.directory.checkpoint, f"its manifest can't be read: {error}")
            return
        self._chunks(manifest)
        if self._finished and manifest.output.is_one_file:
            (whole,) = result.finished(self.known.manifest).files
            span = manifest.first_row, manifest.first_row + audit.rows_due(self.known)
            self._rows_of(self.directory.completions, whole.digest, span, manifest.output.prefix)
        else:
            for chunk in self.known.chunks:
                self._chunk(chunk, manifest)
        self._counted_twice(manifest, prices)
        self._spilled()
        if not self._finished:
            self._slots()
            if self.directory.completions.exists():
                self.sound.append("completions.parquet: from before, until the run is complete again; not checked")
        self._kept_input(manifest)
        self._partial()

    def _damaged(self, path: Path, what: str, rows: tuple[Span, ...] = (), then: str = SALVAGE) -> None:
        name = str(path.relative_to(self.directory.path))
        self.damages.append(Damage(name, what.removeprefix(f"{path}: "), rows, then))

    def _read(self) -> DbRecords:
        path = self.directory.checkpoint
        try:
            known = db_records.read(path)
        except DiskError:
            raise
        except CheckpointError as error:
            known = db_records.readable(path)
            what = str(error).partition("; keep a copy")[0]
            broken = log if what.startswith(str(log := wal_of(path))) else path
            self._damaged(broken, f"{what}; {plural(known.records, 'record')} can still be read")
        else:
            self.sound.append(f"checkpoint.db: {plural(known.records, 'record')}, every page")
        return known

    def _chunks(self, manifest: Manifest) -> None:
        row = manifest.first_row
        for number, chunk in enumerate(self.known.chunks):
            if (chunk.chunk, chunk.first_row) != (number, row) or chunk.rows < 1:
                self._damaged(self.directory.checkpoint, f"chunk {number} should start at row {row:,}")
                return
            row = chunk.end_row
        rows = row - manifest.first_row
        if rows > manifest.rows:
            self._damaged(self.directory.checkpoint, f"its chunks have {rows:,} rows, the input has {manifest.rows:,}")
            return
        self.sound.append(f"chunks: {len(self.known.chunks):,}, contiguous, {rows:,} of {plural(manifest.rows, 'row')}")

    def _chunk(self, chunk: Chunk, manifest: Manifest) -> None:
        """Inspects a chunk: a sealed one is its part; an open one its stored input, records and any earlier part."""
        span = chunk.first_row, chunk.end_row
        newer = {row for row in range(*span) if chunk.open and row in self.known.rows}
        if chunk.generation:
            path = self.directory.part_of(chunk.chunk, chunk.generation)
            if manifest.output.layout == "parts":
                path = result_folder.place_of(path, chunk.chunk, chunk.part_digest or "", self.directory)
            elsewhere = newer | self.known.reopened.keys() if chunk.open else newer
            self._rows_of(
                path, chunk.part_digest or "", span, manifest.output.prefix, elsewhere, all_rows=not chunk.open
            )
        if chunk.open:
            stored = self.directory.input_of(chunk.chunk, manifest.layout)
            name = stored.relative_to(self.directory.path)
            self._whole_file(stored, chunk.input_digest, f"{name}: {plural(chunk.rows, 'row')} of input")
            overlay = [self.known.rows[row] for row in newer]
            self.sums.add(
                [str(row.status) for row in overlay],
                [usd_or_none(row.cost_pico_usd) for row in overlay],
            )

    def _rows_of(
        self,
        path: Path,
        expected: str,
        span: Span,
        prefix: str,
        elsewhere: Collection[int] = (),
        *,
        all_rows: bool = True,
    ) -> None:
        """Checks a file of rows, and counts those that can be read and are not `elsewhere`."""
        names = [prefix + column for column in ("row", "status", "cost_usd")]
        problem = None
        try:
            files.require_digest(path, expected)
            groups = readable_groups.columns(path, names)
        except CheckpointError as error:
            problem = str(error)
            groups = readable_groups.groups(path, own_schema(prefix), prefix, *span)
        found: set[int] = set()
        for group in groups:
            rows, statuses, costs = (cast(list[Any], group.column(name).to_pylist()) for name in names)
            found.update(rows)
            is_kept = [row not in elsewhere for row in rows]
            self.sums.add(itertools.compress(statuses, is_kept), itertools.compress(costs, is_kept))
        lost = merged((row, row + 1) for row in range(*span) if row not in found and row not in elsewhere)
        if problem is not None or (lost and all_rows):
            self._damaged(path, problem or "rows are missing", lost)
        else:
            self.sound.append(f"{path.relative_to(self.directory.path)}: {plural(len(found), 'row')}")

    def _counted_twice(self, manifest: Manifest, prices: Tables) -> None:
        all_read = self.known.whole and not any(damage.rows for damage in self.damages)
        result_damaged = any(damage.file == self.directory.completions.name for damage in self.damages)
        if all_read:
            problem = audit.totals_problem(self.known, self.sums, finished=self._finished)
            self._report(self.directory.checkpoint, problem, "its totals are the sums of its rows")
        if self._finished:
            self._report(self.directory.usage, audit.usage_problem(self.directory, self.known), "has the totals' lines")
            self._folder()
        if self._finished and manifest.output.is_one_file and not result_damaged:
            problem = audit.footer_problem(self.directory, self.known, manifest)
            self._report(self.directory.completions, problem, "its footer has the same bill")
        if self.known.whole:
            problem = audit.summary_problem(self.directory, self.known, manifest, prices)
            self._report(self.directory.summary, problem, "agrees", REWRITE)

    def _folder(self) -> None:
        """The manifest of a result of several files, and files beside them that are not of the result."""
        written = result.finished(self.known.manifest)
        for file in written.beside[:-1]:
            self._whole_file(self.directory.path / file.name, file.digest, f"{file.name}: as it was written")
        if written.kept:  # else its files are the parts, or the one file, and were read above
            for file in written.files:
                path = self.directory.path / file.name
                try:
                    files.require_digest(path, file.digest)
                except CheckpointError as error:
                    self._damaged(path, str(error), then=REBUILD)
                else:
                    self.sound.append(f"{file.name}: {plural(file.rows, 'row')}")
        for path in result.unknown_files(self.directory, written):
            self._damaged(path, "is not a file of the result", then="move it away: readers of the folder would read it")

    def _partial(self) -> None:
        """Nothing depends on the partial result, so it is only read."""
        path = self.directory.partial
        if not path.exists():
            return
        try:
            rows = sum(batch.num_rows for batch in files.batches_of(path))
            footer = files.read_footer(path) or {}
        except (CheckpointError, *readable_groups.UNREADABLE) as error:
            self._damaged(path, f"can't be read: {error}".replace(f"{path}: ", ""), then=EXPORT_AGAIN)
            return
        whole = footer.get("complete") is False and footer.get("rows_in_output") == rows
        self._report(
            path, None if whole else "its footer belongs to another file", "readable, from before", EXPORT_AGAIN
        )

    def _whole_file(self, path: Path, expected: str, sound: str) -> None:
        with disk_errors(path):
            found = digest(path) if path.exists() else None
        if found == expected:
            self.sound.append(sound)
        else:
            self._damaged(path, "is missing" if found is None else "its digest is not the one on record")

    def _report(self, path: Path, problem: str | None, otherwise: str, then: str = SALVAGE) -> None:
        if problem is None:
            self.sound.append(f"{path.name}: {otherwise}")
        else:
            self._damaged(path, problem, then=then)

    def _slots(self) -> None:
        """Slots exist from before the first request until the run is finished."""
        path = self.directory.inflight
        with disk_errors(path):
            size = path.stat().st_size if path.exists() else None
        if size is None:
            reopened_or_salvaged = self.known.reopened or db_records.SALVAGED in self.known.manifest
            if self.known.rows or (self.known.totals.booked and not reopened_or_salvaged):
                self._damaged(
                    path, "is missing: the requests in flight when the last process ended are unknown", then=RESUME
                )
            return
        taken = in_flight.read(path)
        unreadable = taken.count(in_flight.UNREADABLE)
        if unreadable or size % in_flight.SLOT_BYTES or not size:
            what = f"{plural(unreadable, 'slot')} can't be read: as many requests may have been billed without a name"
            self._damaged(path, what, then=RESUME)
        else:
            self.sound.append(f"inflight.bin: {plural(size // in_flight.SLOT_BYTES, 'slot')}, {len(taken):,} taken")

    def _spilled(self) -> None:
        path = self.directory.checkpoint.with_name(SPILL)
        try:
            frames = list(spill.read(path))
        except DiskError:
            raise
        except (CheckpointError, msgspec.DecodeError) as error:
            self._damaged(path, str(error).partition("; keep a copy")[0])
            return
        if frames:
            rows = sum(len(frame.completions) for frame in frames)
            self.sound.append(f"{path.name}: {plural(rows, 'row')} that the next start takes in")

    def _kept_input(self, manifest: Manifest) -> None:
        """The copy of standard input, if that was the input."""
        path = self.directory.spool
        with disk_errors(path):
            found = digest(path) if path.exists() else None
        if found is None and [file.path for file in manifest.files] != [str(path)]:
            return
        self._report(path, None if (found,) == manifest.digests else "is not the input of this run", "as it was read")
