"""Puts rows that earlier starts settled into the result queue: from the result, or from parts and checkpoint."""

from collections.abc import Iterable, Iterator

import pyarrow as pa

from batchrun.dispatch.result_queue import ResultQueue
from batchrun.store.rundir import RunDirectory
from batchrun.tables import completions, files


def hand_over(batches: Iterable[pa.RecordBatch], results: ResultQueue) -> None:
    """Every row is in the queue, or the reader has stopped reading. Blocks while the queue is full."""
    for batch in batches:
        for completion in completions.read(batch):
            if not results.put_earlier(completion):
                return


def result(directory: RunDirectory) -> Iterator[pa.RecordBatch]:
    """The rows of a complete run, in order."""
    paths = [directory.completions]
    if not directory.completions.exists():  # layout = "parts"
        paths = sorted(directory.completions_folder.glob("*.parquet"))
    for path in paths:
        yield from files.batches_of(path)
