"""Retries settled rows: their chunks are opened again over the parts they have.

The records of other rows are copied unchanged when the chunk is sealed again. Until then the old records count, also if
the process dies meanwhile.
"""

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import msgspec

from batchrun.durable import disk_errors, unnamed_file
from batchrun.errors import InputError, JobError
from batchrun.records import Notice
from batchrun.report.cost_lines import about_cost
from batchrun.report.wording import are, plural
from batchrun.source import START, Position
from batchrun.startup.resume import Plan
from batchrun.store import result, variants
from batchrun.store.base_part import BasePart
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.db_tables import Reopened
from batchrun.store.rundir import RunDirectory
from batchrun.store.stored_window import write


def reopen(plan: Plan, directory: RunDirectory, checkpoint: Checkpoint, statuses: Collection[str]) -> Notice:
    """Makes rows with one of the statuses pending again, unless rows are pending already; returns a line about it.

    Raises:
        JobError: rows are pending that this start would send with other settings.
        InputError: the input differs from what a chunk was made of.
        CheckpointError: a part or the result is damaged.
    """
    pending = plan.rows - checkpoint.totals.settled()
    entries = variants.encode(plan.variants)
    if pending and checkpoint.manifest_entries()[variants.ENTRY] != entries[variants.ENTRY]:
        raise JobError(
            f"{plural(pending, 'row')} {are(pending)} still pending with the earlier settings; "
            "finish the run with those, then retry"
        )
    if pending:
        return Notice(f"{plural(pending, 'row')} {are(pending)} still pending; sent first", "retry", pending=pending)
    mean_cost_usd = checkpoint.totals.mean_cost_usd()
    rows = 0
    if any(checkpoint.totals.standing.get(status) for status in statuses):
        rows = _reopen_chunks(plan, directory, checkpoint, statuses, entries)
    ended = f"{plural(rows, 'row')} that ended as {', '.join(sorted(statuses))}"
    return Notice(f"{ended} will be sent again{about_cost(rows, mean_cost_usd)}", "retry", rows=rows)


def _reopen_chunks(
    plan: Plan, directory: RunDirectory, checkpoint: Checkpoint, statuses: Collection[str], entries: Mapping[str, str]
) -> int:
    """Makes the rows pending in one transaction, with the `entries` of the manifest; returns how many rows."""
    chunks = checkpoint.chunks()
    if result.FINISHED in checkpoint.manifest_entries():
        chunks = result.restore_parts(plan.manifest, checkpoint, chunks, directory)
    start, count = START, 0
    with _Rows(directory.path) as rows:
        for place, chunk in enumerate(chunks):
            path = directory.part_of(chunk.chunk, chunk.generation)
            base = BasePart(path, chunk.part_digest or "", plan.manifest.output.prefix)
            if found := base.reopened(statuses, plan.variant):
                count += len(found)
                rows.add(found)
                # the input of an open chunk is a separate file, which was removed when the chunk was sealed
                windows = plan.source.windows(start, chunk.rows, sys.maxsize, frozenset(plan.manifest.rejected))
                again = next(windows, None)
                path = directory.input_of(chunk.chunk, plan.manifest.layout)
                if again is None or again.rows != chunk.rows or write(path, again.table) != chunk.input_digest:
                    raise InputError(
                        f"the input of rows {chunk.first_row:,} and on has changed; restore it, then retry"
                    )
                chunks[place] = msgspec.structs.replace(chunk, open=1)
            start = msgspec.json.decode(chunk.end_position, type=Position)
        checkpoint.reopen_chunks(chunks, rows, entries)
    return count


class _Rows:
    """Rows to reopen, in an unnamed file: a tenth of ten million rows would fill memory. May be read several times."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file = unnamed_file(directory)

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
