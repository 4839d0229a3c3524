"""Puts rows that earlier starts settled into the result queue: from the result, or from parts and checkpoint."""

from collections.abc import Iterable, Iterator

import pyarrow as pa

from batchrun.dispatch.result_queue import ResultQueue
from batchrun.store import result_files
from batchrun.store.rundir import RunDirectory
from batchrun.tables import completions, files


def hand_over(batches: Iterable[pa.RecordBatch], results: ResultQueue) -> None:
    """Every row is in the queue, or the reader has stopped reading. Blocks while the queue is full."""
    for batch in batches:
        for completion in completions.of_rows(batch):
            if not results.put_earlier(completion):
                return


def result(directory: RunDirectory) -> Iterator[pa.RecordBatch]:
    """The rows of a complete run, in order."""
    for path in result_files.of(directory.path):
        yield from files.batches_of(path)
