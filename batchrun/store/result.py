"""The end of a run: writes the result from the parts, verifies it, and deletes the working files."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, starmap
from pathlib import Path

import msgspec
import pyarrow as pa

from batchrun import durable
from batchrun.errors import ANOTHER, CheckpointError, quoted
from batchrun.records import FinishedResult, ResultFile
from batchrun.run_summary import Summary
from batchrun.store import result_files, result_folder
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.chunks import Chunks
from batchrun.store.db_tables import Chunk
from batchrun.store.manifest import Manifest
from batchrun.store.result_folder import described
from batchrun.store.rundir import RunDirectory
from batchrun.tables import files, json_lines

FINISHED = "finished"
"""The manifest entry that says the result is written. The parts are not needed from then on."""


def finished(entries: Mapping[str, str]) -> FinishedResult:
    """The result that was written: the manifest entry `FINISHED`, which must be there."""
    return msgspec.json.decode(entries[FINISHED], type=FinishedResult)


def write(
    manifest: Manifest,
    schema: pa.Schema,
    checkpoint: Checkpoint,
    chunks: Chunks,
    directory: RunDirectory,
    summary: Summary,
) -> FinishedResult:
    """Writes the result and closes the checkpoint. Every step can be repeated after a kill."""
    entries = checkpoint.manifest_entries()
    if FINISHED in entries:
        written = finished(entries)
    else:
        written = _written(manifest, schema, chunks.sealed.values(), checkpoint, directory, summary)
        checkpoint.write_manifest({FINISHED: msgspec.json.encode(written).decode()})
    checkpoint.close(finished=True)
    tidy(directory, written)
    return written


def _written(
    manifest: Manifest,
    schema: pa.Schema,
    sealed: Iterable[Chunk],
    checkpoint: Checkpoint,
    directory: RunDirectory,
    summary: Summary,
) -> FinishedResult:
    """The result in its layout, in its place, with usage.parquet."""
    in_order = sorted(sealed, key=lambda chunk: chunk.chunk)
    parts = [(directory.part_of(each.chunk, each.generation), each.part_digest or "", each.rows) for each in in_order]
    if (rows := sum(rows for _, _, rows in parts)) != summary.rows:
        raise CheckpointError(
            f"{directory.path}: the run has {summary.rows:,} rows, {rows:,} are sealed; nothing is written"
        )
    keeps_parts = not (manifest.output.is_one_file or manifest.output.layout == "parts")
    if keeps_parts and not parts:  # so that the run has the columns
        path = directory.part_of(0, 0)
        parts = [(path, files.write_part(path, schema, (), manifest.output, 0), 0)]
    if manifest.output.layout == "parts":
        staged = result_folder.stage_parts(parts, directory)
        if not parts:  # so that the folder has the columns
            path = files.part_in(directory.staging, 0)
            staged = [described(directory.path, path, files.write_part(path, schema, (), manifest.output, 0), 0)]
        written = result_folder.publish(staged, bill(summary), directory)
    elif manifest.output.partition_by:
        staged = result_folder.stage_partitions(parts, schema, manifest.output, directory)
        written = result_folder.publish(staged, bill(summary), directory)
    elif manifest.output.format != "parquet":
        path = result_files.lines_in(directory, manifest.output.format)
        digest = json_lines.write(path, schema, chain.from_iterable(starmap(files.sealed_batches, parts)), rows)
        written = FinishedResult((described(directory.path, path, digest, rows),), ())
    else:
        footer = {files.FOOTER_KEY: msgspec.json.encode(bill(summary)).decode()}
        digest = files.assemble(parts, directory.completions, schema, manifest.output.compression, footer)
        written = FinishedResult((described(directory.path, directory.completions, digest, rows),), ())
    files.write_usage(directory.usage, checkpoint.totals.lines())
    usage = described(directory.path, directory.usage, durable.digest(directory.usage), 0)
    kept = tuple(described(directory.path, *part) for part in parts) if keeps_parts else ()
    return msgspec.structs.replace(written, beside=(*written.beside, usage), kept=kept)


def rewrite(manifest: Manifest, checkpoint: Checkpoint, directory: RunDirectory, summary: Summary) -> FinishedResult:
    """Writes the result of a complete run again, in place of what is there, from the parts that the run keeps.

    Raises:
        CheckpointError: it keeps none, or one of them is not what was sealed.
    """
    before = finished(checkpoint.manifest_entries())
    if not before.kept:
        raise CheckpointError(f"{directory.path}: the result is the only copy of its rows; restore it from a backup")
    schema = files.schema_of(directory.path / before.kept[0].name)
    written = _written(manifest, schema, checkpoint.chunks(), checkpoint, directory, summary)
    checkpoint.write_manifest({FINISHED: msgspec.json.encode(written).decode()})
    tidy(directory, written)
    return written


def require_intact(directory: RunDirectory, rows: int, entries: Mapping[str, str]) -> None:
    """Checks the result of a finished run by the footers, sizes and times of its files. Only a file with another time,
    such as a copy, is read as a whole; `verify` reads them all.

    Raises:
        CheckpointError: a file is missing, cut, changed or new, or has another number of rows.
    """
    written = finished(entries)
    every = (*written.files, *written.beside, *written.kept)
    for file in every:
        if not (path := directory.path / file.name).exists():
            restore = _rebuild(directory, written, file) or f"restore it, or {ANOTHER}"
            raise CheckpointError(f"{path} is missing, though the run is complete; {restore}")
    if unknown := unknown_files(directory, written):
        raise CheckpointError(
            f"{unknown[0]} is not a file of the result, and readers of the folder would read it; move it away"
        )
    tables = written.kept or written.files
    found = sum(files.rows_in(directory.path / file.name) for file in tables)
    files.rows_in(directory.usage)
    if found != rows:
        raise CheckpointError(
            f"{directory.path}: the result has {found:,} rows, {rows:,} were written; "
            f"batchrun verify {quoted(directory.path)} shows what is damaged"
        )
    for file in every:
        _require_unchanged(directory, written, file)


def unknown_files(directory: RunDirectory, written: FinishedResult) -> list[Path]:
    """Files in the result's folder that are not of it, and that readers of the folder would read."""
    if not written.folder:
        return []
    folder, known = directory.path / written.folder, {directory.path / file.name for file in written.files}
    below = (path for path in folder.rglob("*") if path.is_file() and path not in known)
    return sorted(path for path in below if not path.name.startswith((".", "_")))


def _require_unchanged(directory: RunDirectory, written: FinishedResult, file: ResultFile) -> None:
    """Returns if the file has the size and time of when it was written, or else its content."""
    path = directory.path / file.name
    found = path.stat()
    if found.st_size == file.size_bytes and found.st_mtime_ns == file.mtime_ns:
        return
    if found.st_size != file.size_bytes or durable.digest(path) != file.digest:
        restore = _rebuild(directory, written, file) or f"restore it, or run batchrun verify {quoted(directory.path)}"
        raise CheckpointError(f"{path} was changed after it was written; {restore}")


def _rebuild(directory: RunDirectory, written: FinishedResult, file: ResultFile) -> str | None:
    """How to write the file again from the parts that the run keeps; None: it is one of them, or there are none."""
    if not written.kept or file in written.kept:
        return None
    return f"batchrun verify {quoted(directory.path)} --rebuild writes the result again from the run's parts"


def tidy(directory: RunDirectory, written: FinishedResult) -> None:
    """Deletes the files that only an unfinished run needs."""
    kept = {directory.path / file.name for file in written.kept}
    origins = directory.path.glob("origins*")
    for path in (*directory.parts.iterdir(), *origins, directory.reserve, directory.inflight, directory.partial):
        if path not in kept:
            path.unlink(missing_ok=True)
    for folder in directory.path.glob(f"{directory.completions_folder.name}*{durable.TEMP_SUFFIX}"):
        durable.remove_folder(folder)


def bill(summary: Summary) -> dict[str, object]:
    """The run in the footer of its result, so that a file that was moved still has it: its bill, and that it is
    complete.
    """
    names = ("job", "run_id", "created_at", "rows", "by_status", "totals", "cost_usd", "wasted_usd")
    doubts = ("unpriced", "without_usage", "possibly_billed_count", "possibly_billed_usd", "models", "price")
    copy = ("invocation", "updated_at")  # which of two copies is the newer
    beside = ("unpriced_usage", "tags", "estimate", "reused", "duplicates", "saved_usd", "shard", "merged")
    bill = {name: getattr(summary, name) for name in (*names, *doubts, *copy, *beside)}
    return {"version": summary.version, "complete": True, "rows_in_output": summary.rows, **bill}


def restore_parts(
    manifest: Manifest, checkpoint: Checkpoint, chunks: Sequence[Chunk], directory: RunDirectory
) -> list[Chunk]:
    """Cuts the result of a finished run into parts again, unless they were kept; returns the chunks with these parts.

    The result stays until a new one replaces it. The parts count once the chunks are in the checkpoint.

    Raises:
        CheckpointError: the result was changed after it was written.
    """
    directory.parts.mkdir(mode=0o700, exist_ok=True)
    settings = manifest.output
    if settings.layout == "parts":
        for chunk in chunks:
            files.link_part(
                files.part_in(directory.completions_folder, chunk.chunk),
                directory.part_of(chunk.chunk, chunk.generation),
                chunk.part_digest or "",
            )
        return list(chunks)
    written = finished(checkpoint.manifest_entries())
    if written.kept:
        return list(chunks)
    (whole,) = written.files
    schema = files.schema_of(directory.completions)
    pieces = files.cut(directory.completions, whole.digest, [chunk.rows for chunk in chunks])
    restored = []
    for chunk, batches in zip(chunks, pieces, strict=True):
        generation = chunk.generation + 1
        path = directory.part_of(chunk.chunk, generation)
        part_digest = files.write_part(path, schema, batches, settings, chunk.rows)
        restored.append(msgspec.structs.replace(chunk, generation=generation, part_digest=part_digest))
    return restored
