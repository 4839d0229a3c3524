"""The end of a run: writes the result from the parts, verifies it, and deletes the working files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import pyarrow as pa

from batchrun import durable
from batchrun.errors import ANOTHER, CheckpointError
from batchrun.records import Summary
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.chunks import Chunks
from batchrun.store.db_tables import Chunk
from batchrun.store.manifest import Manifest
from batchrun.store.rundir import RunDirectory
from batchrun.tables import files

FINISHED = "finished"
"""The manifest entry that says the result is written. The parts are not needed from then on."""


class Written(msgspec.Struct, frozen=True, array_like=True):
    """Size, time and digest of a file of the result when it was written."""

    size: int
    mtime_ns: int
    digest: str


class Finished(msgspec.Struct, frozen=True):
    """The result as it was written: `digest` of completions.parquet ("": the parts themselves are the result), `usage`
    that of usage.parquet, and all files by their path in the run directory.
    """

    digest: str
    usage: str
    files: dict[str, Written] = {}


def finished(manifest: Mapping[str, str]) -> Finished:
    """The manifest entry `FINISHED`, which must be there."""
    return msgspec.json.decode(manifest[FINISHED], type=Finished)


def write(
    facts: Manifest,
    schema: pa.Schema,
    checkpoint: Checkpoint,
    chunks: Chunks,
    directory: RunDirectory,
    summary: Summary,
) -> None:
    """Writes the result and closes the checkpoint. Every step can be repeated after a kill."""
    if FINISHED not in checkpoint.manifest_entries():
        digest = _write_completions(facts, schema, chunks, directory, summary)
        files.write_usage(directory.usage, checkpoint.totals.lines())
        usage = durable.digest(directory.usage)
        digests = {directory.usage: usage} | (_digests_of_parts(chunks, directory) if digest is None else {})
        if digest is not None:
            digests[directory.completions] = digest
        files_written = {str(path.relative_to(directory.path)): _written(path, each) for path, each in digests.items()}
        entry = Finished(digest or "", usage, files_written)
        checkpoint.write_manifest({FINISHED: msgspec.json.encode(entry).decode()})
    checkpoint.close(finished=True)
    tidy(directory)


def _digests_of_parts(chunks: Chunks, directory: RunDirectory) -> dict[Path, str]:
    folder = directory.completions_folder
    return {files.part_in(folder, number): chunk.part_digest or "" for number, chunk in chunks.sealed.items()}


def _written(path: Path, digest: str) -> Written:
    found = path.stat()
    return Written(found.st_size, found.st_mtime_ns, digest)


def require_intact(directory: RunDirectory, layout: str, rows: int, manifest: Mapping[str, str]) -> None:
    """Checks the result of a finished run by the footers, sizes and times of its files. Only a file with another time,
    such as a copy, is read as a whole; `verify` reads them all.

    Raises:
        CheckpointError: a file is missing, cut or changed, or has another number of rows.
    """
    whole = [directory.completions]
    if layout == "parts":
        whole = sorted(directory.completions_folder.glob("*.parquet")) or [directory.completions_folder]
    for path in (*whole, directory.usage):
        if not path.exists():
            raise CheckpointError(f"{path} is missing, though the run is complete; restore it, or {ANOTHER}")
    found = sum(map(files.rows_in, whole))
    files.rows_in(directory.usage)
    if found != rows:
        raise CheckpointError(
            f"{directory.path}: the result has {found:,} rows, {rows:,} were written; "
            f"batchrun verify {directory.path} shows what is damaged"
        )
    for name, written in finished(manifest).files.items():
        _require_unchanged(directory, directory.path / name, written)


def _require_unchanged(directory: RunDirectory, path: Path, written: Written) -> None:
    found = path.stat()
    if found.st_size == written.size and found.st_mtime_ns == written.mtime_ns:
        return
    if found.st_size != written.size or durable.digest(path) != written.digest:
        raise CheckpointError(
            f"{path} was changed after it was written; restore it, or run batchrun verify {directory.path}"
        )


def tidy(directory: RunDirectory) -> None:
    """Deletes the files that only an unfinished run needs."""
    origins = directory.path.glob("origins*")
    for path in (*directory.parts.iterdir(), *origins, directory.reserve, directory.inflight, directory.partial):
        path.unlink(missing_ok=True)


def _write_completions(
    facts: Manifest, schema: pa.Schema, chunks: Chunks, directory: RunDirectory, summary: Summary
) -> str | None:
    """Writes the result; the digest of completions.parquet, or None if the parts themselves are the result."""
    parts = [
        (directory.part_of(number, chunk.generation), chunk.part_digest or "", chunk.rows)
        for number, chunk in sorted(chunks.sealed.items())
    ]
    settings = facts.output
    if (rows := sum(rows for _, _, rows in parts)) != summary.rows:
        raise CheckpointError(
            f"{directory.path}: the run has {summary.rows:,} rows, {rows:,} are sealed; nothing is written"
        )
    if settings.layout == "parts":
        files.move_parts(parts, directory.completions_folder)
        if not parts:  # so that the folder has the columns
            files.write_part(files.part_in(directory.completions_folder, 0), schema, (), settings, 0)
        return None
    footer = {files.FOOTER_KEY: msgspec.json.encode(bill(summary)).decode()}
    return files.assemble(parts, directory.completions, schema, settings.compression, footer)


def bill(summary: Summary) -> dict[str, object]:
    """The run in the footer of its result, so that a file that was moved still has it: its bill, and that it is
    complete.
    """
    names = ("job", "run_id", "begun_at", "rows", "by_status", "totals", "cost_usd", "wasted_usd")
    doubts = ("unpriced", "without_usage", "possibly_billed_count", "possibly_billed_usd", "models", "price")
    copy = ("invocation", "updated_at")  # which of two copies is the newer
    beside = ("tags", "estimate", "reused", "duplicates", "saved_usd", "shard", "merged")
    bill = {name: getattr(summary, name) for name in (*names, *doubts, *copy, *beside)}
    return {"version": summary.version, "complete": True, "rows_in_output": summary.rows, **bill}


def restore_parts(
    facts: Manifest, checkpoint: Checkpoint, chunks: Sequence[Chunk], directory: RunDirectory
) -> list[Chunk]:
    """Cuts the result of a finished run into parts again; returns the chunks with these parts.

    The result stays until a new one replaces it. The parts count once the chunks are in the checkpoint.

    Raises:
        CheckpointError: the result was changed after it was written.
    """
    directory.parts.mkdir(mode=0o700, exist_ok=True)
    settings = facts.output
    if settings.layout == "parts":
        for chunk in chunks:
            files.copy_part(
                files.part_in(directory.completions_folder, chunk.chunk),
                directory.part_of(chunk.chunk, chunk.generation),
                chunk.part_digest or "",
            )
        return list(chunks)
    digest = finished(checkpoint.manifest_entries()).digest
    schema = files.schema_of(directory.completions)
    pieces = files.cut(directory.completions, digest, [chunk.rows for chunk in chunks])
    restored = []
    for chunk, batches in zip(chunks, pieces, strict=True):
        generation = chunk.generation + 1
        path = directory.part_of(chunk.chunk, generation)
        part_digest = files.write_part(path, schema, batches, settings, chunk.rows)
        restored.append(msgspec.structs.replace(chunk, generation=generation, part_digest=part_digest))
    return restored
