"""Writes the rows that a run has so far, if no process works on it. Sends nothing and changes nothing else.

The checkpoint is read through a private copy, sealed parts are copied as they are, open chunks are joined with their
stored input, and rows that were never opened are read from the input.
"""

from collections.abc import Iterator
from itertools import chain, starmap
from pathlib import Path

import msgspec
import pyarrow as pa

from batchrun.errors import InputError, JobError
from batchrun.integrity.readable_groups import nullable
from batchrun.integrity.salvage import unchanged_input
from batchrun.records import FinishedResult
from batchrun.report import run_state
from batchrun.report.summary import read_or_none
from batchrun.report.wording import plural
from batchrun.run_summary import Summary
from batchrun.source import JsonlSource, Source, TableSource
from batchrun.storage.urls import is_url
from batchrun.store import at_rest, partial, result, result_files, stored_window
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.chunks import Chunks, Layout
from batchrun.store.manifest import Manifest
from batchrun.store.rundir import RunDirectory
from batchrun.tables import files, json_lines
from batchrun.tables.json_columns import ColumnTypes
from batchrun.tables.rows import output_schema, own_schema


class Exported(msgspec.Struct, frozen=True):
    """The file with the rows, and the number of pending ones. `problem`: why pending rows lack their input."""

    path: Path
    rows: int
    pending: int
    complete: bool
    written: bool
    problem: str | None = None


def export(directory: RunDirectory, to: Path | None = None) -> Exported:
    """Writes the run's rows to `to`, or into the run directory with usage.parquet; a complete run has them already.

    Raises:
        InputError: there is no run, or it has no rows yet.
        JobError: they can't be written to `to`.
        RunLockedError: a process works on the run.
        CheckpointError: the run is damaged.
        DiskError: the file can't be written.
    """
    if not directory.checkpoint.exists():
        raise InputError(f"{directory.path}: no run here (no checkpoint.db); name a run directory")
    with directory.lock(), at_rest.opened(directory.checkpoint, directory.inflight) as checkpoint:
        entries = checkpoint.manifest_entries()
        if Manifest.ENTRY not in entries:
            raise InputError(f"{directory.path}: no rows yet: the run ended while its input was checked; run it again")
        known = Manifest.decode(entries)
        if to is not None:
            _require_place(to, directory, known)
        summary = run_state.from_checkpoint(directory, checkpoint, read_or_none(directory))
        if result.FINISHED in entries:
            return _complete(directory, known, summary, result.finished(entries), to)
        exported = _so_far(directory, checkpoint, known, summary, to or directory.partial)
        if to is None:
            files.write_usage(directory.usage, checkpoint.totals.lines())
        return exported


def in_words(exported: Exported) -> Iterator[str]:
    """The lines that say what was written, and what is missing."""
    if exported.complete:
        what = "written to" if exported.written else "all of them are in"
        yield f"the run is complete: {plural(exported.rows, 'row')}, {what} {exported.path}"
        return
    done = exported.rows - exported.pending
    yield f"wrote {exported.path}: {plural(exported.rows, 'row')}, {done:,} done, {exported.pending:,} pending"
    if exported.problem is not None:
        yield f"pending rows that had not been read yet have no input columns: {exported.problem}"


def _require_place(to: Path, directory: RunDirectory, known: Manifest) -> None:
    """Refuses a target that would overwrite anything but an earlier export.

    Raises:
        JobError: it would.
    """
    if to.is_dir():
        raise JobError(f"-o {to}: is a directory; name a file in it")
    if to.exists() and not to.is_file():
        raise JobError(f"-o {to}: is not a regular file; name another")
    if not to.parent.is_dir():
        raise JobError(f"-o {to}: there is no directory {to.parent}; make it first")
    place = to.resolve()
    if place.is_relative_to(directory.path.resolve()):
        raise JobError(f"-o {to}: is in the run directory; leave out -o, or name a file elsewhere")
    if any(place == Path(file.path).resolve() for file in known.files):
        raise JobError(f"-o {to}: is the run's input; name another file")


def _complete(
    directory: RunDirectory, known: Manifest, summary: Summary, written: FinishedResult, to: Path | None
) -> Exported:
    rows = summary.done
    if to is None:
        return Exported(result_files.shown(directory), rows, 0, complete=True, written=False)
    parts = [(directory.path / file.name, file.digest, file.rows) for file in written.kept or written.files]
    if json_lines.packing_of(to) is not None:
        json_lines.write(
            to, files.schema_of(parts[0][0]), chain.from_iterable(starmap(files.sealed_batches, parts)), rows
        )
    elif written.kept or written.folder:
        footer = {files.FOOTER_KEY: msgspec.json.encode(result.bill(summary)).decode()}
        files.assemble(parts, to, files.schema_of(parts[0][0]), known.output.compression, footer)
    else:
        files.copy_part(directory.completions, to, written.files[0].digest)
    return Exported(to, rows, 0, complete=True, written=True)


def _so_far(directory: RunDirectory, checkpoint: Checkpoint, known: Manifest, summary: Summary, to: Path) -> Exported:
    source: Source = JsonlSource(())
    problem: str | None = None
    try:
        source = unchanged_input(known, directory)
    except InputError as error:  # it has changed since the run began: rows that were not read yet lack their columns
        relative = any(not (is_url(file.path) or Path(file.path).is_absolute()) for file in known.files)
        problem = f"{error}" + ("; run this where the run was started" if relative else "")
    types = known.column_types
    schema = _schema(directory, checkpoint, known, source, types)
    batches = Chunks(directory, checkpoint, Layout.of(known, source, schema, summary.rows)).so_far()
    if problem is not None:
        schema = nullable(schema)
        opened = max((chunk.end_row for chunk in checkpoint.chunks()), default=known.first_row)
        end_row = known.first_row + summary.rows
        problem = problem if opened < end_row else None
        widened = (pa.RecordBatch.from_arrays(batch.columns, schema=schema) for batch in batches)
        batches = chain(widened, partial.without_input(opened, end_row, schema))
    pending = partial.write(to, batches, schema, known.output.compression, summary)
    return Exported(to, summary.rows, pending, complete=False, written=True, problem=problem)


def _schema(
    directory: RunDirectory, checkpoint: Checkpoint, known: Manifest, source: Source, types: ColumnTypes | None
) -> pa.Schema:
    """The columns of the result. If a Parquet input is missing, they come from the first chunk."""
    if types is not None:
        given = types.schema()
    elif isinstance(source, TableSource):
        given = source.schema
    elif not (chunks := checkpoint.chunks()):
        return own_schema(known.output.prefix, known.answer_column)
    elif chunks[0].open:
        given = stored_window.schema_of(directory.input_of(0, known.layout))
    else:
        return files.schema_of(directory.part_of(0, chunks[0].generation)).remove_metadata()
    return output_schema(given, known.output, known.answer_column)
