"""Retries settled rows: their chunks are opened again over the parts they have.

The records of other rows are copied unchanged when the chunk is sealed again. Until then the old records count, also if
the process dies meanwhile.
"""

import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import msgspec

from batchrun.durable import disk_errors
from batchrun.errors import InputError
from batchrun.source import START, Position
from batchrun.startup.resume import Plan
from batchrun.store import result, stored_window
from batchrun.store.base_part import BasePart
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.db_tables import Chunk, Reopened
from batchrun.store.rundir import RunDirectory


def reopen(
    plan: Plan,
    directory: RunDirectory,
    checkpoint: Checkpoint,
    statuses: Collection[str],
    variant: int,
    entries: Mapping[str, str],
) -> int:
    """Makes every row with one of the statuses pending again, in one transaction; returns how many.

    The `entries` of the manifest are written with it. Nothing is touched if there is no such row.

    Raises:
        InputError: the input differs from what a chunk was made of.
        CheckpointError: a part or the result is damaged.
    """
    chunks = checkpoint.chunks()
    if not any(checkpoint.totals.standing.get(status) for status in statuses):
        return 0
    if result.FINISHED in checkpoint.manifest_entries():
        chunks = result.restore_parts(plan.manifest, checkpoint, chunks, directory)
    start, count = START, 0
    with _Rows(directory.path) as rows:
        for place, chunk in enumerate(chunks):
            path = directory.part_of(chunk.chunk, chunk.generation)
            base = BasePart(path, chunk.part_digest or "", plan.manifest.output.prefix)
            if found := base.reopened(statuses, variant):
                count += len(found)
                rows.add(found)
                _store_input_again(plan, directory, chunk, start)
                chunks[place] = msgspec.structs.replace(chunk, open=1)
            start = msgspec.json.decode(chunk.end_position, type=Position)
        checkpoint.reopen_chunks(chunks, rows, entries)
    return count


class _Rows:
    """Rows to reopen, in an unnamed file: a tenth of ten million rows would fill memory. May be read several times."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        with disk_errors(directory):
            self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115  (lives as long as this object)

    def add(self, rows: Sequence[Reopened]) -> None:
        with disk_errors(self._directory):
            self._file.write(msgspec.json.Encoder().encode_lines(rows))

    def __iter__(self) -> Iterator[Reopened]:
        with disk_errors(self._directory):
            self._file.seek(0)
        return map(msgspec.json.Decoder(Reopened).decode, self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _store_input_again(plan: Plan, directory: RunDirectory, chunk: Chunk, start: Position) -> None:
    """Stores the input of the chunk again, as an open chunk has it; its digest shows that it is the same."""
    windows = plan.source.windows(start, chunk.rows, sys.maxsize, frozenset(plan.manifest.rejected))
    again = next(windows, None)
    path = directory.input_of(chunk.chunk, plan.manifest.layout)
    if again is None or again.rows != chunk.rows or stored_window.write(path, again.table) != chunk.input_digest:
        raise InputError(f"the input of rows {chunk.first_row:,} and on has changed; restore it, then retry")
