"""One start of a run by its parts, without dispatch: chunks are opened, answered, sealed and assembled.

`python -m tests.chunk_starts RUN INPUT`: the same in a process of its own, for tests that kill it.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.job.job import Job
from batchrun.startup import resume
from batchrun.startup.resume import Plan
from batchrun.startup.run_options import RunOptions
from batchrun.store.checkpoint import Checkpoint
from batchrun.store.chunks import Chunks, Layout
from batchrun.store.open_chunk import OpenChunk
from batchrun.store.rundir import RunDirectory
from batchrun.tables import files
from tests.endings import answer_body, completion
from tests.jobs import job_over

NOW = datetime(2026, 11, 22, tzinfo=UTC)


class Start(NamedTuple):
    """What one process has of a run."""

    checkpoint: Checkpoint
    chunks: Chunks
    plan: Plan
    directory: RunDirectory


@contextmanager
def started(path: Path, job: Job) -> Iterator[Start]:
    directory = RunDirectory(path)
    directory.create()
    checkpoint = Checkpoint(directory.checkpoint, free_reserve=lambda: False)
    try:
        made = resume.plan_start(job, directory, checkpoint, RunOptions(), NOW)
        layout = Layout.of(made.manifest, made.source, made.schema, made.rows)
        chunks = Chunks(directory, checkpoint, layout)
        chunks.remove_orphans()
        yield Start(checkpoint, chunks, made, directory)
    finally:
        checkpoint.close()


def ask(start: Start, chunk: OpenChunk, most: int = 1_000_000) -> list[int]:
    """The rows that were sent: the pending ones of the chunk, at most so many. Their answers are durable."""
    rows = [row for batch in chunk.rows() for row in batch][:most]
    for row in rows:
        raw = answer_body(f"answer to {row.columns.get('text')}")
        start.checkpoint.put(completion(row.row, raw=raw))
    assert start.checkpoint.flushed()
    return [row.row for row in rows]


def finish(path: Path, job: Job) -> tuple[pa.Table, list[int]]:
    """The final file, and the rows that were sent for it."""
    requested: list[int] = []
    with started(path, job) as start:
        while (chunk := start.chunks.open_next()) is not None:
            requested += ask(start, chunk)
            start.chunks.seal(chunk)
        return assembled(start), requested


def assembled(start: Start) -> pa.Table:
    sealed = sorted(start.chunks.sealed.items())
    parts = [
        (start.directory.part_of(number, chunk.generation), chunk.part_digest or "", chunk.rows)
        for number, chunk in sealed
    ]
    files.assemble(parts, start.directory.completions, start.plan.schema, "zstd", {})
    return pq.read_table(start.directory.completions)


def small_chunks(path: Path, rows: int = 10) -> Job:
    return job_over(path, output={"chunk_rows": rows})


def main() -> None:
    finish(Path(sys.argv[1]), small_chunks(Path(sys.argv[2])))


if __name__ == "__main__":
    main()
